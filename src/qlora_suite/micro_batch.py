"""How many rows fit into one forward and backward pass, and how many layers must recompute their activations for it: found by trial,
and made smaller where a step runs out of memory all the same.

Neither changes the loss or the gradient of a step, so one recipe serves a T4 and eight A100s.

A step that runs out of memory is done again with micro-batches half as large: the same rows, the same tokens, the same gradient. In one
process that is done on the spot. Of several one would leave the others waiting within an exchange of gradients or weights: there
the run ends with the finding written down (NOTE), and the same command goes on from the last checkpoint with half as much.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_suite.batches import EMPTY, Limit
from qlora_suite.dataset import Rows
from qlora_suite.engine import autocast
from qlora_suite.files import read_json, write_json
from qlora_suite.loss import Batch, collate
from qlora_suite.recipe import Dpo, Train

CPU_TOKENS = 1024
"""On a CPU memory is rarely the limit and larger batches only spill the caches."""
HEADROOM = 0.92
"""Share of a card's memory that a trial may use: fragmentation comes on top."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the layers that recompute their activations in the backward pass: what `auto` tries."""
WEIGHTS_AS_TOKENS = 200
"""A pass over the weights (4-bit ones are dequantised, a layer at a time) takes a card as long as the products of so many tokens. NF4 by
bytes and operations, at the rates of their data sheets: 110 on a T4, 160 on an A100, 210 on an H200.
"""
NOTE = "out_of_memory.json"
"""In the run's folder: what a step has shown to be too much."""


def candidates(rows_per_rank: int) -> list[int]:
    """Divisors of a rank's rows per step, largest first."""
    return [n for n in range(rows_per_rank, 0, -1) if rows_per_rank % n == 0]


def cost(tokens: int, share: float) -> float:
    """Time of a token in micro-batches of so many, where this share of the layers recomputes; 1 is one pass through frozen layers.

    Two passes, forward and to the inputs' gradients (frozen weights want none of their own), and a share of a third; in each, the
    weights are made ready once for all tokens.
    """
    return (2 + share) * (1 + WEIGHTS_AS_TOKENS / tokens)


def by_speed(train: Train, rows_per_rank: int, longest: int) -> list[tuple[int, float]]:
    """(rows, share of layers that recompute) that the recipe allows, the fastest first. With rows of 2,048 tokens: all sizes without
    recomputing, then all with a quarter of the layers, ...; with rows of 128, four with a quarter come before one with none.
    """
    sizes = candidates(rows_per_rank) if train.micro_batch == "auto" else [train.micro_batch]
    shares = SHARES if train.gradient_checkpointing == "auto" else [float(train.gradient_checkpointing)]
    return sorted(((rows, share) for share in shares for rows in sizes), key=lambda way: cost(way[0] * longest, way[1]))


def choose(
    train: Train,
    rows_per_rank: int,
    longest: int,
    device: torch.device,
    trial: Callable[[int, float], None],
    agree: Callable[[int], int],
    reserved: int = 0,
) -> tuple[Limit, float]:
    """(what goes through at once, share of layers that recompute) as the recipe says, or the fastest that fits where it says `auto`.

    `auto` limits tokens, not rows, so that short rows go through together. `trial(rows, share)` runs forward and backward on the
    longest rows; out of memory means it does not fit. It must not wait for other ranks, which may try another size at that moment;
    `agree` gives the smallest of all ranks' values.
    `reserved` bytes must stay free for what the trial does not hold yet: the optimiser's state.
    Raises ValueError if nothing fits.
    """
    auto, ways = train.micro_batch == "auto", by_speed(train, rows_per_rank, longest)
    if device.type == "cpu":
        share = min(share for _, share in ways)
        rows = rows_per_rank if auto else train.micro_batch
        return Limit(rows, max(longest, CPU_TOKENS) if auto else rows * longest), share
    place = 0 if len(ways) == 1 else _first_that_fits(ways, lambda rows, share: _fits(lambda: trial(rows, share), device, reserved), agree)
    if place == len(ways):
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        raise ValueError(
            f"one row of {longest} tokens does not fit into {total:.1f} GiB; lower data.max_length or adapter.rank, or use "
            "quantization: nf4"
        )
    rows, share = ways[place]
    return Limit(rows_per_rank if auto else rows, rows * longest), share


def as_noted(noted: Mapping[str, Any], train: Train) -> tuple[Limit, float]:
    """What a checkpoint knows of its run's micro-batches, and how many layers recompute: that changes no number and may be set anew."""
    share = noted["checkpointing"] if train.gradient_checkpointing == "auto" else train.gradient_checkpointing
    return Limit(rows=noted["rows"], tokens=noted["tokens"]), float(share)


def longest_batch(rows: Rows, num_rows: int, dpo: Dpo | None) -> Batch:
    """The longest rows, with every token supervised: no step on so many of these rows needs more memory."""
    return collate([rows[r] for r in rows.lengths.argsort()[::-1][:num_rows]], pad_id=0, all_supervised=True, dpo=dpo)


