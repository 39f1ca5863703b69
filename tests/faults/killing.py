"""Preludes for tests/processes.py: the process sends itself signals right before the n-th change that it makes below a folder, or
the n-th call of a function.

Between two changes a folder stays as it is, so these are all the states in which a kill can leave it, but for those within one write.
A change is a file opened for writing, a rename, a deletion, a folder made or removed, by Python; what safetensors writes in Rust is
not seen, but it begins and ends between two changes that are.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FOLDER_AT = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}
"""Where an event's arguments say to which open folder its path is relative."""


def signal_before_change(folder: str, numbers: Sequence[int], change: int, since: str = "") -> None:
    """Send this process the signals before change number `change`, counted from 1, beginning with the first whose name has `since`.

    A change's name is an audit event and a path below the folder: `open /metrics.jsonl`.
    """
    seen = 0

    def count(name: str) -> None:
        nonlocal seen
        seen += bool(seen or since in name)
        if seen == change:
            for number in numbers:
                os.kill(os.getpid(), number)
            seen += 1_000_000  # once

    _on_each_change(folder, count)


def ask_in_call(module: str, name: str, call: int, ways: Sequence[int | str]) -> None:
    """Before call number `call` of a module's function (or `Class.method`): send the signals, make the files."""
    *path, last = name.split(".")
    target = functools.reduce(getattr, path, importlib.import_module(module))
    real, calls = getattr(target, last), 0

    @functools.wraps(real)
    def asking(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        for way in ways if calls == call else ():
            if isinstance(way, str):
                Path(way).touch()
            else:
                os.kill(os.getpid(), way)
        return real(*args, **kwargs)

    setattr(target, last, asking)


def _on_each_change(folder: str, act: Callable[[str], object]) -> None:
    process = os.getpid()

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            at = -1
            if not flags & WRITING:
                return
        elif event in FOLDER_AT:
            path, at = args[0], args[FOLDER_AT[event]]
        else:
            return
        if isinstance(path, int) or os.getpid() != process:
            return
        path = os.fsdecode(path)
        if at != -1:
            path = os.path.join(os.readlink(f"/proc/self/fd/{at}"), path)
        there = os.path.lexists(path)
        if (event == "os.mkdir" and there) or (event in ("os.remove", "os.rmdir", "os.rename") and not there):
            return
        if path.startswith(f"{folder}{os.sep}"):
            act(f"{event} {path.removeprefix(folder)}")

    sys.addaudithook(hook)
