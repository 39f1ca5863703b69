"""The loss computed within the output head, a tile of supervised tokens at a time: the logits of a batch never exist as a whole.

    hidden [tokens, width] --- a tile ---> logits [tile, vocabulary] -> losses -> gradient of the tile's hidden states, at once

Phi-2, 2,048 tokens: logits in 16 bits, a copy in fp32 and its softmax are 51,200 x (2 + 4 + 4) bytes a token, 1 GB; a tile takes 160 MB.
The idea, gradients in the forward pass included, is that of Liger Kernel's fused linear cross-entropy (Hsu et al., 2024), which
computes with the head's weight itself. Here the head is called as it is, so that a bias, trained token rows, a tied weight or an
adapter on the head are in the loss; and as this happens within its forward pass, ZeRO-3 and FSDP2 have put its weights together.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_PER_TILE = 2**24
"""Logits that exist at a time: 64 MiB in fp32."""
FP16_SCALE = 128.0
"""In fp16 a token's gradient of less than 6e-8 would vanish within the head; it is taken this much larger, and made small again."""


@dataclass
class Question:
    """What `asked` puts to the head, and whether it has understood."""

    places: Tensor
    """[tokens] int64: which of the hidden states that the head gets, rows end to end, have to predict"""
    targets: Tensor
    """[tokens] int64: and what"""
    summed: bool
    answered: bool = False


_question: ContextVar[Question | None] = ContextVar("question", default=None)


@contextlib.contextmanager
def asked(places: Tensor, targets: Tensor, summed: bool) -> Iterator[Question]:
    """While it is open, a head that was given to `use` answers with losses where it would with logits: [1, 1, 1] their sum, with a
    graph, or [1, tokens, 1] each of them, without.
    """
    question = Question(places, targets, summed)
    token = _question.set(question)
    try:
        yield question
    finally:
        _question.reset(token)


def use(head: nn.Module, vocabulary: int) -> None:
    """Teach a head to answer. Without a question it gives logits, as before."""
    logits_of, tile = head.forward, max(1, LOGITS_PER_TILE // vocabulary)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        question = _question.get()
        if question is None:
            return logits_of(hidden, *args, **kwargs)
        question.answered = True
        tokens = hidden.flatten(0, -2).index_select(0, question.places)
        if not question.summed or not torch.is_grad_enabled():
            losses = _losses(tokens, question.targets, logits_of, tile)
            return losses.sum()[None, None, None] if question.summed else losses[None, :, None]
        trained = [p for p in head.parameters() if p.requires_grad]
        return _SummedLoss.apply(tokens, question.targets, logits_of, tile, *trained)[None, None, None]

    assert "forward" not in vars(head), "somebody else has changed this head's forward pass"
    head.forward = forward


def stop_using(head: nn.Module) -> None:
    del head.forward


def _losses(tokens: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], tile: int) -> Tensor:
    """The loss of each token, in nats. [tokens] float32"""
    tiles = zip(tokens.split(tile), targets.split(tile), strict=True)
    return torch.cat([nn.functional.cross_entropy(logits_of(x).float(), y, reduction="none") for x, y in tiles])


class _SummedLoss(torch.autograd.Function):
    """Their sum, and in the same pass its gradients with respect to the hidden states and the head's trained weights.

    A loss is multiplied by the same number for all tokens later on, so that the gradients need not wait for it.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], tile: int, *trained: Tensor) -> Tensor:
        in_fp16 = torch.get_autocast_dtype(tokens.device.type) if torch.is_autocast_enabled(tokens.device.type) else tokens.dtype
        scale = FP16_SCALE if in_fp16 == torch.float16 else 1.0
        needs_tokens = ctx.needs_input_grad[0]  # not where the head alone is trained
        total = torch.zeros((), device=tokens.device)
        of_tokens = torch.empty_like(tokens) if needs_tokens else None
        of_trained = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for start in range(0, len(tokens), tile):
            with torch.enable_grad():
                x = tokens[start : start + tile].detach().requires_grad_(needs_tokens)
                loss = nn.functional.cross_entropy(logits_of(x).float(), targets[start : start + tile], reduction="sum")
                gradients = list(torch.autograd.grad(loss * scale, [x, *trained] if needs_tokens else trained))
            total += loss.detach()
            if needs_tokens:
                of_tokens[start : start + tile] = gradients.pop(0) / scale
            for so_far, gradient in zip(of_trained, gradients, strict=True):
                so_far.add_(gradient, alpha=1 / scale)
        ctx.save_for_backward(*([of_tokens] if needs_tokens else []), *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * factor for gradient in ctx.saved_tensors]
        of_tokens = gradients.pop(0) if ctx.needs_input_grad[0] else None
        return of_tokens, None, None, None, *gradients
