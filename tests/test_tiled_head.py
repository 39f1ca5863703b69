"""The tiled head with a factor for each token's loss, as of preferences: exact where the head is trained as well, and no logits kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_suite import tiled_head
from qlora_suite.adapter import add_adapter
from qlora_suite.recipe import Adapter

TOKENS, PLACES, WIDTH = 50, 70, 64
TRAINED = ("nothing", "rows", "all")


def head_of(trained: str) -> nn.Module:
    """Phi's, which has a bias: frozen, with two trained token rows as PEFT adds them, or trained as a whole."""
    base = tiny("phi")
    if trained == "rows":
        add_adapter(base, Adapter(rank=4), (3, 9), train_head_rows=True)
    else:
        base.requires_grad_(trained == "all")
    return base.get_output_embeddings()


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden states [1, PLACES, width], which of them predict, what, and a factor for each loss)"""
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(PLACES, generator=generator)[:TOKENS].sort().values
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[:4] = torch.tensor([3, 9, 3, 9])
    hidden = torch.randn(1, PLACES, WIDTH, generator=generator).requires_grad_()
    return hidden, places, targets, torch.randn(TOKENS, generator=generator)


def plain_losses(head: nn.Module, hidden: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden).flatten(0, 1).index_select(0, places)
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def tiled_losses(head: nn.Module, hidden: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    with tiled_head.asked(places, targets, summed=False) as question:
        found = head(hidden).flatten()
    assert question.answered
    return found


def gradients(head: nn.Module, losses: Tensor, hidden: Tensor, factors: Tensor) -> list[Tensor]:
    trained = [p for p in head.parameters() if p.requires_grad]
    return list(torch.autograd.grad((losses * factors).sum(), [hidden, *trained]))


@pytest.mark.parametrize("tile", [1, 7, TOKENS, 10**6])
@pytest.mark.parametrize("trained", TRAINED)
def test_losses_and_gradients_are_the_plain_ones_whatever_each_loss_is_multiplied_by(
    trained: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_head, "LOGITS_PER_TILE", tile * VOCABULARY)
    head, (hidden, places, targets, factors) = head_of(trained), given()
    plain = plain_losses(head, hidden, places, targets)
    expected = gradients(head, plain, hidden, factors)
    tiled_head.use(head, VOCABULARY)
    losses = tiled_losses(head, hidden, places, targets)
    torch.testing.assert_close(losses, plain, atol=1e-6, rtol=1e-6)
    found = gradients(head, losses, hidden, factors)
    assert len(found) == len(expected) == {"nothing": 1, "rows": 2, "all": 3}[trained]
    for ours, its in zip(found, expected, strict=True):
        assert its.abs().max() > 0
        torch.testing.assert_close(ours, its, atol=1e-6 * float(its.abs().max()), rtol=1e-6)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_they_are_as_close_as_rounding_lets_them(trained: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_head, "LOGITS_PER_TILE", 8 * VOCABULARY)
    head, (hidden, places, targets, factors) = head_of(trained), given()
    expected = gradients(head, plain_losses(head, hidden, places, targets), hidden, factors)
    tiled_head.use(head, VOCABULARY)
    with torch.autocast("cpu", dtype):
        losses = tiled_losses(head, hidden, places, targets)
    for ours, its in zip(gradients(head, losses, hidden, factors), expected, strict=True):
        assert (ours - its).norm() <= 2e-2 * its.norm()


def rows_of_logits(found: Any) -> int:
    """Of one tensor or several: the most rows of one that is as wide as the vocabulary and not the head's weight."""
    tensors = [t for t in (found if isinstance(found, tuple | list) else [found]) if isinstance(t, Tensor) and t.ndim > 1]
    return max((t.shape[:-1].numel() for t in tensors if t.shape[-1] == VOCABULARY and t.shape[-2] != WIDTH), default=0)


class Computed(TorchDispatchMode):
    """The most rows of logits that any operation gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.most = max(self.most, rows_of_logits(found))
        return found


@pytest.mark.parametrize("trained", TRAINED)
def test_no_more_logits_than_a_tile_exist_at_a_time_and_none_are_kept(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain way keeps those of all tokens between the forward and the backward pass."""
    monkeypatch.setattr(tiled_head, "LOGITS_PER_TILE", 8 * VOCABULARY)
    head, (hidden, places, targets, factors) = head_of(trained), given()

    def seen(losses_of: Callable[..., Tensor]) -> tuple[int, int]:
        kept: list[int] = []
        with Computed() as computed:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(rows_of_logits(t)), t)[1], lambda t: t):
                losses = losses_of(head, hidden, places, targets)
            gradients(head, losses, hidden, factors)
        return computed.most, max(kept)

    assert min(seen(plain_losses)) >= TOKENS
    tiled_head.use(head, VOCABULARY)
    assert seen(tiled_losses) == (8, 0)


@pytest.mark.parametrize("trained", TRAINED)
def test_a_temperature_divides_the_logits_of_every_tile(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, places, targets, factors = given()
    head = head_of(trained)
    logits = head(hidden).flatten(0, 1).index_select(0, places)
    expected = nn.functional.cross_entropy(logits / 0.7, targets, reduction="none")
    wanted = gradients(head, expected, hidden, factors)
    monkeypatch.setattr(tiled_head, "LOGITS_PER_TILE", 7 * VOCABULARY)
    tiled_head.use(head, VOCABULARY)
    with tiled_head.asked(places, targets, summed=False, temperature=0.7) as question:
        found = head(hidden).flatten()
    assert question.answered
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(head, found, hidden, factors), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
