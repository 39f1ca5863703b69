"""Another script in which rank 1 fails within a step: faulty.py FAULT scripts/train.py RECIPE ..."""

import os
import runpy
import signal
import sys
import time
from typing import Any

import torch

from qlora_suite import loss

AT_CALL = 4
"""Of the forward pass: the fourth step, if each takes one."""


def fail(fault: str) -> None:
    os.write(1, f"FAULT {time.time()}\n".encode())
    if fault == "hangs":
        time.sleep(100_000)
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    assert fault == "raises"
    raise ValueError("rank 1 has found a mistake")


def make_faulty(fault: str) -> None:
    summed_loss, calls = loss.summed_loss, 0

    def faulty(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        learns = model.training and torch.is_grad_enabled()  # not in the trial of the faster ways
        calls += learns
        if calls == AT_CALL and learns:
            fail(fault)
        return summed_loss(model, *args, **kwargs)

    loss.summed_loss = faulty


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        make_faulty(sys.argv[1])
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
