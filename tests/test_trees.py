"""Trees that are found on the disk are those that are found in memory: any forest, in any order, damaged in any way."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OASST1
from hypothesis import given, settings
from hypothesis import strategies as st
from test_oasst1_properties import POLICIES, forests, quick, rows_of

from qlora_suite import oasst1, sources
from qlora_suite.recipe import Filters
from qlora_suite.sources import BadRow, Place, Row
from qlora_suite.trees import Trees, _tops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees")


def both(rows: list[Row], folder: Path, policy: Any, filters: Filters | None) -> tuple[Any, Any]:
    """(conversations, what was dropped, bad rows) of the reference, which holds all messages in memory, and of Trees."""
    forest = oasst1.forest(rows)
    wanted = (*oasst1.conversations(forest.messages, policy, filters, forest.left_out), sorted(map(str, forest.bad_rows)))
    bad: list[BadRow] = []
    dropped: Counter[str] = Counter()
    with Trees(rows, folder, bad.append) as trees:
        conversations = list(trees.conversations(policy, filters, dropped))
    assert list(folder.iterdir()) == []
    return wanted, (conversations, dropped, sorted(map(str, bad)))


@quick
@given(forests(), st.sampled_from(POLICIES), st.sampled_from([None, Filters(), Filters(languages=("en",), min_chars=2, max_chars=30)]))
def test_any_forest_gives_the_same_conversations_in_the_same_order(
    folder: Path, messages: list[dict[str, Any]], policy: Any, filters: Filters | None
) -> None:
    wanted, found = both(rows_of(messages), folder, policy, filters)
    assert found == wanted


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", ["as it is", "backwards", "by depth"])
def test_the_embedded_file_gives_the_same_in_any_order(folder: Path, policy: Any, order: str) -> None:
    rows = list(sources.read(str(OASST1)))
    if order == "backwards":
        rows = rows[::-1]
    elif order == "by depth":
        depth: dict[str | None, int] = {}
        for row in rows:
            depth[row.values["message_id"]] = depth.get(row.values["parent_id"], 0) + 1
        rows.sort(key=lambda row: depth[row.values["message_id"]])
    wanted, found = both(rows, folder, policy, Filters())
    assert len(wanted[0]) > 100
    assert found == wanted


@pytest.mark.parametrize("value", ["", 'é\u2028"\\', "x" * 10_000])
def test_odd_ids_are_ids(folder: Path, value: str) -> None:
    base = {"message_tree_id": value, "text": "hi", "lang": None}
    rows = [
        Row(Place("odd/\u2028.jsonl", 1, "row", 9), {**base, "message_id": value, "parent_id": None, "role": "prompter"}),
        Row(
            Place("m.jsonl", 2), {**base, "message_id": "b", "parent_id": value, "role": "assistant", "rank": float("inf"), "text": "\x00"}
        ),
        Row(Place("m.jsonl", 3), {**base, "message_id": "b", "parent_id": value, "role": "assistant"}),
    ]
    for policy in POLICIES:
        wanted, found = both(rows, folder, policy, None)
        assert found == wanted


def test_no_message_is_no_tree(folder: Path) -> None:
    assert both([], folder, "all_paths", None)[1] == ([], Counter(), [])
    assert both([Row(Place("m", 1), {})], folder, "all_paths", None)[1] == ([], Counter(), ["m line 1: no message_id, message_id: null"])


@settings(deadline=None)
@given(st.lists(st.integers(-1, 40), min_size=1, max_size=41))
def test_the_last_ancestor_is_found_however_deep_and_a_circle_has_none(wanted: list[int]) -> None:
    parent = np.array([-1 if p >= len(wanted) else p for p in wanted])

    def walk(number: int) -> int | None:
        for _ in range(len(parent) + 1):
            if parent[number] < 0:
                return number
            number = parent[number]
        return None

    tops = _tops(parent)
    for number in range(len(parent)):
        if (end := walk(number)) is None:
            assert parent[tops[number]] >= 0
        else:
            assert tops[number] == end


def test_a_thread_of_100_000_messages_is_one_tree(folder: Path) -> None:
    rows = (
        Row(
            Place("m", n), {"message_id": str(n), "parent_id": str(n - 1) if n else None, "message_tree_id": "0", "text": "x", "role": role}
        )
        for n in range(100_000)
        for role in [("prompter", "assistant")[n % 2]]
    )
    with Trees(rows, folder, pytest.fail) as trees:
        assert len(trees) == 1
        (found,) = trees.conversations("best_path", None, Counter())
        assert len(found.turns) == 100_000
