"""Packing loses nothing, and conversations that share a row do not know of each other."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, VOCABULARY, tiny
from transformers import PreTrainedModel

from qlora_suite import dataset
from qlora_suite.chat import Renderer
from qlora_suite.loss import check_separates_packed_rows, collate, forward
from qlora_suite.packing import pack
from qlora_suite.preparation import prepare, trimmed
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load
from qlora_suite.rendered import shorten
from qlora_suite.role_markers import RoleMarkers
from qlora_suite.selection import selected

# --- the arithmetic


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_example_stands_in_exactly_one_row(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < places <= 64 for places in sums)
    # No two rows could have been one: never more rows than examples, and at least half of all places are used.
    assert all(a + b > 64 for a, b in combinations(sums, 2))
    assert pack(lengths, 64) == rows


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7))
def test_rows_are_nearly_as_few_as_possible(lengths: list[int]) -> None:
    def fewest(rest: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not rest:
            return len(rooms)
        options = {tuple(sorted((*rooms[:i], room - rest[0], *rooms[i + 1 :]))) for i, room in enumerate(rooms) if room >= rest[0]}
        return min(fewest(rest[1:], option) for option in {*options, tuple(sorted((*rooms, 20 - rest[0])))})

    assert len(pack(lengths, 20)) <= 11 / 9 * fewest(tuple(sorted(lengths, reverse=True)), ()) + 6 / 9


def test_the_drawn_rows() -> None:
    assert pack([7, 5, 4, 3, 2, 2], 8) == [[0], [1, 3], [2, 4, 5]]


def test_rows_are_no_more_than_first_fit_needs_on_real_lengths(messages: list[dict[str, Any]]) -> None:
    lengths = [min(512, 1 + len(m["text"]) // 4) for m in messages]
    rooms: list[int] = []
    for length in lengths:
        place = next((i for i, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(512 - length)
        else:
            rooms[place] -= length
    assert len(pack(lengths, 512)) <= len(rooms)


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_no_row_can_hold_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens; a row holds 1 to 8"):
        pack([3, length], 8)


# --- the model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def packed_row(*lengths: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "supervised": torch.zeros(len(ids), dtype=torch.bool), "lengths": list(lengths)}


ROWS = [packed_row(9, 13, 4, seed=1), packed_row(17, seed=2), packed_row(1, 2, 3, 4, 5, seed=3)]


def separate(model: PreTrainedModel, row: dict[str, Any]) -> list[torch.Tensor]:
    """The logits of each conversation of a row in a forward pass of its own."""
    return [model(input_ids=piece[None]).logits[0] for piece in row["input_ids"].split(row["lengths"])]


def of_row(logits: torch.Tensor, row: dict[str, Any]) -> torch.Tensor:
    return logits[: len(row["input_ids"])]


@torch.no_grad()
def test_packed_logits_equal_separate_logits(model: PreTrainedModel) -> None:
    """With several rows of unequal length and padding, by the one call that training and evaluation make."""
    batch = collate(ROWS, pad_id=0)
    logits = forward(model, batch, torch.arange(batch.input_ids.shape[1]))
    for row, found in zip(ROWS, logits, strict=True):
        torch.testing.assert_close(of_row(found, row), torch.cat(separate(model, row)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("trap", ["all-ones mask", "cache", "running positions"])
def test_the_trap_is_real(model: PreTrainedModel, trap: str) -> None:
    """What `forward` avoids lets packed conversations read each other without a word."""
    batch = collate(ROWS[:1], pad_id=0)
    settings_of = {
        "all-ones mask": {"attention_mask": torch.ones_like(batch.input_ids), "use_cache": False, "position_ids": batch.position_ids},
        "cache": {"use_cache": True, "position_ids": batch.position_ids},
        "running positions": {"use_cache": False},
    }
    leaking = model(input_ids=batch.input_ids, **settings_of[trap]).logits[0]
    assert (leaking - torch.cat(separate(model, ROWS[0]))).abs().max() > 1e-2


def test_a_model_that_separates_passes_the_guard(model: PreTrainedModel) -> None:
    model.train()
    check_separates_packed_rows(model)
    assert model.training, "it leaves the mode as it was"
    model.eval()


@pytest.mark.parametrize("injected", ["attention_mask", "use_cache"])
def test_a_model_that_leaks_is_refused(monkeypatch: pytest.MonkeyPatch, injected: str) -> None:
    model = tiny()
    plain = model.forward

    def leaking(input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **kwargs: Any) -> Any:
        kwargs[injected] = torch.ones_like(input_ids) if injected == "attention_mask" else True
        return plain(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(model, "forward", leaking)
    with pytest.raises(ValueError, match=r"lets packed conversations read each other .* set data\.packing: false"):
        check_separates_packed_rows(model)


def test_a_model_whose_head_cannot_be_asked_for_some_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model, "forward", lambda input_ids, position_ids: None)
    with pytest.raises(ValueError, match="does not take logits_to_keep"):
        check_separates_packed_rows(model)


# --- the rows on disk


@pytest.fixture
def prepared(make_recipe: MakeRecipe) -> tuple[Recipe, dict[str, Any]]:
    recipe = load(make_recipe())
    with selected(recipe) as selection:
        manifest, _ = prepare(recipe, selection)
    return recipe, manifest


def test_every_token_of_every_kept_conversation_is_on_disk_once(prepared: tuple[Recipe, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    from qlora_suite.selection import Counts

    recipe, manifest = prepared
    folder = Path(recipe.data.prepared)
    markers = RoleMarkers.from_json(manifest["role_markers"])
    renderer = Renderer(AutoTokenizer.from_pretrained(folder / "tokenizer"), recipe.chat, markers)
    with selected(recipe) as selection:
        conversations = {split: list(found) for split, found in selection.splits.items()}
    for split in ("train", "dev"):
        rows = dataset.Rows(folder / f"{split}.arrow")
        found = []
        for i in range(len(rows)):
            row, start = rows[i], 0
            assert len(row["input_ids"]) == sum(row["lengths"]) <= recipe.data.max_length
            for key, length in zip(rows.examples(i), row["lengths"], strict=True):
                piece = slice(start, start + length)
                found.append((key, row["input_ids"][piece].tolist(), row["supervised"][piece].tolist()))
                start += length
        expected = []
        for conversation in trimmed(conversations[split], Counts()):
            for piece in shorten(renderer.render(conversation), recipe.data.max_length, recipe.data.too_long).pieces:
                expected.append((conversation.key, piece.ids, piece.supervised))
        assert sorted(found) == sorted(expected)
        counts = manifest["counts"][split]
        tokens = sum(len(ids) for _, ids, _ in found)
        assert counts["tokens"] == tokens == rows.lengths.sum()
        assert counts["supervised"] == sum(sum(flags) for *_, flags in found) == rows.num_supervised.sum()
        assert counts["padding_share"] == pytest.approx(1 - tokens / (len(rows) * recipe.data.max_length))
    assert 0 < manifest["counts"]["train"]["padding_share"] < 0.1
