"""How many rows fit into one forward and backward pass, and whether activations must be recomputed for it: found by trial.

Neither changes the loss or the gradient of a step, so one recipe serves a T4 and eight A100s.
"""

from collections.abc import Callable

import torch
from torch import nn

from qlora_suite.batches import Limit
from qlora_suite.recipe import Train

CPU_TOKENS = 1024
"""On a CPU memory is rarely the limit and larger batches only spill the caches."""
HEADROOM = 0.92
"""Share of a card's memory that a trial may use: fragmentation comes on top."""


def candidates(rows_per_rank: int) -> list[int]:
    """Divisors of a rank's rows per step, largest first."""
    return [n for n in range(rows_per_rank, 0, -1) if rows_per_rank % n == 0]


def choose(
    train: Train,
    rows_per_rank: int,
    longest: int,
    device: torch.device,
    trial: Callable[[int, bool], None],
    agree: Callable[[int], int],
    reserved: int = 0,
) -> tuple[Limit, bool]:
    """(what goes through at once, gradient_checkpointing) as the recipe says, or the fastest that fits where it says `auto`.

    `auto` limits tokens, not rows, so that short rows go through together. `trial(rows, checkpointing)` runs
    forward and backward on the longest rows; out of memory means it does not fit. It must not wait for other ranks, which may try
    another size at that moment; `agree` gives the smallest of all ranks' values.
    `reserved` bytes must stay free for what the trial does not hold yet: the optimiser's state.
    Without checkpointing comes first: recomputing costs a third more work, a smaller micro-batch costs little.
    Raises ValueError if nothing fits.
    """
    auto = train.micro_batch == "auto"
    sizes = candidates(rows_per_rank) if auto else [train.micro_batch]
    modes = [False, True] if train.gradient_checkpointing == "auto" else [train.gradient_checkpointing]
    if device.type == "cpu":
        return Limit(rows_per_rank, max(longest, CPU_TOKENS)) if auto else Limit(sizes[0], sizes[0] * longest), modes[0]
    if len(sizes) == len(modes) == 1:
        return Limit(sizes[0], sizes[0] * longest), modes[0]
    for checkpointing in modes:
        largest = next((n for n in sizes if _fits(lambda n=n, c=checkpointing: trial(n, c), device, reserved)), 0)
        agreed = agree(largest)
        if agreed:
            return Limit(rows_per_rank if auto else agreed, agreed * longest), checkpointing
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    raise ValueError(
        f"one row of {longest} tokens does not fit into {total:.1f} GiB; lower data.max_length or adapter.rank, or use quantization: nf4"
    )


def _fits(trial: Callable[[], None], device: torch.device, reserved: int) -> bool:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        trial()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if "ALLOC_FAILED" not in str(error):  # cuBLAS and cuDNN have words of their own for it
            raise
        return False
    return torch.cuda.max_memory_reserved(device) + reserved <= HEADROOM * torch.cuda.get_device_properties(device).total_memory


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
