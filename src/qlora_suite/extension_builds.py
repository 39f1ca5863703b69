"""torch compiles extensions (DeepSpeed's ops) behind a file named `lock`, and whoever finds one waits until it is gone: for ever, if
the process that made it was killed while it compiled.
"""

import os
import time
from pathlib import Path

from qlora_suite.tracking import say

DEAD_AFTER_SECONDS = 300.0
"""A lock of another node that shares the folder cannot be looked into: it is left alone for longer than these ops take to compile."""


def release_dead_builds(root: Path | None = None) -> list[Path]:
    """Remove the locks of builds that died; returns them. `root`: the folder of the extensions (default: torch's).

    The first process of a machine does it: between two looks of several, a lock may be a new one.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    released = []
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            if time.time() - lock.stat().st_mtime > DEAD_AFTER_SECONDS and not _is_open(lock):
                lock.unlink()
                released.append(lock)
        except FileNotFoundError:  # its build is done
            continue
    for lock in released:
        say(f"removed {lock}: it was left by a build that was killed, and every later one would wait for it")
    return released


def _is_open(path: Path) -> bool:
    """Does a process of this machine have the file open, as the one that builds has?"""
    wanted = path.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:  # another user's, or closed by now
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
