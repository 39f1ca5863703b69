"""One rank of tests/test_taking_turns.py: goes through every case in turn and writes what happened to it. Not a test by itself."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from qlora_suite.ranks import gathered, taking_turns, together

PartialState(cpu=True)
accelerator = Accelerator()
rank = accelerator.process_index


def load(fail_on: int | None = None, error: Exception | None = None) -> list[float]:
    """Pretend to load for a while. Returns when it began and ended, on the clock that all processes share."""
    with taking_turns(accelerator):
        began = time.monotonic()
        time.sleep(0.2)
        if rank == fail_on:
            raise error
        interval = [began, time.monotonic()]
    return interval


def fail(errors: dict[int, Exception]) -> None:
    with together(accelerator):
        if rank in errors:
            raise errors[rank]


def outcome_of(block: Callable[[], object]) -> dict[str, object]:
    began = time.monotonic()
    try:
        return {"result": block()}
    except BaseException as error:
        return {"error": type(error).__name__, "said": str(error), "code": getattr(error, "code", None), "after": time.monotonic() - began}


cases = {
    "turns": load,
    "first fails": lambda: load(0, ValueError("no such base")),
    "second fails": lambda: load(1, RuntimeError("it broke")),
    "same mistake": lambda: fail(dict.fromkeys(range(accelerator.num_processes), ValueError("misspelt"))),
    "memory": lambda: fail({1: torch.OutOfMemoryError("on the card")}),
    "memory and a mistake": lambda: fail({0: torch.OutOfMemoryError("on the card"), 1: ValueError("misspelt")}),
    "gathered": lambda: gathered(accelerator, {"rank": rank}),
}
outcomes = {name: outcome_of(block) for name, block in cases.items()}
path = Path(sys.argv[1]) / f"{rank}.json"
path.write_text(json.dumps(outcomes))
accelerator.wait_for_everyone()
if "--kill" in sys.argv:
    with taking_turns(accelerator):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when host memory is short
torch.distributed.destroy_process_group()  # a process that just ends may be aborted: gloo's threads are still there
