"""Preludes for `processes.start`: a training script whose batches, gradients or memory go wrong at chosen steps (from 1).

start("train.py", recipe, log=log, prelude=(poison.losses, {3: math.nan}))     one micro-batch's loss times NaN in step 3
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_suite import engine, loss

_position = {"step": 0, "micro": 0}


def losses(factors: dict[int, float], micro: int = 0) -> None:
    """Multiply the loss of one micro-batch of some steps, and so its gradients."""
    _after_forward(lambda value, batch: value * factors[_position["step"]] if _is_at(factors, micro) else value)


def constants(terms: dict[int, float], micro: int = 0) -> None:
    """Add to the loss of one micro-batch of some steps; its gradient stays what it was."""
    _after_forward(lambda value, batch: value + terms[_position["step"]] if _is_at(terms, micro) else value)


def gradients(steps: list[int], micro: int = 0) -> None:
    """The loss stays what it was, its gradient becomes infinite."""
    _after_forward(lambda value, batch: _Infinite.apply(value) if _is_at(steps, micro) else value)


def memory(places: int, at_step: int = 1, rank: int = 0) -> None:
    """A forward pass of more than so many places runs out of memory, with half of it done, from a step on and on one rank."""

    def too_much(value: Tensor, batch: Any) -> Tensor:
        short = torch.is_grad_enabled() and batch.input_ids.numel() > places
        if short and _position["step"] >= at_step and int(os.environ.get("RANK", "0")) == rank:
            value.backward()  # what an error within the backward pass leaves behind: a part of the gradients
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return value

    _after_forward(too_much)


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


def _is_at(steps: Any, micro: int) -> bool:
    return _position["step"] in steps and _position["micro"] == micro and torch.is_grad_enabled()


def _after_forward(change: Callable[[Tensor, Any], Tensor]) -> None:
    """Before the script imports them by name."""
    summed_loss, seed_for = loss.summed_loss, engine.seed_for

    def seeded(seed: int, step: int, micro: int, rank: int) -> None:
        _position.update(step=step + 1, micro=micro)
        seed_for(seed, step, micro, rank)

    loss.summed_loss = lambda model, batch: change(summed_loss(model, batch), batch)
    engine.seed_for = seeded
