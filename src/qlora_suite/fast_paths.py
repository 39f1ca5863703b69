"""Which of the faster ways of computing the same numbers a model takes: told by trial, on the model that is loaded.

    attention   each conversation by itself             packed_attention.py
    head        the loss a tile of tokens at a time     tiled_head.py
    lora        a linear layer and its LoRA at once     fused_lora.py
    copies      4-bit weights unpacked once             dequantized.py

One after another is turned on, and stays if the loss and the gradient of a small batch are those of the plain way. So a model that
does something of its own with its logits, or has an attention of its own, is trained as transformers and PEFT compute it.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_suite import compatibility, dequantized, fused_lora, packed_attention, tiled_head
from qlora_suite.engine import autocast
from qlora_suite.loss import collate, summed_loss
from qlora_suite.recipe import Speed

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the norm of the difference of two gradients to their norm: rounding is below a tenth of it, another function far above."""
OFF = "off"


@dataclass(frozen=True)
class FastPaths:
    """What each of them came to, in a few words: for run.json and the console."""

    attention: str
    head: str
    lora: str
    copies: str

    def __str__(self) -> str:
        return "; ".join(f"{name}: {what}" for name, what in vars(self).items())


def take(net: nn.Module, base: PreTrainedModel, speed: Speed, dtype: torch.dtype, longest: int, packed: bool, engine: str) -> FastPaths:
    """Change how `net` computes, before an engine wraps it. `base`: the model inside it; `engine`: in compatibility.py's words.

    `longest`: tokens of the longest row; `packed`: rows hold several conversations.
    Raises ValueError if copies of the weights are asked for and do not fit.
    """
    device = next(net.parameters()).device
    copies = _copies(net, speed, dtype, device, engine)
    plain = _trial(net, base, dtype, packed)

    def kept(stop_using: Callable[[], None], words: str) -> str:
        """`words`, if the model computes what it did; else it goes back to the plain way."""
        difference = _difference(plain, lambda: _trial(net, base, dtype, packed))
        if difference <= TOLERANCE[dtype]:
            return words
        stop_using()
        return f"{OFF}, for its results differ"

    attention = head = lora = OFF
    if speed.attention == "auto" and (words := packed_attention.use(base, dtype, longest)):
        attention = kept(lambda: packed_attention.stop_using(base), words)
    output = base.get_output_embeddings()
    # PEFT puts trained rows into a module within the head: ZeRO-3 lets go of its weights before the tiles' gradients are taken
    gone_too_soon = engine == compatibility.ZERO3 and any(True for _ in output.children())
    if speed.head == "auto" and not gone_too_soon:
        tiled_head.use(output, base.config.get_text_config().vocab_size)
        head = kept(lambda: tiled_head.stop_using(output), "tiled")
    if speed.lora == "auto" and engine != compatibility.ZERO3:  # which gathers the weights of one module at a time
        with fused_lora.Watched(net) as watched, torch.no_grad():
            _loss(net, base, dtype, packed)
            groups = watched.groups()
        if groups:
            fused_lora.use(net, groups)
            num_layers = sum(map(len, groups))
            lora = kept(lambda: fused_lora.stop_using(groups), f"{num_layers} layers in {len(groups)} operations")
    return FastPaths(attention, head, lora, copies)


def _copies(net: nn.Module, speed: Speed, dtype: torch.dtype, device: torch.device, engine: str) -> str:
    sharded = engine in (compatibility.ZERO3, compatibility.FSDP2)
    needed = dequantized.bytes_of_copies(net, dtype)
    if not needed or speed.dequantize_once is False or sharded:
        return OFF
    if speed.dequantize_once == "auto" and not dequantized.have_room(needed, device):
        return f"{OFF}, for they would take {needed / 2**30:.1f} GiB"
    try:
        return f"{dequantized.keep_copies(net, dtype) / 2**30:.2f} GiB"
    except torch.OutOfMemoryError:
        raise ValueError(
            f"speed.dequantize_once: true needs {needed / 2**30:.1f} GiB for the copies, which do not fit; use auto or false"
        ) from None


def _loss(net: nn.Module, base: PreTrainedModel, dtype: torch.dtype, packed: bool) -> Tensor:
    """Of two short rows, of which the first holds two conversations if rows may."""
    device, vocabulary = next(net.parameters()).device, base.config.get_text_config().vocab_size
    lengths = [[5, 6] if packed else [11], [9]]
    rows = [
        {
            "input_ids": torch.arange(1, sum(row) + 1) * 7919 % vocabulary,
            "supervised": torch.zeros(sum(row), dtype=torch.bool),
            "lengths": row,
        }
        for row in lengths
    ]
    with autocast(device, dtype):
        return summed_loss(net, collate(rows, pad_id=0, all_supervised=True).to(device))


def _trial(net: nn.Module, base: PreTrainedModel, dtype: torch.dtype, packed: bool) -> list[Tensor]:
    """The loss, and its gradient by trained tensor. Noise (dropout) is off."""
    was_training, trained = net.training, [p for p in net.parameters() if p.requires_grad]
    net.eval()
    try:
        loss = _loss(net, base, dtype, packed)
        return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]
    finally:
        net.train(was_training)


def _difference(plain: list[Tensor | None], again: Callable[[], list[Tensor | None]]) -> float:
    """Relative, the larger one of the loss's and the whole gradient's; infinite if the trial fails."""
    found = None
    with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):  # a model that cannot take what is given to it
        found = again()
    if found is None or any((a is None) != (b is None) for a, b in zip(plain, found, strict=True)):
        return float("inf")

    def norm(tensors: list[Tensor | None]) -> float:
        return float(torch.nn.utils.get_total_norm([t.float() for t in tensors if t is not None]))

    apart = [None if a is None else a.float() - b.float() for a, b in zip(plain, found, strict=True)]
    parts = [norm(apart[:1]) / max(norm(plain[:1]), 1e-30), norm(apart[1:]) / max(norm(plain[1:]), 1e-30)]
    return max(float("inf") if math.isnan(part) else part for part in parts)
