"""What a run says of itself: a progress bar, metrics.jsonl, previews and status.json, and accelerate's trackers when asked."""

import contextlib
import json
import math
import os
import resource
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qlora_suite.files import read_json, write_json, write_text

console = Console(highlight=False, soft_wrap=True)
LINE_EVERY_SECONDS = 15.0


def say(text: str) -> None:
    """A line for the reader, above the progress bar if there is one. A log on a full disk, or a terminal that is gone, ends nothing."""
    with contextlib.suppress(OSError):
        console.print(text, markup=False)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Journal:
    """An append-only JSONL file, cut back when a run resumes from an earlier step, so that nothing stands in it twice.

    Records with an `event` stay: a disk that was full at a step that is done again was full all the same.

    What a full disk does not take is written with the next record; a file that was removed or damaged meanwhile is written anew.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = [
            r for r in read_journal(path) if isinstance(r.get("step"), int) and ("event" in r or r["step"] <= step)
        ]
        self.unwritten = 0
        """Of the last records: how many are not in the file."""
        self.error = ""
        """Why."""
        self._write_anew()

    def add(self, record: dict[str, Any]) -> None:
        """Numbers that are not finite become null, which JSON has a word for."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.records.append(record)
        self.unwritten += 1
        self.flush()

    def flush(self) -> bool:
        """Write what is not written yet. False if the disk still does not take it."""
        try:
            if not self.path.exists() or self.path.stat().st_size != self._size:
                self._write_anew()
            elif self.unwritten:
                self._append(_lines(self.records[-self.unwritten :]))
        except OSError as error:
            self.error = str(error)
            return False
        self.unwritten = 0
        return True

    def _append(self, text: str) -> None:
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._size)
            try:
                left = memoryview(text.encode())
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(self._size)  # half a line would spoil the next
                raise
            self._size = file.tell()

    def _write_anew(self) -> None:
        write_text(self.path, _lines(self.records))
        self._size = self.path.stat().st_size


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL journal; a line cut short by a kill is left out, and one that a disk has damaged, but not those after it."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):  # splitlines() would also cut at U+2028 inside an answer
        try:
            record = json.loads(line.decode(), parse_constant=_no_json)
            if b"\\u" in line:  # half of a surrogate pair could be written to no file again
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON, and is never written here")


class Status:
    """status.json: how the run stands, for scripts that must not rely on exit codes (`accelerate launch` turns each into 1)."""

    def __init__(self, path: Path, quiet: bool = False) -> None:
        self.path = path
        before = _status_before(path, quiet)
        self.state: str = before.get("state", "")
        self.step: int = before.get("step", 0)
        self.attempt: int = before.get("attempt", 0) + 1
        self.identity: dict[str, Any] = before.get("identity", {})
        """What the run was started as, so that a finished one can tell whether it is asked for again."""
        self.error = ""
        """Why the last state could not be written; empty if it was."""

    def write(self, state: str, step: int, num_steps: int, reason: str = "", identity: Mapping[str, Any] | None = None) -> bool:
        """`state` is `running`, `stopped` (the same command goes on), `finished` or `failed`. False if the disk does not take it."""
        self.state, self.identity = state, dict(identity) if identity is not None else self.identity
        values = {"state": state, "reason": reason, "step": step, "num_steps": num_steps, "attempt": self.attempt}
        try:
            write_json(self.path, {**values, "identity": self.identity})
        except OSError as error:
            self.error = str(error)
            return False
        self.error = ""
        return True


def _status_before(path: Path, quiet: bool) -> dict[str, Any]:
    """What the file holds, if it is a status: all of it but the count of attempts follows from the checkpoints."""
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if isinstance(found.get("state"), str) and type(found.get("step")) is type(found.get("attempt")) is int:
            return {**found, "identity": found["identity"] if isinstance(found.get("identity"), dict) else {}}
        why = "it holds no status"
    except (ValueError, AttributeError) as error:
        why = str(error)
    if not quiet:
        say(f"{path} is made anew, for it is damaged: {why}")
    return {}


def start_trackers(accelerator: Accelerator, project: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Start the trackers that the accelerator was made with; their files go to `folder`.

    On nodes without a network (HF_HUB_OFFLINE, which slurm/env.sh sets) W&B would wait for one: it goes offline, and `sync_command`
    says how to send its files afterwards.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        os.environ.setdefault("WANDB_MODE", "offline")
    accelerator.init_trackers(project, config=dict(config), init_kwargs={"wandb": {"dir": str(folder)}})


def sync_command(trackers: Sequence[str], folder: Path) -> str | None:
    """What sends an offline tracker's files, from a machine with a network; None if there is nothing to send."""
    offline = "wandb" in trackers and os.environ.get("WANDB_MODE") == "offline"
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*" if offline else None


class StepBar:
    """A progress bar on a terminal, a line now and then elsewhere (logs of a cluster, CI)."""

    def __init__(self, title: str, total: int, done: int = 0, visible: bool = True) -> None:
        self.title, self.total, self.start_at, self.done = title, total, done, done
        self.began = self.last_line = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, disable=not visible
        )
        self.visible = visible
        self.task = self.progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "StepBar":
        if console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self.progress.stop()

    def advance(self, done: int, note: str) -> None:
        self.done = done
        if console.is_terminal:
            self.progress.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if self.visible and (now - self.last_line >= LINE_EVERY_SECONDS or done == self.total):
            self.last_line = now
            left = (now - self.began) / max(1, done - self.start_at) * (self.total - done)
            say(f"{self.title} {done}/{self.total}  {note}  {_clock(now - self.began)} elapsed, {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
