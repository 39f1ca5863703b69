"""Fault 16: rows of every wrong kind are left out, counted by reason and named, or end the preparation under --strict; never a run."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe
from fuzzed import FLAT, message
from in_process import lines, metrics
from processes import run

from qlora_suite.files import read_json

DEEP = '{"messages": ' + "[" * 100_000


def chat(*turns: Any) -> dict[str, Any]:
    """Turns by their text, user and assistant by turns, or as they are given."""
    roles = ("user", "assistant")
    return {
        "messages": [
            t if isinstance(t, dict) or not isinstance(t, str) else {"role": roles[i % 2], "content": t} for i, t in enumerate(turns)
        ]
    }


def says(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


GOOD = [chat(f"question {n}", f"answer {n}") for n in range(24)]
WELL = [
    chat(says("user", "one"), says("user", "two"), says("assistant", "both")),
    chat("asked", "answered", "and nobody answers this"),
    chat("a", says("assistant", [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}])),
]
UNANSWERED = [chat("only a question"), chat(says("user", "one"), says("user", "two"))]
BAD: list[tuple[Any, str]] = [
    ("", "empty line"),  # passed by, not read
    ({}, "the key messages is missing"),
    ({"message": []}, "the key messages is missing"),
    (chat(), "empty"),
    (chat("", "answer"), "empty"),
    (chat(" \t\n\u3000", "answer"), "empty"),
    (chat("question", ""), "empty"),
    (chat({"content": "no role"}, "answer"), "unknown role (see data.roles)"),
    (chat(says("narrator", "x"), "answer"), "unknown role (see data.roles)"),
    (chat(says(None, "x"), "answer"), "unknown role (see data.roles)"),
    (chat(says(["user"], "x"), "answer"), "unknown role (see data.roles)"),
    (chat(says("user", None), "answer"), "content is not text"),
    (chat(says("user", 3), "answer"), "content is not text"),
    (chat(says("user", True), "answer"), "content is not text"),
    (chat(says("user", 1e308), "answer"), "content is not text"),
    (chat(says("user", 10**4000), "answer"), "content is not text"),
    (chat(says("user", {"text": "x"}), "answer"), "content is not text"),
    (chat(says("user", [["x"]]), "answer"), "a content part is not text"),
    (chat(says("user", [{"type": "image_url", "image_url": "x"}]), "answer"), "a content part is not text"),
    (chat(None, "answer"), "a message is no object"),
    (chat(["user", "x"], "answer"), "a message is no object"),
    ({"messages": None}, "no list of messages"),
    ({"messages": "hello"}, "no list of messages"),
    ({"messages": {"role": "user"}}, "no list of messages"),
    (chat("q", {"role": "assistant", "content": "a", "weight": 0.5}), "weight is neither 0 nor 1"),
    (chat("q", {"role": "assistant", "content": "a", "train": "yes"}), "train is neither 0 nor 1"),
    (chat("call", {"role": "tool", "content": "42"}, {"role": "assistant", "content": "a"}), "tools are called (data.tool_turns: skip)"),
    (None, "not an object with keys"),
    (7, "not an object with keys"),
    (True, "not an object with keys"),
    ("a text", "not an object with keys"),
    ([chat("q", "a")], "not an object with keys"),
    ('{"messages": [', "not JSON"),
    ('{"messages": ' + "1" * 5000 + "}", "not JSON"),
    (DEEP, "nested too deep to be read"),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair, which is no text"),
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of row in one file: between each two bad ones a good one, while they last."""
    rows: list[str] = []
    kept = iter([*GOOD, *WELL, *UNANSWERED])
    for bad, reason in BAD:
        as_it_is = isinstance(bad, str) and reason not in ("not an object with keys",)
        rows += [json.dumps(good) for good in [next(kept, None)] if good] + [bad if as_it_is else json.dumps(bad)]
    rows += [json.dumps(good) for good in kept]
    path = tmp_path_factory.mktemp("bad_rows") / "chats.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


OF_CHATS = ("data.policy=null", "data.split=all", "data.dev_share=0.0", "data.max_length=64", "train.max_steps=3", "train.rows_per_step=2")


def test_every_bad_chat_is_counted_and_named_and_the_others_are_trained_on(make_recipe: MakeRecipe, chats: Path, tmp_path: Path) -> None:
    recipe = make_recipe(f"data.source={chats}", *OF_CHATS)
    prepared = run("prepare_data.py", recipe, log=tmp_path / "prepare")
    assert prepared.process.exitcode == 0, prepared.output
    counts = read_json(tmp_path / "prepared" / "manifest.json")["counts"]
    wanted = Counter(reason for _, reason in BAD[1:])
    assert counts["dropped"] == wanted
    assert counts["read"] == len(GOOD) + len(WELL) + len(UNANSWERED) + len(BAD) - 1, "the blank line is no row"
    assert counts["read"] - wanted.total() == counts["train"]["conversations"]
    assert (counts["train"]["kept"], counts["train"]["unanswered"]) == (len(GOOD) + len(WELL), len(UNANSWERED))
    assert counts["train"]["open_ends"] == 1
    named = lines(tmp_path / "prepared" / "bad_rows.jsonl")
    assert Counter(bad["reason"] for bad in named) == wanted
    places = [int(bad["place"].removeprefix("chats.jsonl line ")) for bad in named]
    assert places == sorted(set(places))
    assert all(len(bad["value"]) <= 80 for bad in named)
    for reason in wanted:
        assert f"dropped: {reason}" in prepared.output

    trained = run("train.py", recipe, log=tmp_path / "train")
    assert trained.process.exitcode == 0, trained.output
    assert [(m["step"], m["applied"]) for m in metrics(tmp_path / "run")] == [(1, True), (2, True), (3, True)]


