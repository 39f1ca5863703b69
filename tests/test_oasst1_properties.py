"""Any forest, damaged in any way: every message is accounted for once, and conversations are the chains that they say they are."""

import json
from collections import Counter
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_suite import oasst1
from qlora_suite.recipe import PAIR_POLICIES, Filters, Pairs
from qlora_suite.recipe_file import load
from qlora_suite.selection import SPLITS, selected
from qlora_suite.sources import Place, Row

POLICIES = ("best_path", "joined_replies", "best_replies", "all_replies", "all_paths", "each_message", *PAIR_POLICIES)
OTHER = {"message_id": [None, 3], "parent_id": [7, "gone", ""], "message_tree_id": [None, "t9"], "text": [None, "", "long " * 9]}
OTHER |= {
    "role": ["tool", None, []],
    "lang": ["de", 3],
    "rank": ["0", float("nan"), True],
    "deleted": [True],
    "review_result": [False, None],
}
quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def forests(draw: st.DrawFn, damage: bool = True) -> list[dict[str, Any]]:
    """Messages in any order. `damage`: some with another value somewhere, which may give two one id, or make circles."""
    messages: list[dict[str, Any]] = []
    for tree in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 7))
        for number in range(size):
            parent = messages[-1 - draw(st.integers(0, number - 1))] if number else None
            role = "prompter" if parent is None or parent["role"] == "assistant" else "assistant"
            name = f"t{tree}m{number}"
            basic = {"message_id": name, "parent_id": parent and parent["message_id"], "message_tree_id": f"t{tree}", "role": role}
            text = f"words of {name}" + " more" * draw(st.integers(0, 5))
            messages.append({**basic, "text": text, "lang": "en", "rank": draw(st.sampled_from([None, 0, 1, 2, 4]))})
    if damage:
        names = [m["message_id"] for m in messages]
        for _ in range(draw(st.integers(0, 4))):
            message = draw(st.sampled_from(messages))
            key = draw(st.sampled_from(sorted(OTHER)))
            ids = names if key in ("message_id", "parent_id") else []
            message[key] = draw(st.sampled_from([*OTHER[key], *ids]))
    return draw(st.permutations(messages))


def rows_of(messages: list[dict[str, Any]]) -> list[Row]:
    return [Row(Place("m.jsonl", number), m) for number, m in enumerate(messages, 1)]


@quick
@given(forests(), st.sampled_from(POLICIES), st.sampled_from([None, Filters(), Filters(languages=("en",), min_chars=2, max_chars=30)]))
def test_every_message_is_kept_or_left_out_for_one_reason(messages: list[dict[str, Any]], policy: Any, filters: Filters | None) -> None:
    forest = oasst1.forest(rows_of(messages))
    assert len(forest.messages) + len(forest.bad_rows) == len(messages)
    assert len({str(bad.place) for bad in forest.bad_rows}) == len(forest.bad_rows), "each by its own place, once"
    ids = [m["message_id"] for m in forest.messages]
    assert len(ids) == len(set(ids))
    assert forest.left_out.isdisjoint(ids)
    found, dropped = oasst1.conversations(forest.messages, policy, filters, forest.left_out)
    assert 0 <= dropped.total() <= len(forest.messages)
    used = {i for c in found for i in c.ids}
    assert used <= set(ids)
    if policy in ("all_paths", "each_message"):
        assert len(used) == len(forest.messages) - dropped.total()


@quick
@given(forests())
def test_conversations_are_chains_from_a_root_down_to_a_leaf(messages: list[dict[str, Any]]) -> None:
    forest = oasst1.forest(rows_of(messages))
    by_id = {m["message_id"]: m for m in forest.messages}
    found, _dropped = oasst1.conversations(forest.messages, "all_paths", None, forest.left_out)
    kept = {i for c in found for i in c.ids}
    parents = {by_id[i].get("parent_id") for i in kept}
    taught: Counter[str] = Counter()
    for conversation in found:
        first, *rest = conversation.ids
        assert not by_id[first]["parent_id"], "a root"
        for above, below in zip(conversation.ids, rest, strict=False):
            assert by_id[below]["parent_id"] == above
        assert conversation.ids[-1] not in parents, "a leaf of what was kept"
        assert {by_id[i]["message_tree_id"] for i in conversation.ids} == {conversation.group}
        assert [t.content for t in conversation.turns] == [by_id[i]["text"] for i in conversation.ids]
        taught.update(i for i, t in zip(conversation.ids, conversation.turns, strict=True) if t.role == "assistant" and t.learn)
    assert taught == Counter({i for i in kept if by_id[i]["role"] == "assistant"}), "every answer is learnt once"


@quick
@given(forests(damage=False), st.sampled_from(POLICIES))
def test_a_sound_forest_loses_nothing_and_its_order_matters_to_siblings_alone(messages: list[dict[str, Any]], policy: Any) -> None:
    forest = oasst1.forest(rows_of(messages))
    assert forest.messages == messages
    assert forest.bad_rows == []
    found, dropped = oasst1.conversations(messages, policy, None)
    assert policy == "all_replies" or not dropped
    again, _ = oasst1.conversations(messages[::-1], policy, None)
    assert {c.group for c in found} == {c.group for c in again}