def try_step(net: nn.Module, base: nn.Module, share: float, loss: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """A trial for `choose`: forward and backward pass of a `loss`, where this share of the layers recomputes.

    Leaves no gradient. Before an engine wraps `net`: a rank that runs out of memory must not leave others waiting for its gradients,
    or for its weights.
    """
    set_checkpointing(base, share)
    try:
        with autocast(device, dtype):
            value = loss()
        value.backward()
    finally:
        net.zero_grad(set_to_none=True)


def _first_that_fits(ways: Sequence[tuple[int, float]], fits: Callable[[int, float], bool], agree: Callable[[int], int]) -> int:
    """Index of the first way that fits on every rank; `len(ways)` if none does."""
    least, known = min(rows for rows, _ in ways), {}

    def does(rows: int, share: float) -> bool:  # what a single row is too much for need not be tried with more
        if (rows, share) not in known:
            known[rows, share] = (rows == least or does(least, share)) and fits(rows, share)
        return known[rows, share]

    place = 0
    while True:
        mine = next((i for i in range(place, len(ways)) if does(*ways[i])), len(ways))
        place = -agree(-mine)  # the largest of all ranks' values
        if agree(mine) == place:
            return place


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


def smaller(limit: Limit, share: float, train: Train, micro: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Limit, float]:
    """What to try after `micro`, cut by `limit`, ran out of memory: half of it; with more layers recomputed, if a row went alone.

    Raises ValueError if nothing is left to try.
    """
    most = max(len(piece) for piece in micro)
    if most > 1:
        places = max(len(piece) * max(1 if row == EMPTY else int(lengths[row]) for row in piece) for piece in micro)
        return Limit(max(1, most // 2), max(1, min(limit.tokens, places) // 2)), share
    if share < 1 and train.gradient_checkpointing == "auto":
        return limit, next(more for more in SHARES if more > share)
    raise ValueError(
        f"a single row of up to {int(max(lengths)):,} tokens ran out of memory in a step; does another program use this device? Else lower "
        "data.max_length or adapter.rank, use quantization: nf4, or set train.gradient_checkpointing: true"
    )


def write_note(folder: Path, limit: Limit, share: float, hardware: dict[str, Any], processes: int, ended_attempt: int | None) -> None:
    """What a step has shown to fit at most, for the next start on the same hardware; `ended_attempt`: the one that it has ended."""
    found = {"limit": asdict(limit), "checkpointing": share, "hardware": hardware, "processes": processes}
    found["ended_attempt"] = ended_attempt
    write_json(folder / NOTE, found)


def ended_attempt(folder: Path) -> int | None:
    """The attempt that ended because of what the note says; None if there is no note, or the run went on by itself."""
    return read_json(folder / NOTE)["ended_attempt"] if (folder / NOTE).is_file() else None


def within_note(folder: Path, limit: Limit, share: float, hardware: dict[str, Any], processes: int) -> tuple[Limit, float]:
    """The limit, or what an earlier start on the same hardware has left of it. Raises ValueError if the note is damaged."""
    if not (folder / NOTE).is_file():
        return limit, share
    note = read_json(folder / NOTE)
    try:
        known = Limit(rows=int(note["limit"]["rows"]), tokens=int(note["limit"]["tokens"]))
        if (note["hardware"], note["processes"]) != (hardware, processes):
            return limit, share
        if not is_share(note["checkpointing"]):
            raise ValueError
        return Limit(min(limit.rows, known.rows), min(limit.tokens, known.tokens)), max(share, float(note["checkpointing"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / NOTE} is not what a run writes there; remove it") from None


def is_share(value: Any) -> bool:
    """Of the layers, as a file has it: from 0 to 1; before there were shares, true or false."""
    return type(value) in (bool, int, float) and 0 <= value <= 1


def in_words(share: float) -> str:
    """`off`, `on`, or `on in 25 % of the layers`."""
    return "off" if share == 0 else "on" if share == 1 else f"on in {100 * share:.3g} % of the layers"


def recomputing(num_layers: int, share: float) -> list[bool]:
    """Which layers recompute: this share of them, evenly spread, one at least if the share is not 0; the last of each group is kept,
    so that the backward pass has freed a layer's activations before it makes the first ones again.
    """
    kept = num_layers - math.ceil(round(num_layers * share, 6))  # 25 x 0.28 is a little more than 7
    return [(i + 1) * kept // num_layers == i * kept // num_layers for i in range(num_layers)]


def set_checkpointing(base: nn.Module, share: float) -> None:
    """Recompute the activations of this share of the layers in the backward pass, and keep the others'. Raises ValueError if the layers
    cannot do so one by one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if share == 0:
        base.activation_checkpointing_disable()
        return
    base.activation_checkpointing_enable({"use_reentrant": False})
    # That also asks for the gradient of the embedding's output, which only reentrant checkpointing needs: work for the first layer
    base.disable_input_require_grads()
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if share < 1 and not layers:
        raise ValueError(
            f"train.gradient_checkpointing: {share:g} needs layers that recompute one by one, which {type(base).__name__} has not; use "
            "true or false"
        )
    for layer, recomputes in zip(layers, recomputing(len(layers), share), strict=True):
        layer.gradient_checkpointing = recomputes
