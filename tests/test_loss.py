"""The loss is a sum over supervised tokens, whatever the rows are batched with."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny
from transformers import PreTrainedModel

from qlora_suite import loss
from qlora_suite.batches import Limit, micro_batches
from qlora_suite.loss import collate, summed_loss, token_losses


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


def random_row(*lengths: int, seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    supervised = torch.rand(sum(lengths), generator=random) < 0.5
    supervised[[0, *itertools.accumulate(lengths)][:-1]] = False
    return {
        "input_ids": torch.randint(0, VOCABULARY, (sum(lengths),), generator=random),
        "supervised": supervised,
        "lengths": list(lengths),
    }


ROWS = [random_row(5, 9, seed=0), random_row(20, seed=1), random_row(3, seed=2), random_row(2, 7, 4, seed=3), random_row(12, 1, seed=4)]


def by_hand(model: PreTrainedModel, row: dict[str, Any]) -> list[float]:
    """Token losses of a row, each conversation by itself, from the full logits."""
    losses = []
    for ids, flags in zip(row["input_ids"].split(row["lengths"]), row["supervised"].split(row["lengths"]), strict=True):
        log_probabilities = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        losses += [-log_probabilities[t - 1, ids[t]].item() for t in range(1, len(ids)) if flags[t]]
    return losses


@torch.no_grad()
def test_losses_are_those_of_a_hand_computation_in_row_major_order(model: PreTrainedModel) -> None:
    expected = [value for row in ROWS for value in by_hand(model, row)]
    batch = collate(ROWS, pad_id=0)
    assert token_losses(model, batch).tolist() == pytest.approx(expected, abs=1e-5)
    assert summed_loss(model, batch).item() == pytest.approx(sum(expected), rel=1e-6)
    assert len(expected) == len(batch.targets)


@pytest.mark.parametrize("rows", [[None], [None, None], [{**ROWS[1], "supervised": torch.zeros(20, dtype=torch.bool)}, None]])
def test_a_batch_without_supervised_tokens_gives_zero_with_a_graph(rows: list[Any]) -> None:
    model = tiny()
    total = summed_loss(model, collate(rows, pad_id=0))
    assert total.item() == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters()), "engines wait for a gradient from every rank"


def test_an_empty_row_adds_nothing(model: PreTrainedModel) -> None:
    with torch.no_grad():
        alone, beside = (summed_loss(model, collate(rows, pad_id=0)).item() for rows in (ROWS[:1], [ROWS[0], None]))
    assert alone == pytest.approx(beside, rel=1e-6)


def test_the_picture_in_the_docstring_is_what_comes_out() -> None:
    lines = (loss.__doc__ or "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    input_ids"))
    columns = [[line[18:33].split(), line[52:67].split()] for line in lines[start : start + 2]]
    flags = [line[18:33].split() for line in lines[start + 2 : start + 4]]
    letters = [[ord(c) if c != "." else 0 for c in ids] for ids, _ in columns]
    rows = [
        {"input_ids": torch.tensor(ids[:used]), "supervised": torch.tensor([f == "+" for f in flag[:used]]), "lengths": lengths}
        for ids, flag, used, lengths in zip(letters, flags, (8, 5), ([5, 3], [5]), strict=True)
    ]
    batch = collate(rows, pad_id=0)
    assert batch.input_ids.tolist() == letters
    assert batch.position_ids.tolist() == [[int(p) for p in positions] for _, positions in columns]
    predicted = [(int(i) // len(batch.columns), int(batch.columns[int(i) % len(batch.columns)]) + 1) for i in batch.predicting]
    assert predicted == [(row, place) for row, flag in enumerate(flags) for place, f in enumerate(flag) if f == "+"]
    assert batch.targets.tolist() == [letters[row][place] for row, place in predicted]


def test_the_first_token_of_a_conversation_cannot_be_supervised() -> None:
    row = random_row(3, 4, seed=0)
    row["supervised"][3] = True
    with pytest.raises(AssertionError, match="first token of a conversation"):
        collate([row], pad_id=0)


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(len(ROWS))), st.integers(1, 5), st.integers(1, 60), st.integers(1, 3))
def test_the_sum_does_not_depend_on_how_rows_are_batched(order: list[int], rows: int, tokens: int, world: int) -> None:
    model = tiny()
    lengths = [len(row["input_ids"]) for row in ROWS]
    num_tokens = sum(int(row["supervised"].sum()) for row in ROWS)
    ordered = sorted(order, key=lambda i: -lengths[i])
    step = ordered + [-1] * (-len(ordered) % world)
    with torch.no_grad():
        whole = summed_loss(model, collate(ROWS, pad_id=0)).item() / num_tokens
        parts = sum(
            summed_loss(model, collate([ROWS[i] if i >= 0 else None for i in micro], pad_id=0)).item()
            for rank in range(world)
            for micro in micro_batches(step, lengths, Limit(rows, tokens), rank, world)
        )
    assert parts / num_tokens == pytest.approx(whole, rel=1e-6)


@torch.no_grad()
def test_a_mean_of_means_would_depend_on_the_batching(model: PreTrainedModel) -> None:
    """The most widely copied mistake, shown to be one on the same rows."""

    def mean_of_means(size: int) -> float:
        losses = [token_losses(model, collate(ROWS[i : i + size], pad_id=0)) for i in range(0, len(ROWS), size)]
        return torch.stack([part.mean() for part in losses]).mean().item()

    assert abs(mean_of_means(1) - mean_of_means(5)) > 1e-2