pair_settings = st.builds(
    Pairs,
    choose=st.sampled_from(["all", "adjacent", "best_worst"]),
    margin=st.integers(1, 3),
    within=st.integers(0, 3),
    shorter=st.sampled_from([0.4, 0.8, 0.99]),
)


def makes_a_pair(chosen: dict[str, Any], rejected: dict[str, Any], policy: str, pairs: Pairs) -> bool:
    """May `chosen` be preferred to its sibling?"""
    for rank in (chosen["rank"], rejected["rank"]):
        if rank is None or isnan(rank):
            return False
    if policy == "preference_pairs":
        return rejected["rank"] - chosen["rank"] >= pairs.margin
    few, many = len(chosen["text"].split()), len(rejected["text"].split())
    return abs(rejected["rank"] - chosen["rank"]) <= pairs.within and 0 < few <= many * pairs.shorter


@settings(quick, max_examples=300)
@given(forests(), st.sampled_from(PAIR_POLICIES), pair_settings)
def test_a_pair_is_two_siblings_of_one_prompt_in_their_order(messages: list[dict[str, Any]], policy: Any, pairs: Pairs) -> None:
    forest = oasst1.forest(rows_of(messages))
    by_id = {m["message_id"]: m for m in forest.messages}

    def path_to(name: str | None) -> list[str] | None:
        """Ids from the root down to a message; None if the way up ends elsewhere."""
        path = []
        while name:
            if name not in by_id:
                return None
            path.append(name)
            name = by_id[name]["parent_id"]
        return path[::-1]

    def ids(choose: str, order: int = 1) -> list[tuple[str, ...]]:
        chosen = pairs.model_copy(update={"choose": choose})
        return [c.ids for c in oasst1.conversations(forest.messages[::order], policy, None, forest.left_out, chosen)[0]]

    found, _ = oasst1.conversations(forest.messages, policy, None, forest.left_out, pairs)
    for pair in found:
        prompt, chosen, rejected = (by_id[name] for name in pair.ids)
        assert (prompt["role"], chosen["role"], rejected["role"]) == ("prompter", "assistant", "assistant")
        assert chosen["parent_id"] == rejected["parent_id"] == pair.ids[0]
        assert makes_a_pair(chosen, rejected, policy, pairs)
        path = path_to(pair.ids[0])
        assert [t.content for t in pair.turns] == [by_id[name]["text"] for name in [*path, pair.ids[1]]]
        assert [t.learn for t in pair.turns if t.role == "assistant"][-1]
        assert not any(t.learn for t in pair.turns[:-1] if t.role == "assistant"), "the context is not learnt"
        assert pair.rejected == rejected["text"]
        assert pair.group == prompt["message_tree_id"]
    assert len({frozenset(pair.ids[1:]) for pair in found}) == len({pair.key for pair in found}) == len(found), "each once"

    replies = [m for m in forest.messages if m["role"] == "assistant" and path_to(m["parent_id"])]
    siblings = [(a, b) for a in replies for b in replies if a is not b and a["parent_id"] == b["parent_id"]]
    every = {
        (a["parent_id"], a["message_id"], b["message_id"])
        for a, b in siblings
        if by_id[a["parent_id"]]["role"] == "prompter" and makes_a_pair(a, b, policy, pairs)
    }
    of_each = {choose: ids(choose) for choose in ("all", "adjacent", "best_worst")}
    assert set(of_each["all"]) == every
    assert set(of_each["adjacent"]) <= every
    assert set(of_each["best_worst"]) <= every
    assert Counter(prompt for prompt, *_ in of_each["best_worst"]) == Counter({prompt for prompt, *_ in every}), "one of each prompt"
    if policy == "preference_pairs" and pairs.margin == 1:
        assert len(of_each["best_worst"]) <= len(of_each["adjacent"]) <= len(of_each["all"])
    for choose, made in of_each.items():
        assert set(ids(choose, order=-1)) == set(made), "the order in the file does not matter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(forests(), st.sampled_from(POLICIES), st.floats(0.0, 0.6), st.floats(0.1, 0.9))
def test_no_tree_stands_on_two_sides(
    folder: Path, tiny_base: Path, messages: list[dict[str, Any]], policy: str, dev: float, held_out: float
) -> None:
    """Neither as a group nor by a message, whatever is damaged; and every row that was read is counted."""
    source = folder / "m.jsonl"
    source.write_text("".join(json.dumps(m) + "\n" for m in messages))
    settings_of = [f"data.policy={policy}", f"data.dev_share={dev:.3f}", f"data.validation_share={held_out:.3f}"]
    settings_of += ["chat.format=text"] if policy == "each_message" else []
    settings_of += ["dpo={}", "data.packing=false"] if policy in PAIR_POLICIES else []
    recipe = load(write_recipe(folder, tiny_base, source, *settings_of))
    with selected(recipe) as selection:
        found = {split: list(conversations) for split, conversations in selection.splits.items()}
        assert selection.num_read == len(messages)
        kept = len(messages) - selection.dropped.total()
        assert kept >= len({i for split in SPLITS for c in found[split] for i in c.ids})
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert {c.group for c in found[one]}.isdisjoint(c.group for c in found[other])
                assert {i for c in found[one] for i in c.ids}.isdisjoint(i for c in found[other] for i in c.ids)
