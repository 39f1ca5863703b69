"""A prelude: the script runs with little memory, so that what would fill a machine fails in a test instead."""

import os
import resource
from pathlib import Path


def limit_memory(megabytes: int) -> None:
    """Of address space, beyond what the process has when it begins."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 10**6, resource.RLIM_INFINITY))
