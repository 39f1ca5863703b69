"""Any pieces, any machine: every token is written once, stands in one place of one batch, and comes once an epoch."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_suite import dataset, preparation
from qlora_suite.batches import EMPTY, Limit, Order, micro_batches
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.loss import collate
from qlora_suite.pieces import Pieces
from qlora_suite.preparation import write_rows
from qlora_suite.selection import Counts

LENGTH = 24
quick = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def pieces(draw: st.DrawFn) -> tuple[str, list[int], list[bool]]:
    """(key, ids, flags), at least one flag and never the first."""
    length = draw(st.integers(2, LENGTH))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))
    flags = [False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))]
    flags[draw(st.integers(1, length - 1))] = True
    return draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), ids, flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@quick
@given(st.lists(pieces(), min_size=1, max_size=30), st.booleans())
def test_every_token_is_written_once_and_read_back_as_it_was(folder: Path, given_pieces: list[Any], packing: bool) -> None:
    counts = Counts()
    with Pieces(folder) as found:
        for key, ids, flags in given_pieces:
            found.add(key, ids, flags)
        write_rows(folder / "train.arrow", found, SimpleNamespace(packing=packing, max_length=LENGTH), counts)
    rows = dataset.Rows(folder / "train.arrow")
    assert sum(1 for _ in rows.check()) == 1
    assert counts.rows == len(rows) <= len(given_pieces)
    read = []
    for number in range(len(rows)):
        row, start = rows[number], 0
        assert len(row["input_ids"]) == len(row["supervised"]) == sum(row["lengths"]) == rows.lengths[number] <= LENGTH
        assert packing or len(row["lengths"]) == 1
        assert rows.num_supervised[number] == row["supervised"].sum() > 0
        for key, length in zip(rows.examples(number), row["lengths"], strict=True):
            read.append((key, row["input_ids"][start : start + length].tolist(), row["supervised"][start : start + length].tolist()))
            start += length
    assert sorted(read) == sorted(given_pieces)

    batch = collate([rows[number] for number in range(len(rows))], pad_id=7)
    assert len(batch.targets) == sum(sum(flags) for *_, flags in given_pieces)
    for number in range(len(rows)):
        expected = [place for length in rows[number]["lengths"] for place in range(length)]
        padding = batch.input_ids.shape[1] - len(expected)
        assert batch.position_ids[number].tolist() == [*expected, *range(padding)], "positions start again with each conversation"
        assert batch.input_ids[number, len(expected) :].tolist() == [7] * padding


@quick
@given(st.lists(st.tuples(pieces(), pieces()), min_size=1, max_size=12), st.integers(1, 5))
def test_a_row_of_pairs_is_the_two_halves_of_one(folder: Path, given_pairs: list[Any], at_once: int) -> None:
    counts = Counts()
    with Pieces(folder) as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "ROWS_AT_ONCE", at_once)
        for (key, *chosen), (_, *rejected) in given_pairs:
            found.add(key, *chosen)
            found.add(key, *rejected)
        write_rows(folder / "train.arrow", found, SimpleNamespace(packing=False, max_length=LENGTH), counts, pairs=True)
    rows = dataset.Rows(folder / "train.arrow")
    assert sum(1 for _ in rows.check()) == -(-len(given_pairs) // at_once)
    assert counts.rows == len(rows) == len(given_pairs)
    for number, ((key, *chosen), (_, *rejected)) in enumerate(given_pairs):
        row = rows[number]
        assert rows.examples(number) == [key, key]
        assert row["lengths"] == [len(chosen[0]), len(rejected[0])]
        assert [row["input_ids"].tolist(), row["supervised"].tolist()] == [a + b for a, b in zip(chosen, rejected, strict=True)]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
turns = st.builds(Turn, st.sampled_from(["system", "user", "assistant", "tool"]), texts, st.booleans())
conversations = st.builds(
    Conversation,
    texts,
    st.lists(texts, max_size=3).map(tuple),
    texts,
    st.lists(turns, max_size=4).map(tuple),
    st.none() | texts,
    st.none() | texts,
)


@quick
@given(st.lists(conversations, max_size=12), st.integers(1, 5))
def test_conversations_are_read_back_as_they_were(folder: Path, found: list[Conversation], chunk: int) -> None:
    path = folder / "validation.arrow"
    dataset.write_table(path, map(dataset.conversation_record, found), dataset.CONVERSATIONS, chunk)
    assert dataset.read_conversations(path) == found


@quick
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 3), st.booleans(), st.data())
def test_each_row_comes_once_an_epoch_however_often_the_machine_changes(
    lengths: list[int], per_rank: int, epochs: int, grouped: bool, data: st.DataObject
) -> None:
    """A run that is stopped at any steps, and goes on with another number of processes and another micro-batch each time."""
    worlds = [world for world in range(1, 5) if (per_rank * 12) % world == 0]
    rows_per_step = per_rank * 12
    seen: Counter[int] = Counter()
    step, at_steps = 0, []
    while True:
        order = Order(11, lengths, rows_per_step, epochs, group_by_length=grouped)  # nothing is carried over but the step
        if step == order.num_steps:
            break
        world, limit = data.draw(st.sampled_from(worlds)), Limit(data.draw(st.integers(1, 8)), data.draw(st.integers(1, 900)))
        for _ in range(data.draw(st.integers(1, order.num_steps - step))):
            shares = [
                [row for micro in micro_batches(order.rows_for_step(step), lengths, limit, rank, world) for row in micro if row != EMPTY]
                for rank in range(world)
            ]
            of_step = Counter(row for share in shares for row in share)
            assert of_step == Counter(row for row in order.rows_for_step(step) if row != EMPTY), "ranks share the step out"
            if rows_per_step <= len(lengths):
                epochs_of_step = {(step * rows_per_step + i) // len(lengths) for i in range(rows_per_step)}
                assert max(of_step.values()) <= len(epochs_of_step), "no row twice within an epoch, and so on one rank alone"
            seen += of_step
            at_steps.append(step)
            step += 1
    assert at_steps == list(range(len(at_steps)))
    assert seen == dict.fromkeys(range(len(lengths)), epochs)
