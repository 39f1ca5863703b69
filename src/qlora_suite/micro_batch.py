"""How many rows fit into one forward and backward pass, and whether activations must be recomputed for it: found by trial, and made
smaller where a step runs out of memory all the same.

Neither changes the loss or the gradient of a step, so one recipe serves a T4 and eight A100s.

A step that runs out of memory is done again with micro-batches half as large: the same rows, the same tokens, the same gradient. In one
process that is done on the spot. Of several one would leave the others waiting within an exchange of gradients or weights: there
the run ends with the finding written down (NOTE), and the same command goes on from the last checkpoint with half as much.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_suite.batches import EMPTY, Limit
from qlora_suite.files import read_json, write_json
from qlora_suite.recipe import Train

CPU_TOKENS = 1024
"""On a CPU memory is rarely the limit and larger batches only spill the caches."""
HEADROOM = 0.92
"""Share of a card's memory that a trial may use: fragmentation comes on top."""
NOTE = "out_of_memory.json"
"""In the run's folder: what a step has shown to be too much."""


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
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return torch.cuda.max_memory_reserved(device) + reserved <= HEADROOM * torch.cuda.get_device_properties(device).total_memory


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error, or cuBLAS's, cuDNN's and the CPU allocator's words for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ("ALLOC_FAILED", "DefaultCPUAllocator"))


def smaller(limit: Limit, checkpointing: bool, train: Train, micro: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Limit, bool]:
    """What to try after `micro`, cut by `limit`, ran out of memory: half of it; with activations recomputed, if a row went alone.

    Raises ValueError if nothing is left to try.
    """
    most = max(len(piece) for piece in micro)
    if most > 1:
        places = max(len(piece) * max(1 if row == EMPTY else int(lengths[row]) for row in piece) for piece in micro)
        return Limit(max(1, most // 2), max(1, min(limit.tokens, places) // 2)), checkpointing
    if not checkpointing and train.gradient_checkpointing == "auto":
        return limit, True
    raise ValueError(
        f"a single row of up to {int(max(lengths)):,} tokens ran out of memory in a step; does another program use this device? Else lower "
        "data.max_length or adapter.rank, use quantization: nf4, or set train.gradient_checkpointing: true"
    )


def write_note(
    folder: Path, limit: Limit, checkpointing: bool, hardware: dict[str, Any], processes: int, ended_attempt: int | None
) -> None:
    """What a step has shown to fit at most, for the next start on the same hardware; `ended_attempt`: the one that it has ended."""
    found = {"limit": asdict(limit), "checkpointing": checkpointing, "hardware": hardware, "processes": processes}
    found["ended_attempt"] = ended_attempt
    write_json(folder / NOTE, found)


def ended_attempt(folder: Path) -> int | None:
    """The attempt that ended because of what the note says; None if there is no note, or the run went on by itself."""
    return read_json(folder / NOTE)["ended_attempt"] if (folder / NOTE).is_file() else None


def within_note(folder: Path, limit: Limit, checkpointing: bool, hardware: dict[str, Any], processes: int) -> tuple[Limit, bool]:
    """The limit, or what an earlier start on the same hardware has left of it. Raises ValueError if the note is damaged."""
    if not (folder / NOTE).is_file():
        return limit, checkpointing
    note = read_json(folder / NOTE)
    try:
        known = Limit(rows=int(note["limit"]["rows"]), tokens=int(note["limit"]["tokens"]))
        if (note["hardware"], note["processes"]) != (hardware, processes):
            return limit, checkpointing
        return Limit(min(limit.rows, known.rows), min(limit.tokens, known.tokens)), checkpointing or bool(note["checkpointing"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / NOTE} is not what a run writes there; remove it") from None


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
