"""A real small disk, a tmpfs in a mount namespace of its own: no rights are needed, and nobody else sees it.

with small_disk(tmp_path / "disk", "32m") as disk:
    run("train.py", recipe, f"output.dir={disk.folder}/run", log=log, prelude=(fills, disk.holder, disk.folder, {5: True, 20: False}))
    disk.seen_from_here / "run"          # the same files: outside of the namespace the folder is empty
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


@dataclass(frozen=True)
class Disk:
    folder: Path
    holder: int
    """The process that keeps the namespace."""

    @property
    def seen_from_here(self) -> Path:
        return Path(f"/proc/{self.holder}/root{self.folder}")


@contextlib.contextmanager
def small_disk(folder: Path, size: str, *options: str) -> Iterator[Disk]:
    """A disk of so many bytes at `folder`, for processes that `enter` it. Skips the test where namespaces are not allowed."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o {','.join((f'size={size}', *options))} disk '{folder}' && echo ready && exec cat"
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        if (said := holder.stdout.readline()) != "ready\n":
            pytest.skip(f"no mount namespace can be made here: {said.strip()}")
        yield Disk(folder, holder.pid)
    finally:
        holder.kill()
        holder.communicate()


def enter(holder: int) -> None:
    """Let this process see the disk. It may have one thread only, as a forked one has."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [(os.open(f"/proc/{holder}/ns/{name}", os.O_RDONLY), kind) for name, kind in (("user", CLONE_NEWUSER), ("mnt", CLONE_NEWNS))]
    for descriptor, kind in spaces:
        if libc.setns(descriptor, kind) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)


def fill(folder: Path, leave: int = 0) -> None:
    """Take all but so many bytes of its disk."""
    with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while shutil.disk_usage(folder).free > leave:
            file.write(b"x" * 4096)


def fills(holder: int, folder: Path, at: Mapping[int, bool], log: bool = False, leave: int = 0) -> None:
    """A prelude: the disk is full (but for `leave` bytes) from the steps on at which `at` is true, and has room again where it is
    false. With `log`, what the process prints goes to a file on that disk, as a queue's log does.
    """
    enter(holder)
    if log:
        for number in (1, 2):
            os.dup2(os.open(folder / "log.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    from qlora_suite.run_folder import Run

    real = Run.add_metrics

    def add_metrics(self: Run, step: int, **values: Any) -> None:
        if at.get(step):
            fill(folder, leave)
        elif step in at:
            (folder / "filler").unlink()
        real(self, step, **values)

    Run.add_metrics = add_metrics
