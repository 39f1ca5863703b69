"""The loss computed within the output head, a tile of supervised tokens at a time: the logits of a batch never exist as a whole.

    hidden [tokens, width] --- a tile ---> logits [tile, vocabulary] -> losses -> gradient of the tile's hidden states, at once

Phi-2, 2,048 tokens: logits in 16 bits, a copy in fp32 and its softmax are 51,200 x (2 + 4 + 4) bytes a token, 1 GB; a tile takes 160 MB.
The idea, gradients in the forward pass included, is that of Liger Kernel's fused linear cross-entropy (Hsu et al., 2024), which
computes with the head's weight itself. Here the head is called as it is, so that a bias, trained token rows, a tied weight or an
adapter on the head are in the loss; and as this happens within its forward pass, ZeRO-3 and FSDP2 have put its weights together.

Where the head itself is trained, its gradient is a sum over tokens, and can be taken at once only if all their losses count alike. Of
preferences they do not (a pair's margin decides, known when all its losses are): there a tile's logits are computed once more in the
backward pass.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_PER_TILE = 2**24
"""Logits that exist at a time: 64 MiB in fp32."""
FP16_SCALE = 128.0
"""In fp16 a token's gradient of less than 6e-8 would vanish; it is taken this much larger until the backward pass comes, whose own
scale is for what follows. Not where the head is trained: its weights' gradients are sums over tokens, and could overflow.
"""
TRAINED_TILE = 1024
"""Tokens over which these are summed in 16 bits, at most."""


@dataclass
class Question:
    """What `asked` puts to the head, and whether it has understood."""

    places: Tensor
    """[tokens] int64: which of the hidden states that the head gets, rows end to end, have to predict"""
    targets: Tensor
    """[tokens] int64: and what"""
    summed: bool
    temperature: float
    """By which logits are divided."""
    answered: bool = False


_question: ContextVar[Question | None] = ContextVar("question", default=None)


@contextlib.contextmanager
def asked(places: Tensor, targets: Tensor, summed: bool, temperature: float = 1.0) -> Iterator[Question]:
    """While it is open, a head that was given to `use` answers with losses where it would with logits: [1, 1, 1] their sum, or
    [1, tokens, 1] each of them.
    """
    question = Question(places, targets, summed, temperature)
    token = _question.set(question)
    try:
        yield question
    finally:
        _question.reset(token)


def use(head: nn.Module, vocabulary: int, at_once: bool = True) -> None:
    """Teach a head to answer. Without a question it gives logits, as before.

    `at_once`: may a trained head's gradient be taken within its forward pass, where all losses count alike? Else as in preferences.
    """
    plain, most = head.forward, max(1, LOGITS_PER_TILE // vocabulary)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        question = _question.get()
        if question is None:
            return plain(hidden, *args, **kwargs)
        question.answered, temperature = True, question.temperature
        logits_of = plain if temperature == 1 else lambda x: plain(x).float() / temperature
        tokens = hidden.flatten(0, -2).index_select(0, question.places)
        trained = [p for p in head.parameters() if p.requires_grad]
        tile = min(most, TRAINED_TILE) if trained and _computed_in(tokens) != torch.float32 else most
        if torch.is_grad_enabled() and (not trained or (at_once and question.summed)):
            losses = _Losses.apply(tokens, question.targets, logits_of, tile, *trained)
        else:
            losses = _losses(tokens, question.targets, logits_of, tile)
        return losses.sum()[None, None, None] if question.summed else losses[None, :, None]

    assert "forward" not in vars(head), "somebody else has changed this head's forward pass"
    head.forward = forward


def stop_using(head: nn.Module) -> None:
    del head.forward


def _computed_in(tokens: Tensor) -> torch.dtype:
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype


def _losses(tokens: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], tile: int) -> Tensor:
    """The loss of each token, in nats. [tokens] float32

    With gradients on, its graph keeps the hidden states alone: a tile's logits are computed again when their gradient is asked for.
    """

    def of_tile(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_of(x).float(), y, reduction="none")

    tiles = zip(tokens.split(tile), targets.split(tile), strict=True)
    return torch.cat([checkpoint(of_tile, x, y, use_reentrant=False) for x, y in tiles])


class _Losses(torch.autograd.Function):
    """The loss of each token, and in the same pass its gradient with respect to its hidden state and the head's trained weights.

    What a loss is multiplied by later on (1 / tokens of the step, or of a preference what the pair's margin says) its token's gradient is
    multiplied by in the backward pass, so that it need not wait for it. Where the head is trained, it must be the same number for all.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], tile: int, *trained: Tensor) -> Tensor:
        scale = FP16_SCALE if _computed_in(tokens) == torch.float16 and not trained else 1.0
        needs_tokens = ctx.needs_input_grad[0]  # not where the head alone is trained
        losses = torch.empty(len(tokens), device=tokens.device)
        of_tokens = torch.empty_like(tokens) if needs_tokens else None
        of_trained = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for start in range(0, len(tokens), tile):
            wanted = targets[start : start + tile, None]
            with torch.enable_grad():
                x = tokens[start : start + tile].detach().requires_grad_(needs_tokens)
                logits = logits_of(x)
            # a token's loss is log(sum of exp(logits)) - its target's logit; the gradient is the softmax, less 1 at the target
            values = logits.detach().float()
            largest = values.amax(dim=1, keepdim=True)
            exponentials = (values - largest).exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            losses[start : start + tile] = (sums.log() + largest - values.gather(1, wanted)).squeeze(1)
            of_logits = exponentials.mul_(scale / sums).scatter_add_(1, wanted, torch.full_like(sums, -scale)).to(logits.dtype)
            del values
            gradients = list(torch.autograd.grad(logits, [x, *trained] if needs_tokens else trained, of_logits))
            if needs_tokens:
                of_tokens[start : start + tile] = gradients.pop(0)
            for so_far, gradient in zip(of_trained, gradients, strict=True):
                so_far.add_(gradient)
        ctx.scale = scale
        ctx.save_for_backward(*([of_tokens] if needs_tokens else []), *of_trained)
        return losses

    @staticmethod
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        of_trained, factors = list(ctx.saved_tensors), factors / ctx.scale
        of_tokens = of_trained.pop(0) if ctx.needs_input_grad[0] else None
        if of_tokens is not None:
            of_tokens = (of_tokens * factors[:, None]).to(of_tokens.dtype)
        return of_tokens, None, None, None, *(gradient * factors[:1].sum() for gradient in of_trained)
