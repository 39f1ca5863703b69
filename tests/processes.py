"""The real scripts as real processes that start in a fraction of a second: forked from a server that has imported the stack once.

    process = start("train.py", recipe, "output.dir=...", log=tmp_path / "log")
    process.wait_for(lambda: has_step(run, 3)); process.kill()
    assert process.wait() == -signal.SIGKILL

A `prelude` (a function of a module, and its arguments) is called in the new process before the script: where a fault has to be put into
it. What it cannot show is the launcher and the import of the libraries: those tests use conftest.run_script.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT

PRELOADED = ["processes", "torch", "accelerate", "peft", "bitsandbytes", "transformers.models.phi.modeling_phi", "pyarrow.parquet"]
PRELOADED += [
    "qlora_suite.launched_runs",
    "qlora_suite.preparation",
    "qlora_suite.selection",
    "qlora_suite.trainable",
    "qlora_suite.generation",
]


@dataclass
class Started:
    """A script that runs, or has run."""

    process: Any
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has printed so far, to both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; minus the signal that ended it. It must end within `seconds`."""
        self.process.join(seconds)
        if self.running:
            self.kill()
            self.process.join()
            raise AssertionError(f"it did not end within {seconds} s:\n{self.output}")
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Until the condition holds, which must be before the process ends."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.running or condition(), f"it ended ({self.process.exitcode}) before that:\n{self.output}"
            assert time.monotonic() < until, f"not within {seconds} s:\n{self.output}"
            time.sleep(0.002)


def start(script: str, *args: str | Path, log: Path, prelude: tuple[Callable, ...] | None = None, **env: str) -> Started:
    """Start scripts/`script` with its arguments; `log` takes both of its streams (from its end on, if it is there)."""
    log.touch()
    process = server().Process(target=_run, args=(str(ROOT / "scripts" / script), [str(a) for a in args], str(log), env, prelude))
    process.start()
    return Started(process, log)


def run(
    script: str, *args: str | Path, log: Path, prelude: tuple[Callable, ...] | None = None, seconds: float = 120, **env: str
) -> Started:
    """`start`, and wait for its end."""
    started = start(script, *args, log=log, prelude=prelude, **env)
    started.wait(seconds)
    return started


def has_step(folder: Path, step: int) -> bool:
    """Does the run in `folder` have this step in its metrics.jsonl?"""
    journal = folder / "metrics.jsonl"
    return journal.exists() and f'{{"step": {step},' in journal.read_text(encoding="utf-8")


@functools.cache
def server() -> Any:
    """What starts the processes: multiprocessing's context with the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ["OMP_NUM_THREADS"] = "1"  # the server's, and so its children's
    return context


def _run(script: str, args: list[str], log: str, env: dict[str, str], prelude: tuple[Callable, ...] | None) -> None:
    """In the new process."""
    written = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(written, number)
    os.chdir(ROOT)
    os.environ.update(env)
    sys.argv = [script, *args]
    sys.path.insert(0, str(ROOT / "scripts"))
    if prelude:
        prelude[0](*prelude[1:])
    runpy.run_path(script, run_name="__main__")
