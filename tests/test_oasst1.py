"""OASST1: the embedded file gives the published counts, filters add up, and damaged forests are refused in words."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_suite import oasst1, sources
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.recipe import PAIR_POLICIES, Filters, Pairs

ASSET = Path(__file__).parents[1] / "assets" / "oasst1_en_validation.jsonl.gz"
POLICIES = ("best_path", "joined_replies", "best_replies", "all_replies", "all_paths", "each_message", *PAIR_POLICIES)


@pytest.fixture(scope="module")
def messages() -> list[dict[str, Any]]:
    return [row.values for row in sources.read(str(ASSET))]


def message(name: str, parent: str | None = None, **more: Any) -> dict[str, Any]:
    """`P...` is a prompter, `A...` an assistant; the text is the name."""
    role = "prompter" if name.startswith("P") else "assistant"
    basic = {"message_id": name, "parent_id": parent, "message_tree_id": "P1", "role": role, "text": name, "lang": "en", "rank": None}
    return basic | {"created_date": "2023-01-01", "deleted": False, "synthetic": False, "review_result": True} | more


# The tree that is drawn in oasst1.py, in file order.
TREE = [
    message("P1"),
    message("A1", "P1", rank=1),
    message("P2", "A1"),
    message("A3", "P2"),
    message("A2", "P1", rank=0),
    message("P3", "A2"),
]


def lines(found: list[Conversation]) -> list[str]:
    return [oasst1.ids_line(c).replace("\t", ": ") for c in found]


def texts(found: list[Conversation]) -> list[list[str]]:
    return [[t.content for t in c.turns] for c in found]


@pytest.mark.parametrize(
    ("policy", "count", "open_ends", "digest"),
    [
        ("best_path", 188, 64, "44a8254bf4f6a2e5853016c81359aab97ff5105e1e81076c8e43591ec95f91d8"),
        ("joined_replies", 480, 0, "c3214e99fddc5a8d7ba2d7e967774d041cd6482d63ef86890d8ff4193c396bec"),
        ("best_replies", 418, 0, "37db4f23514a27246cbc08c55ae8d6f7bff04cacafc6b8c254883b194783bb5c"),
        ("all_replies", 1185, 0, "ff0bc6efdc62168eaf1a1451d195bfe49f46a66e0d9dc095d59677989a5f1067"),
        ("all_paths", 1002, 298, "f93ce5abac5410e1ccb58a50fa5096a056443bc56597adbfc83a601dbbd1598b"),
    ],
)
def test_the_embedded_file_gives_exactly_the_known_conversations(messages, policy, count, open_ends, digest):
    found, _ = oasst1.conversations(messages, policy, None)
    assert len(found) == count
    assert sum(c.turns[-1].role == "user" for c in found) == open_ends
    assert hashlib.sha256("".join(sorted(oasst1.ids_line(c) + "\n" for c in found)).encode()).hexdigest() == digest


def test_the_embedded_file_holds_what_its_readme_says(messages):
    assert Counter(m["role"] for m in messages) == {"prompter": 779, "assistant": 1243}
    assert len({m["message_tree_id"] for m in messages}) == 191
    assert sum(m["parent_id"] is None for m in messages) == 188
    assert sum(m["deleted"] for m in messages) == 40
    assert sum(len(m["text"].encode()) for m in messages) == 1_082_613


def test_best_paths_hold_612_messages_274_of_them_assistant(messages):
    found, _ = oasst1.conversations(messages, "best_path", None)
    roles = Counter(t.role for c in found for t in c.turns)
    assert roles == {"user": 338, "assistant": 274}
    assert all(t.learn for c in found for t in c.turns)


def test_all_paths_learn_every_assistant_message_exactly_once(messages):
    found, _ = oasst1.conversations(messages, "all_paths", None)
    taught = Counter(i for c in found for i, t in zip(c.ids, c.turns, strict=True) if t.role == "assistant" and t.learn)
    held = {i for c in found for i, t in zip(c.ids, c.turns, strict=True) if t.role == "assistant"}
    assert len(taught) == 1241
    assert set(taught.values()) == {1}
    assert set(taught) == held


def test_all_paths_learn_a_shared_reply_on_its_first_path_only():
    fork = [message("P1"), message("A1", "P1"), message("P2", "A1"), message("A2", "P2"), message("P3", "A1"), message("A3", "P3")]
    found, _ = oasst1.conversations(fork, "all_paths", None)
    assert [[(t.content, t.learn) for t in c.turns if t.role == "assistant"] for c in found] == [
        [("A1", True), ("A2", True)],
        [("A1", False), ("A3", True)],
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("best_path", ["P1: P1 A2 P3"]),
        ("joined_replies", ["P1: A1 A2", "P2: A3"]),
        ("best_replies", ["P1: A2"]),
        ("all_replies", ["P1: A1", "P2: A3", "P1: A2"]),
        ("all_paths", ["A3: P1 A1 P2 A3", "P3: P1 A2 P3"]),
        ("each_message", ["P1: P1", "A1: A1", "P2: P2", "A3: A3", "A2: A2", "P3: P3"]),
        ("preference_pairs", ["A2>A1: P1 A2 A1"]),
    ],
)
def test_the_drawn_tree_gives_the_drawn_conversations(policy, expected):
    found, dropped = oasst1.conversations(TREE, policy, None)
    assert lines(found) == expected
    assert not dropped
    assert {c.group for c in found} == {"P1"}


def test_joined_replies_put_the_first_prompt_before_later_ones():
    found, _ = oasst1.conversations(TREE, "joined_replies", None)
    assert texts(found) == [["P1", "A1 A2"], ["P1 P2", "A3"]]


def test_trees_come_in_file_order(messages):
    # The export is written depth first, so walking it changes nothing.
    assert [c.key for c in oasst1.conversations(messages, "each_message", None)[0]] == [m["message_id"] for m in messages]


def test_each_message_is_one_text_without_roles():
    found, _ = oasst1.conversations(TREE, "each_message", None)
    assert found[0].turns == (Turn("assistant", "P1"),)


def test_best_path_takes_the_earliest_reply_where_nobody_ranked():
    late, early, ranked = (
        message("A1", "P1", created_date="2023-03"),
        message("A2", "P1", created_date="2023-02"),
        message("A3", "P1", rank=4),
    )
    assert lines(oasst1.conversations([message("P1"), late, early], "best_path", None)[0]) == ["P1: P1 A2"]
    assert lines(oasst1.conversations([message("P1"), late, early, ranked], "best_path", None)[0]) == ["P1: P1 A3"]


def test_a_conversation_has_a_language_only_if_all_its_messages_share_it():
    mixed = [message("P1"), message("A1", "P1"), message("A2", "P1", lang="de")]
    assert [c.language for c in oasst1.conversations(mixed, "all_paths", None)[0]] == ["en", None]


# --- pairs


@pytest.mark.parametrize(
    ("policy", "filters", "pairs", "count", "prompts"),
    [
        ("preference_pairs", None, Pairs(), 1026, 418),  # the published number: every two siblings of unequal rank
        ("preference_pairs", Filters(), Pairs(), 1022, 416),
        ("preference_pairs", Filters(), Pairs(choose="adjacent"), 711, 416),
        ("preference_pairs", Filters(), Pairs(choose="best_worst"), 416, 416),
        ("preference_pairs", Filters(), Pairs(margin=2), 313, 282),
        ("conciseness_pairs", None, Pairs(), 560, 380),
        ("conciseness_pairs", Filters(), Pairs(), 557, 378),
        ("conciseness_pairs", Filters(), Pairs(choose="best_worst"), 378, 378),
        ("conciseness_pairs", Filters(), Pairs(within=0), 0, 0),
    ],
)
def test_the_embedded_file_gives_exactly_the_known_pairs(messages, policy, filters, pairs, count, prompts):
    found, _ = oasst1.conversations(messages, policy, filters, (), pairs)
    assert (len(found), len({c.ids[0] for c in found}), len({c.key for c in found})) == (count, prompts, count)
    if pairs == Pairs():
        assert oasst1.conversations(messages, policy, filters)[0] == found, "the defaults"


def test_deleted_replies_with_a_rank_are_what_the_default_filters_cost(messages):
    every, kept = ({c.key: c for c in oasst1.conversations(messages, "preference_pairs", filters)[0]} for filters in (None, Filters()))
    assert kept.items() <= every.items()
    deleted = {m["message_id"] for m in messages if m["deleted"]}
    assert all(deleted & {*every[key].ids} for key in every.keys() - kept.keys())
    assert len(deleted & {m["message_id"] for m in messages if m["rank"] is not None}) == 3


def pair_tree(*replies: tuple[str, int | None, int]) -> list[dict[str, Any]]:
    """A question below a first one with its answer; (name, rank, words) of each reply to it."""
    asked = [message("P1"), message("A0", "P1", rank=0), message("P2", "A0")]
    return asked + [message(name, "P2", rank=rank, text=" ".join([name] * words)) for name, rank, words in replies]


def pairs_of(tree: list[dict[str, Any]], policy: Any, **pairs: Any) -> list[str]:
    return [c.key for c in oasst1.conversations(tree, policy, None, (), Pairs(**pairs))[0]]


def test_a_pair_has_the_whole_path_as_context_and_learns_the_better_answer_alone():
    found, _ = oasst1.conversations(pair_tree(("A1", 1, 2), ("A2", 0, 3)), "preference_pairs", None)
    assert found == [
        Conversation(
            key="A2>A1",
            ids=("P2", "A2", "A1"),
            group="P1",
            turns=(Turn("user", "P1"), Turn("assistant", "A0", learn=False), Turn("user", "P2"), Turn("assistant", "A2 A2 A2")),
            language="en",
            rejected="A1 A1",
        )
    ]
    chosen, rejected = found[0].chosen_and_rejected()
    assert chosen.turns == found[0].turns
    assert rejected.turns == (*found[0].turns[:-1], Turn("assistant", "A1 A1"))
    assert chosen.rejected is rejected.rejected is None


def test_which_pairs_of_four_replies_are_chosen():
    tree = pair_tree(("A3", 2, 1), ("A1", 0, 1), ("none", None, 1), ("A2", 1, 1), ("A4", 5, 1))
    assert pairs_of(tree, "preference_pairs") == ["A1>A2", "A1>A3", "A1>A4", "A2>A3", "A2>A4", "A3>A4"]
    assert pairs_of(tree, "preference_pairs", choose="adjacent") == ["A1>A2", "A2>A3", "A3>A4"]
    assert pairs_of(tree, "preference_pairs", choose="best_worst") == ["A1>A4"]
    assert pairs_of(tree, "preference_pairs", margin=3) == ["A1>A4", "A2>A4", "A3>A4"]
    assert pairs_of(tree, "preference_pairs", margin=3, choose="adjacent") == ["A3>A4"]
    assert pairs_of(tree, "preference_pairs", margin=6, choose="best_worst") == []


def test_of_replies_with_one_rank_neither_is_the_better():
    tree = pair_tree(("A1", 0, 1), ("A2", 0, 1), ("A3", 1, 1))
    assert pairs_of(tree, "preference_pairs") == ["A1>A3", "A2>A3"]
    assert pairs_of(tree, "preference_pairs", choose="adjacent") == ["A2>A3"]
    assert pairs_of(tree, "preference_pairs", choose="best_worst") == ["A1>A3"]


def test_the_shorter_of_two_like_ranks_is_chosen_whichever_is_the_better():
    tree = pair_tree(("long", 0, 20), ("middle", 1, 10), ("short", 2, 5), ("wordless", 1, 0), ("none", None, 1))
    assert pairs_of(tree, "conciseness_pairs") == ["short>middle", "middle>long"]
    assert pairs_of(tree, "conciseness_pairs", within=2) == ["short>middle", "short>long", "middle>long"]
    assert pairs_of(tree, "conciseness_pairs", within=2, choose="adjacent") == ["short>middle", "middle>long"]
    assert pairs_of(tree, "conciseness_pairs", within=2, choose="best_worst") == ["short>long"]
    assert pairs_of(tree, "conciseness_pairs", choose="best_worst") == ["middle>long"]
    assert pairs_of(tree, "conciseness_pairs", within=2, shorter=0.4) == ["short>long"]
    assert pairs_of(tree, "conciseness_pairs", within=0) == []


@pytest.mark.parametrize(("words", "share", "paired"), [(29, 0.29, True), (30, 0.29, False), (80, 0.8, True), (81, 0.8, False)])
def test_the_share_of_words_belongs_to_the_shorter(words, share, paired):
    assert bool(pairs_of(pair_tree(("A1", 0, 100), ("A2", 1, words)), "conciseness_pairs", shorter=share)) is paired


@pytest.mark.parametrize("rank", [None, float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_rank_that_is_no_place_in_an_order_makes_no_pair(rank):
    tree = pair_tree(("A1", rank, 1), ("A2", 0, 9), ("A3", 0.5, 9))
    for policy in PAIR_POLICIES:
        assert pairs_of(tree, policy) == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("filters", [None, Filters(), Filters(min_chars=20, max_chars=2000)])
def test_kept_and_dropped_messages_add_up(messages, policy, filters):
    found, dropped = oasst1.conversations(messages, policy, filters)
    kept = len(messages) - dropped.total()
    if policy in ("all_paths", "each_message"):  # these two use every kept message
        assert len({i for c in found for i in c.ids}) == kept
    assert len({i for c in found for i in c.ids}) <= kept


def test_each_filter_is_counted_by_its_reason_and_takes_the_descendants():
    damaged = [
        message("P1"),
        message("A1", "P1", lang="de"),
        message("P2", "A1"),
        message("A2", "P1", deleted=True),
        message("A3", "P1", synthetic=True),
        message("A4", "P1", review_result=False),
        message("A5", "P1", text="  !  "),
        message("A6", "P1", text="long " * 9),
        message("A9", "P1", review_result=None),
    ]
    found, dropped = oasst1.conversations(damaged, "all_paths", Filters(languages=("en",), min_chars=2, max_chars=40))
    assert lines(found) == ["A9: P1 A9"]
    reasons = ["language", "parent dropped", "deleted", "synthetic", "failed review", "too short", "too long"]
    assert dropped == dict.fromkeys(reasons, 1)
    assert len(oasst1.conversations(damaged[:7], "each_message", None)[0]) == 7  # null turns every filter off


def test_all_replies_has_its_own_conditions_on_both_messages():
    tree = [message("P1", deleted=True), message("A1", "P1"), message("P2", "A1"), message("A2", "P2"), message("A3", "P2", lang="de")]
    found, dropped = oasst1.conversations(tree, "all_replies", None)
    assert lines(found) == ["P2: A2"]
    assert dropped == {"deleted": 1, "parent dropped": 1, "language": 1}


def test_a_missing_parent_is_counted_and_pairs_below_it_stay():
    orphans = [message("P1", "gone"), message("A1", "P1", rank=0), message("A2", "lost", rank=0)]
    for policy in ("best_path", "joined_replies", "all_paths", *PAIR_POLICIES):
        assert oasst1.conversations(orphans, policy, None) == ([], {"parent missing": 2, "parent dropped": 1})
    for policy in ("best_replies", "all_replies"):
        found, dropped = oasst1.conversations(orphans, policy, None)
        assert lines(found) == ["P1: A1"]
        assert dropped == {"parent missing": 1}


def test_the_order_of_parents_and_children_in_the_file_does_not_matter():
    backwards = [TREE[0], TREE[3], TREE[2], TREE[1], TREE[5], TREE[4]]
    for policy in POLICIES:
        assert oasst1.conversations(backwards, policy, None) == oasst1.conversations(TREE, policy, None)


@pytest.mark.parametrize(
    ("damage", "complaints"),
    [
        ([message("A3", "P2"), message("P2", "A3")], ['its own ancestor, or below one that is, parent_id: "P2"', '"A3"']),
        ([message("A4", "A4"), message("P5", "A4")], ['its own ancestor, or below one that is, parent_id: "A4"', '"A4"']),
        ([message("A1", "P1", text="again")], ['message_id stands twice, message_id: "A1"']),
        ([message("A4", "P1", message_tree_id="other")], ['in another tree than its parent, parent_id: "P1"']),
        ([message("A4") | {"message_id": None}], ["no message_id, message_id: null"]),
        ([message("A4") | {"message_id": ["A4"]}], ['no message_id, message_id: ["A4"]']),
        ([message("A4") | {"message_tree_id": 3}], ["no message_tree_id, message_tree_id: 3"]),
        ([message("A4") | {"parent_id": 7}], ["parent_id is neither a text nor null, parent_id: 7"]),
        ([message("A4", "P1", text=None)], ["no text, text: null"]),
        ([message("A4", "P1", role="tool")], ['unknown role, role: "tool"']),
        ([message("A4", "P1", lang=["en"])], ['lang is neither a text nor null, lang: ["en"]']),
        ([message("A4", "P1", rank="0")], ['rank is neither a number nor null, rank: "0"']),
    ],
)
def test_what_can_stand_in_no_tree_is_named_and_the_rest_is_a_forest(damage, complaints):
    rows = [sources.Row(sources.Place("m.jsonl", number), m) for number, m in enumerate(TREE[:2] + damage, 1)]
    found = oasst1.forest(rows)
    assert [str(bad) for bad in found.bad_rows] == [
        f"m.jsonl line {number}: {words if ':' in words else complaints[0].partition(':')[0] + ': ' + words}"
        for number, words in enumerate(complaints, 3)
    ]
    assert found.messages == TREE[:2]
    assert len(oasst1.conversations(found.messages, "all_paths", None, found.left_out)[0]) == 1


def test_what_hangs_below_a_message_that_was_left_out_is_counted_so():
    tree = [message("P1"), message("A1", "P1", text=3), message("P2", "A1"), message("A2", "P1"), message("A3", "gone")]
    found = oasst1.forest(sources.Row(sources.Place("m.jsonl", n), m) for n, m in enumerate(tree, 1))
    conversations, dropped = oasst1.conversations(found.messages, "all_paths", None, found.left_out)
    assert lines(conversations) == ["A2: P1 A2"]
    assert dropped == {"parent dropped": 1, "parent missing": 1}
    assert found.left_out == {"A1"}


def test_a_very_deep_tree_is_walked():
    deep = [message("P1")] + [message(f"{'AP'[i % 2]}{i + 2}", "P1" if i == 0 else f"{'AP'[(i - 1) % 2]}{i + 1}") for i in range(20_000)]
    found, _ = oasst1.conversations(deep, "all_paths", None)
    assert len(found[0].turns) == 20_001


def test_a_split_depends_on_the_group_the_share_and_the_salt_alone(messages):
    groups = sorted({m["message_tree_id"] for m in messages})
    held = {g for g in groups if oasst1.split_of(g, 0.2, "validation")}
    assert held == {g for g in reversed(groups) if oasst1.split_of(g, 0.2, "validation")}
    assert 0.1 < len(held) / len(groups) < 0.3
    assert held < {g for g in groups if oasst1.split_of(g, 0.5, "validation")}
    assert held != {g for g in groups if oasst1.split_of(g, 0.2, "dev")}
    assert not any(oasst1.split_of(g, 0.0, "validation") for g in groups)
    assert all(oasst1.split_of(g, 1.0, "validation") for g in groups)
