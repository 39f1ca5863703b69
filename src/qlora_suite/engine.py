"""What differs between one device and several when gradients are made, exchanged and applied.

engine = Engine(accelerator, model, optimizer, dtype, max_grad_norm=1.0)
with engine.accumulate(last=...):                 # gradients are exchanged once a step
    engine.backward(loss_sum, num_tokens)         # loss of the step = sum over all ranks / supervised tokens of the step
grad_norm, applied = engine.step(loss)
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from qlora_suite.model import compute_dtype

SCALE_SEARCH_STEPS = 16
"""The scale starts at 65,536 = 2^16 and halves at each overflow."""
TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Where a tracker's package is not called as the tracker."""
TRUE = ("true", "1", "yes")
MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def start(trackers: Sequence[str] = (), folder: str | None = None) -> tuple[Accelerator, torch.dtype]:
    """The accelerator that `accelerate launch` described, and the type to compute in. Trackers write to `folder`.

    Raises ValueError if the environment asks for something that would change the arithmetic behind the recipe's back.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto"):
        raise ValueError(
            f"the accelerate config sets gradient_accumulation_steps to {accumulation}; accumulation follows from train.rows_per_step, "
            "so remove it there"
        )
    if torch.backends.mps.is_available():  # a Mac
        os.environ["ACCELERATE_USE_CPU"] = "true"  # bitsandbytes and our precision rule know CUDA and the CPU
    for tracker in trackers:
        if not any(importlib.util.find_spec(package) for package in TRACKER_PACKAGES.get(tracker, (tracker,))):
            raise ValueError(
                f"tracking.trackers: {tracker} needs the package {TRACKER_PACKAGES.get(tracker, (tracker,))[0]}; pip install it"
            )
    # Accelerator() would read this by itself, but the state is made before it, to know the device that decides the precision
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE)
    _check_device(state.device)
    asked_for = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != asked_for:
        raise ValueError(
            f"{asked_for} processes were launched but each found a world of {state.num_processes}, so all would train alone and overwrite "
            "each other; check distributed_type in the accelerate config"
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in MIXED_PRECISION.values():
        raise ValueError(f"mixed_precision: {asked} is not supported; use bf16, fp16 or no, which follows the hardware")
    dtype = compute_dtype(state.device, asked)
    return Accelerator(mixed_precision=MIXED_PRECISION[dtype], log_with=list(trackers) or None, project_dir=folder), dtype


def _check_device(device: torch.device) -> None:
    """Raises ValueError if a GPU was meant, or is there, and the run would quietly use the CPU instead."""
    if device.type != "cpu":
        return
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower()  # set by `accelerate launch`, and by a person who means it
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    unusable = not asked and not hidden and Path("/proc/driver/nvidia/version").exists()
    if asked not in ("", *TRUE) or unusable:
        raise ValueError(
            "this is meant for a GPU, but torch sees none and would quietly use the CPU; see `nvidia-smi` and `python -m "
            "torch.utils.collect_env` (README: torch for your machine), or use accelerate_configs/cpu.yaml or ACCELERATE_USE_CPU=true"
        )


class Engine:
    """One process, or DDP. `model` is the module to call; `parameters` are the trained ones."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> None:
        self.accelerator = accelerator
        self.unwrapped = model
        """For evaluation and previews, where ranks may call it unequally often."""
        self.model = accelerator.prepare_model(model)
        self.optimizer = optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_grad_norm = max_grad_norm
        # accelerate has no scaler on a CPU, and `step_was_skipped` is wrong for fused AdamW: this one is ours.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=dtype == torch.float16)

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around one forward and backward pass; all but the last of a step keep their gradients to themselves."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss_sum: Tensor, num_tokens: int) -> None:
        """Add the gradient of `loss_sum / num_tokens` (tokens of the whole step, all ranks). DDP averages over ranks: undone here."""
        self.scaler.scale(loss_sum * (self.accelerator.num_processes / num_tokens)).backward()

    def step(self, loss: float) -> tuple[float, bool]:
        """Clip, and apply unless the step's loss or a gradient is not finite (a loss of infinity can have finite gradients).

        Returns the norm before clipping and whether it was applied.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied:
            self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    def check_nonfinite(self, in_a_row: int, limit: int, step_rows: Sequence[int]) -> None:
        """Raises ValueError after `limit` steps in a row that could not be applied. fp16 gets a few more, to find its scale."""
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            limit += SCALE_SEARCH_STEPS
        if in_a_row >= limit:
            raise ValueError(
                f"the loss or the gradient was not finite in {in_a_row} steps in a row, last with rows {list(step_rows)}; none of them was "
                "applied and the last checkpoint is good: lower optim.learning_rate, or look at these rows (metrics.jsonl names them all)"
            )

    def state(self) -> dict[str, Any]:
        """The fp16 scaler's state; empty in other precisions."""
        return self.scaler.state_dict()

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))

    def min_over_ranks(self, value: int) -> int:
        """The smallest of the processes' values."""
        return int(self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).min())

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device), "sum").tolist()

    def any_rank(self, flag: bool) -> bool:
        """The same answer on every rank: true if it is true on one."""
        return self.sum_over_ranks(float(flag))[0] > 0


def seed_for(seed: int, *position: int) -> None:
    """Set every random generator from the run's seed and a position in it (step, micro-batch, rank).

    Dropout is then a function of where the run is: there is no random state to save, and evaluation or previews disturb nothing.
    """
    mixed = seed
    for part in position:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    torch.manual_seed(mixed)
