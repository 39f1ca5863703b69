"""Which of the faster ways of computing the same numbers a model takes: told by trial, on the model that is loaded.

    attention   each conversation by itself             packed_attention.py
    head        the loss a tile of tokens at a time     tiled_head.py
    lora        a linear layer and its LoRA at once     fused_lora.py
    copies      4-bit weights unpacked once             dequantized.py

The first three are turned on one after another, and stay if the loss and the gradient of a small batch are those of the plain way. So a
model that does something of its own with its logits, or has an attention of its own, is trained as transformers and PEFT compute it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_suite import compatibility, dequantized, fused_lora, packed_attention, tiled_head
from qlora_suite.engine import autocast
from qlora_suite.loss import collate, summed_loss
from qlora_suite.recipe import Speed

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the norm of the difference of two gradients to their norm: rounding is below it, another function far above."""
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the loss, which is all there is of a model that is only scored."""
SMALL = 1e-2
"""A tensor whose gradient is smaller than this share of the largest is measured against that: of it little but rounding is left."""
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


def take_to_score(net: nn.Module, speed: Speed, dtype: torch.dtype, longest: int) -> FastPaths:
    """`take` for a model of which only losses are asked, on one process; nothing of it is trained any more. It keeps no copies of weights:
    each is unpacked once for all the rows of a batch, which are many.
    """
    return _take_frozen(net, speed, dtype, longest, copies=False)


def take_to_answer(net: nn.Module, speed: Speed, dtype: torch.dtype, longest: int) -> FastPaths:
    """`take` for a model that answers, on one process; nothing of it is trained any more. Of a few rows each token would unpack the weights
    anew: it keeps copies where there is room, unless `speed.dequantize_once` is false (true, which is for training, is taken as auto).
    """
    return _take_frozen(net, speed, dtype, longest, copies="auto" if speed.dequantize_once else False)


def _take_frozen(net: nn.Module, speed: Speed, dtype: torch.dtype, longest: int, copies: Literal["auto", False]) -> FastPaths:
    net.requires_grad_(False)  # or the trial would take the gradient of every weight that a base holds
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    speed = speed.model_copy(update={"dequantize_once": copies, "compile": False})
    return take(net, base, speed, dtype, longest, packed=False, engine=compatibility.ONE)


def take(net: nn.Module, base: PreTrainedModel, speed: Speed, dtype: torch.dtype, longest: int, packed: bool, engine: str) -> FastPaths:
    """Change how `net` computes, before an engine wraps it. `base`: the model inside it; `engine`: in compatibility.py's words.

    `longest`: tokens of the longest row; `packed`: rows hold several conversations.
    Raises ValueError if copies of the weights are asked for and do not fit.
    """
    copies = _copies(net, speed, dtype, engine)
    with _lora_b_away_from_zero(net):
        plain = _trial(net, base, dtype, packed)

        def kept(stop_using: Callable[[], None], words: str) -> str:
            """`words`, if the model computes what it did; else it goes back to the plain way."""
            try:
                differs = _differs(plain, _trial(net, base, dtype, packed), dtype)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:  # it cannot take what is given to it
                differs = f"it fails here ({str(error).splitlines()[0][:80]})"
            if differs:
                stop_using()
            return f"{OFF}, for {differs}" if differs else words

        attention = head = lora = OFF
        if speed.attention == "auto":
            # a mask is the second choice, where there is no kernel or it fails
            for by_itself in (True, False) if packed_attention.has_kernel(next(net.parameters()).device, dtype) else (False,):
                if attention.startswith(OFF) and (words := packed_attention.use(base, longest, by_itself)):
                    attention = kept(lambda: packed_attention.stop_using(base), words)
        output = base.get_output_embeddings()
        if speed.head == "auto":
            # PEFT puts trained rows into a module within the head: ZeRO-3 lets go of its weights before the tiles' gradients are taken
            gone_too_soon = engine == compatibility.ZERO3 and any(True for _ in output.children())
            tiled_head.use(output, base.config.get_text_config().vocab_size, at_once=not gone_too_soon)
            head = kept(lambda: tiled_head.stop_using(output), "tiled")
        if speed.lora == "auto" and engine != compatibility.ZERO3:  # which gathers the weights of one module at a time
            with fused_lora.Watched(net) as watched, torch.no_grad():
                _loss(net, base, dtype, packed)
                groups = watched.groups()
            if speed.compile:  # what a layer puts aside for another cannot be compiled where layers recompute
                groups = [[layer] for group in groups for layer in group]
            if groups:
                words = f"{sum(map(len, groups))} layers in {len(groups)} operations"
                lora = kept(fused_lora.use(net, groups), words)
    return FastPaths(attention, head, lora, copies)


def _copies(net: nn.Module, speed: Speed, dtype: torch.dtype, engine: str) -> str:
    needed, device = dequantized.bytes_of_copies(net, dtype), next(net.parameters()).device
    sharded = engine in (compatibility.ZERO3, compatibility.FSDP2)
    if not needed or speed.dequantize_once is False or sharded:
        return OFF
    too_much = f"{OFF}, for they would take {needed / 2**30:.1f} GiB"
    if speed.dequantize_once == "auto" and not dequantized.have_room(needed, device):
        return too_much
    try:
        return f"{dequantized.keep_copies(net, dtype) / 2**30:.2f} GiB"
    except torch.OutOfMemoryError:
        dequantized.drop_copies(net)
        if speed.dequantize_once == "auto":
            return too_much
    raise ValueError(f"speed.dequantize_once: true needs {needed / 2**30:.1f} GiB for the copies, which do not fit; use auto or false")


@contextlib.contextmanager
def _lora_b_away_from_zero(net: nn.Module) -> Iterator[None]:
    """At zero, where it starts, lora_A has no gradient, and half of LoRA could be anything."""
    before = {p: p.detach().clone() for name, p in net.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for p in before:
            p.copy_(0.02 * torch.arange(p.numel(), dtype=torch.float32).sin().view_as(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in before.items():
                p.copy_(value)


def _loss(net: nn.Module, base: PreTrainedModel, dtype: torch.dtype, packed: bool) -> Tensor:
    """Of two short rows, of which the first holds two conversations if rows may. Tokens whose rows are trained are among them."""
    device, vocabulary = next(net.parameters()).device, base.config.get_text_config().vocab_size
    trained = {i for m in net.modules() if isinstance(m, TrainableTokensLayer) for ids in m.token_indices.values() for i in ids}
    some = sorted(trained)[:4]
    rows = []
    for lengths in ([5, 6] if packed else [11], [9]):
        ids = torch.arange(1, sum(lengths) + 1) * 7919 % vocabulary
        ids[1 : 1 + len(some)] = torch.tensor(some, dtype=torch.int64)
        rows.append({"input_ids": ids, "supervised": torch.zeros(len(ids), dtype=torch.bool), "lengths": lengths})
    with autocast(device, dtype):
        return summed_loss(net, collate(rows, pad_id=0, all_supervised=True).to(device))


def _trial(net: nn.Module, base: PreTrainedModel, dtype: torch.dtype, packed: bool) -> list[Tensor | None]:
    """The loss, and its gradient by trained tensor (there may be none), on the CPU. Noise (dropout) is off."""
    was_training, trained = net.training, [p for p in net.parameters() if p.requires_grad]
    net.eval()
    try:
        with torch.set_grad_enabled(bool(trained)):  # as a model that is scored will be asked
            loss = _loss(net, base, dtype, packed)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
        return [loss.detach().cpu(), *(None if g is None else g.float().cpu() for g in gradients)]
    finally:
        net.train(was_training)


def _differs(plain: list[Tensor | None], found: list[Tensor | None], dtype: torch.dtype) -> str:
    """Why the two are not of one function; nothing if they are. The loss first, then each gradient against its own size."""
    largest = max((float(g.norm()) for g in plain[1:] if g is not None), default=0.0)
    for i, (a, b) in enumerate(zip(plain, found, strict=True)):
        if (a is None) != (b is None):
            return "its results differ"
        size = max(float(a.norm()), SMALL * largest if i else 0.0) if a is not None else 0.0
        apart = float((a - b).norm()) if a is not None else 0.0
        if math.isnan(apart) or apart > (TOLERANCE if i else LOSS_TOLERANCE)[dtype] * size:
            return "its results differ"
    return ""
