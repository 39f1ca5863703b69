"""Packing loses nothing. (That conversations in a row do not know of each other: faults/test_leaking_attention.py.)"""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_suite import dataset
from qlora_suite.chat import Renderer
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


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 64).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=120))))
def test_rows_are_those_that_placing_one_after_another_gives(drawn: tuple[int, list[int]]) -> None:
    """Conversations of one length are placed together; that must not show."""
    room, lengths = drawn
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row in range(len(rows)) if left[row] >= lengths[index]]
        if not fitting:
            rows.append([])
            left.append(room)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: (left[row], row))
        rows[row].append(index)
        left[row] -= lengths[index]
    assert pack(lengths, room) == rows


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