@pytest.mark.parametrize("number", range(1, len(BAD)), ids=[f"{i}: {reason}" for i, (_, reason) in enumerate(BAD) if i])
def test_under_strict_each_of_them_is_one_sentence_with_its_place(
    make_recipe: MakeRecipe, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: that the script exits with 2 is shown below, for two of them."""
    from in_process import script

    from qlora_suite.recipe_file import load

    bad, reason = BAD[number]
    as_it_is = isinstance(bad, str) and reason != "not an object with keys"
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(GOOD[0]) + "\n" + (bad if as_it_is else json.dumps(bad)) + "\n")
    recipe = load(make_recipe(f"data.source={path}", *OF_CHATS))
    with pytest.raises(ValueError, match=r"^chats\.jsonl line 2: ") as caught:
        script("prepare_data").run(recipe, strict=True)
    assert reason in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("kind", ["chats", "trees"])
def test_strict_ends_the_script_with_2_and_leaves_nothing(
    make_recipe: MakeRecipe, chats: Path, trees: Path, tmp_path: Path, kind: str
) -> None:
    of_kind = OF_CHATS if kind == "chats" else OF_TREES
    recipe = make_recipe(f"data.source={chats if kind == 'chats' else trees}", *of_kind)
    ended = run("prepare_data.py", recipe, "--strict", log=tmp_path / "log")
    assert ended.process.exitcode == 2
    assert (
        f"error: {'chats.jsonl line 4: the key messages is missing' if kind == 'chats' else 'trees.jsonl line 6: no message_id'}"
        in ended.output
    )
    assert "Traceback" not in ended.output
    assert not list(tmp_path.glob("*prepared*"))
    assert not list(tmp_path.glob(".*"))


# --- trees

OF_TREES = (
    "data.policy=all_paths",
    "data.split=all",
    "data.dev_share=0.0",
    "data.max_length=64",
    "train.max_steps=2",
    "train.rows_per_step=1",
)
IN_NO_TREE: list[tuple[Any, str]] = [
    (message("A9", "P1") | {"message_id": None}, "no message_id"),
    (message("A9", "P1") | {"message_id": 9}, "no message_id"),
    (message("A9", "P1") | {"message_tree_id": ["P1"]}, "no message_tree_id"),
    (message("A9", "P1", text=None), "no text"),
    (message("A9", "P1", text=["x"]), "no text"),
    (message("A9", "P1", role="tool"), "unknown role"),
    (message("A9", "P1", role=None), "unknown role"),
    (message("A9", None) | {"parent_id": {"id": "P1"}}, "parent_id is neither a text nor null"),
    (message("A9", "P1", lang=3), "lang is neither a text nor null"),
    (message("A9", "P1", rank="first"), "rank is neither a number nor null"),
    (message("A1", "P1", text="another with the same id"), "message_id stands twice"),
    (message("A8", "P1", message_tree_id="P7"), "in another tree than its parent"),
    (message("A7", "A7"), "its own ancestor, or below one that is"),
    (message("P6", "A6"), "its own ancestor, or below one that is"),
    (message("A6", "P6"), "its own ancestor, or below one that is"),
    (message("P5", "A6"), "its own ancestor, or below one that is"),
]
ORPHANS = [(message("A4", "gone"), "parent missing"), (message("P4", "A4"), "parent dropped"), (message("P3", "A9"), "parent dropped")]
ROOTLESS = [
    (message("A30", "P30", message_tree_id="P30"), "parent missing"),
    (message("P31", "A30", message_tree_id="P30"), "parent dropped"),
]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound tree, and every message that can stand in none."""
    path = tmp_path_factory.mktemp("bad_trees") / "trees.jsonl"
    rows = [*FLAT, *(m for m, _ in [*IN_NO_TREE, *ORPHANS, *ROOTLESS])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_message_that_can_stand_in_no_tree_is_counted_and_the_tree_is_trained_on(
    make_recipe: MakeRecipe, trees: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(f"data.source={trees}", *OF_TREES)
    prepared = run("prepare_data.py", recipe, log=tmp_path / "prepare")
    assert prepared.process.exitcode == 0, prepared.output
    counts = read_json(tmp_path / "prepared" / "manifest.json")["counts"]
    assert counts["dropped"] == Counter(reason for _, reason in [*IN_NO_TREE, *ORPHANS, *ROOTLESS])
    assert counts["read"] - sum(counts["dropped"].values()) == len(FLAT)
    named = Counter(bad["reason"] for bad in lines(tmp_path / "prepared" / "bad_rows.jsonl"))
    assert named == Counter(reason for _, reason in IN_NO_TREE)
    assert counts["train"]["kept"] == 2
    trained = run("train.py", recipe, log=tmp_path / "train")
    assert trained.process.exitcode == 0, trained.output
    assert [m["applied"] for m in metrics(tmp_path / "run")] == [True], "two conversations packed into one row"


def test_inspection_tells_the_same_of_damaged_trees(make_recipe: MakeRecipe, trees: Path, tmp_path: Path) -> None:
    ended = run("prepare_data.py", make_recipe(), "--inspect", trees, log=tmp_path / "log")
    assert ended.process.exitcode == 0, ended.output
    for reason, count in Counter(reason for _, reason in [*IN_NO_TREE, *ORPHANS, *ROOTLESS]).items():
        assert f"{count:,}: {reason}" in ended.output
