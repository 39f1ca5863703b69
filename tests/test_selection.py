"""Selection: every conversation is accounted for, and which are taken depends on what they say, not on where they stand."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import OASST1

from qlora_suite import sources
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.preparation import prepare
from qlora_suite.recipe import Recipe, Replies
from qlora_suite.recipe_file import from_dict
from qlora_suite.selection import SPLITS, Counts, Selection, SetCounts, _weight, selected

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def chat(number: int, words: int = 2, question: str | None = None) -> dict[str, Any]:
    """A question of its own and an answer of so many words."""
    answer = " ".join([f"answer{number}", *(WORDS[i % 10] for i in range(words - 1))])
    return {"messages": [{"role": "user", "content": question or f"question {number}"}, {"role": "assistant", "content": answer}]}


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Callable[..., Recipe]:
    """recipe({"source": ..., ...}, max_length=...): of one data set, or of several."""

    def make(*sets: dict[str, Any], format: str = "oasst", **data: Any) -> Recipe:
        of_sets = {"split": "all", **sets[0]} if len(sets) == 1 else {"sets": [{"split": "all", **one} for one in sets]}
        return from_dict(
            {
                "model": {"base": str(tiny_base)},
                "data": {"prepared": str(tmp_path / "out" / "prepared"), "dev_share": 0.0, "max_length": 512} | of_sets | data,
                "chat": {"format": format},
                "optim": {"learning_rate": 1e-3},
                "train": {"rows_per_step": 8},
                "output": {"dir": str(tmp_path / "run")},
            }
        )

    return make


def taken(recipe: Recipe) -> tuple[dict[str, list[Conversation]], dict[str, Counts], list[SetCounts]]:
    with selected(recipe) as selection:
        return {split: list(found) for split, found in selection.splits.items()}, selection.counts, selection.sets


def answers(conversations: list[Conversation]) -> list[str]:
    return [conversation.turns[-1].content for conversation in conversations]


def numbers(conversations: list[Conversation]) -> Counter[int]:
    """How often each chat was taken."""
    return Counter(int(answer.split()[0].removeprefix("answer")) for answer in answers(conversations))


def assert_adds_up(c: dict[str, int], split: str) -> None:
    chosen = c["conversations"] + c["copies"] - c["no_reply"] - c["duplicates"] - c["same_question"] - c["beyond_max"] - c["weighted_out"]
    assert chosen == c["kept"] + c["unanswered"] + c["nothing_new"] + c["refused"] + c["dropped_too_long"], split


# --- the funnel


def mixture(folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of every fate, among them bad ones; a third are held out, and some of those stand in train too."""
    draw = random.Random(seed)
    held_out = [chat(i, words=draw.choice([1, 3, 9])) for i in range(60)]
    rows: list[Any] = [chat(i, words=draw.choice([1, 3, 9, 40])) for i in range(100, 300)]
    rows += held_out[:7] + held_out[:2]  # word for word
    rows += [chat(i + 1000, question=f"question {i}") for i in range(7, 20)]  # the same question, another answer
    rows += [{"messages": [{"role": "user", "content": f"anyone {i}?"}]} for i in range(5)]
    rows += [{"messages": [{**m, "train": False} for m in chat(i)["messages"]]} for i in range(400, 406)]
    rows += [{"messages": [*chat(i)["messages"], {"role": "user", "content": "and?"}]} for i in range(500, 504)]
    rows += [{"messages": [{"role": "tool", "content": "x"}]}, {"messages": 3}, "not json", "[]"]
    draw.shuffle(rows)
    unanswered = [{"messages": [{"role": "user", "content": "hm"}]}]
    return [{
        "source": lines(folder / "train.jsonl", rows), "split": "published",
        "validation_source": lines(folder / "held.jsonl", [*held_out, *unanswered, {"messages": []}]),
    }]  # fmt: skip


@pytest.mark.parametrize(
    ("of_set", "data"),
    [
        ({}, {}),
        ({"weight": 2.3}, {"dev_share": 0.3}),
        ({"weight": 0.4, "max_examples": 90}, {"dev_share": 0.1}),
        ({"replies": {"min_words": 2, "max_words": 10}, "weight": 1.5}, {"dev_share": 0.2}),
        ({"replies": {"weights": [{"up_to_words": 1, "weight": 0}, {"up_to_words": 3, "weight": 2.5}, {"weight": 0.5}]}}, {}),
        ({"same_role": "keep", "max_examples": 50, "weight": 3}, {"max_length": 24, "too_long": "drop", "packing": False}),
    ],
)
def test_the_funnel_adds_up_in_every_split(tmp_path, recipe, of_set, data):
    values = recipe(mixture(tmp_path)[0] | of_set, **data)
    with selected(values) as selection:
        chosen = {split: len(found) for split, found in selection.splits.items()}
        manifest, _ = prepare(values, selection)
    counts = manifest["counts"]
    assert counts["read"] == 241 + 62
    assert counts["read"] - sum(counts["dropped"].values()) == sum(counts[split]["conversations"] for split in SPLITS)
    for split in SPLITS:
        c = counts[split]
        assert_adds_up(c, split)
        assert chosen[split] == c["kept"] + c["unanswered"] + c["nothing_new"] + c["refused"] + c["dropped_too_long"]
        assert c["kept"] > 0 or (split == "dev" and not data.get("dev_share"))
    if not data.get("dev_share"):
        assert (counts["train"]["duplicates"], counts["train"]["same_question"]) == (9, 13)
    assert not list((tmp_path / "out").glob(".*tmp"))


def test_oasst_trees_add_up_too(recipe):
    values = recipe({"source": str(OASST1), "split": "by_hash", "policy": "all_paths", "weight": 1.4, "max_examples": 300}, dev_share=0.1)
    splits, counts, (found,) = taken(values)
    assert (found.form, found.unit, found.read) == ("oasst", "messages", sum(1 for _ in sources.read(str(OASST1))))
    for split in SPLITS:
        c = counts[split]
        assert len(splits[split]) == c.conversations + c.copies - c.duplicates - c.beyond_max - c.weighted_out > 0
        assert c.same_question == 0 or split != "validation"
        assert c.trees == len({conversation.group for conversation in splits[split]}) or split == "train"


# --- what is held out is not trained on


def test_a_conversation_that_is_held_out_is_dropped_and_one_with_its_question_counted_apart(tmp_path, recipe):
    train = [chat(1), chat(2), chat(2), chat(30, question="question 3"), chat(4)]
    values = recipe({
        "source": lines(tmp_path / "train.jsonl", train), "split": "published",
        "validation_source": lines(tmp_path / "held.jsonl", [chat(2), chat(3)]),
    })  # fmt: skip
    splits, counts, _ = taken(values)
    assert (counts["train"].conversations, counts["train"].duplicates, counts["train"].same_question) == (5, 2, 1)
    assert numbers(splits["train"]) == {1: 1, 4: 1}
    assert numbers(splits["validation"]) == {2: 1, 3: 1}


def test_what_one_set_holds_out_another_does_not_train_on(tmp_path, recipe):
    chats = [chat(i) for i in range(200)]
    alpaca = [{"instruction": m[0]["content"], "output": m[1]["content"]} for m in (one["messages"] for one in chats)]
    splits, counts, _ = taken(
        recipe(
            {"source": lines(tmp_path / "a.jsonl", chats), "split": "by_hash", "validation_share": 0.25},
            {"source": lines(tmp_path / "b.jsonl", alpaca)},
        )
    )
    assert 30 < len(splits["validation"]) < 70
    assert counts["train"].duplicates == len(splits["validation"])
    assert not numbers(splits["train"]).keys() & numbers(splits["validation"]).keys()
    assert set(numbers(splits["train"]).values()) == {2}


def test_the_same_conversation_is_not_in_train_and_dev_even_as_a_tree_and_as_a_chat(tmp_path, recipe):
    flat = [row.values for row in sources.read(str(OASST1))]
    policy = {"source": lines(tmp_path / "trees.jsonl", flat), "policy": "all_replies"}
    trees, _, _ = taken(recipe(policy))
    as_chats = [{"messages": [{"role": t.role, "content": t.content} for t in c.turns]} for c in trees["train"][:300]]
    both = recipe(policy, {"source": lines(tmp_path / "chats.jsonl", as_chats)}, dev_share=0.3)
    splits, counts, _ = taken(both)
    said = {split: {tuple((t.role, t.content) for t in c.turns) for c in found} for split, found in splits.items()}
    assert counts["train"].duplicates > 30
    assert said["dev"]
    assert not said["train"] & said["dev"]


def test_a_tree_in_train_and_validation_is_refused(tmp_path, recipe):
    flat = [row.values for row in sources.read(str(OASST1))]
    first = flat[0]["message_tree_id"]
    held_out = lines(tmp_path / "held.jsonl", [m for m in flat if m["message_tree_id"] == first])
    values = recipe({"source": str(OASST1), "split": "published", "validation_source": held_out, "policy": "all_paths"})
    with pytest.raises(ValueError, match=rf"1 trees stand in both train and validation, e\.g\. {first}"), selected(values):
        pass
    assert not list((tmp_path / "out").glob(".*tmp"))


# --- weights


@pytest.mark.parametrize(("weight", "once", "twice"), [(2, 0, 1), (0.25, 0.25, 0), (1.3, 0.7, 0.3), (1, 1, 0)])
def test_a_weight_is_how_often_a_conversation_is_taken(tmp_path, recipe, weight, once, twice):
    values = recipe({"source": lines(tmp_path / "a.jsonl", [chat(i) for i in range(4000)]), "weight": weight})
    splits, counts, _ = taken(values)
    times = Counter(numbers(splits["train"]).values())
    assert times[1] / 4000 == pytest.approx(once, abs=0.03)
    assert times[2] / 4000 == pytest.approx(twice, abs=0.03)
    assert set(times) <= {1, 2}
    assert (counts["train"].copies, counts["train"].weighted_out) == (times[2], 4000 - times[1] - times[2])


def test_a_second_copy_has_a_key_of_its_own_behind_the_first(tmp_path, recipe):
    splits, _, _ = taken(recipe({"source": lines(tmp_path / "a.jsonl", [chat(1), chat(2)]), "weight": 3}))
    assert [c.key for c in splits["train"]] == [f"a.jsonl:{n}{copy}" for n in (1, 2) for copy in ("", "#2", "#3")]
    assert numbers(splits["train"]) == {1: 3, 2: 3}


def test_weights_take_the_same_whatever_the_order_and_the_other_sets(tmp_path, recipe):
    rows, other = [chat(i) for i in range(500)], [chat(i) for i in range(1000, 1300)]
    shuffled = random.Random(1).sample(rows, len(rows))
    one = {"source": lines(tmp_path / "a.jsonl", rows), "weight": 1.3}
    alone, again = (numbers(taken(recipe(one))[0]["train"]) for _ in range(2))
    moved = numbers(taken(recipe(one | {"source": lines(tmp_path / "b.jsonl", shuffled)}))[0]["train"])
    beside = numbers(taken(recipe({"source": lines(tmp_path / "c.jsonl", other), "weight": 0.5}, one))[0]["train"])
    assert alone == again == moved == Counter({n: times for n, times in beside.items() if n < 1000})
    assert 80 < len([n for n in beside if n >= 1000]) < 220


def test_a_small_weight_is_no_part_of_the_cut_that_max_examples_makes(tmp_path, recipe):
    """Both are by hashes: were they the same hash, a weight of 0.5 would keep all or none of the first half."""
    splits, counts, _ = taken(
        recipe({"source": lines(tmp_path / "a.jsonl", [chat(i) for i in range(2000)]), "max_examples": 1000, "weight": 0.5})
    )
    assert counts["train"].beyond_max == 1000
    assert 430 < len(splits["train"]) < 570


def test_held_out_conversations_are_not_weighted(tmp_path, recipe):
    one = {"source": lines(tmp_path / "a.jsonl", [chat(i) for i in range(300)]), "split": "by_hash"}
    plain, _, _ = taken(recipe(one, dev_share=0.2))
    weighted, _, _ = taken(recipe(one | {"weight": 0.1, "max_examples": 5}, dev_share=0.2))
    assert plain["dev"] == weighted["dev"]
    assert plain["validation"] == weighted["validation"]
    assert len(weighted["train"]) <= 5 < len(plain["train"])


# --- caps and several sets


def test_max_examples_is_a_cap_for_each_set(tmp_path, recipe):
    sets = [
        {"source": lines(tmp_path / f"{name}.jsonl", [chat(i) for i in range(start, start + 50)]), **more}
        for name, start, more in (("a", 0, {"max_examples": 7}), ("b", 100, {}), ("c", 200, {"max_examples": 20, "weight": 2}))
    ]
    splits, counts, _ = taken(recipe(*sets))
    found = numbers(splits["train"])
    assert [sum(found[i] for i in range(start, start + 50)) for start in (0, 100, 200)] == [7, 50, 40]
    assert (counts["train"].beyond_max, counts["train"].copies) == (43 + 30, 20)
    alone = numbers(taken(recipe(sets[0]))[0]["train"])
    assert set(alone) == {i for i in found if i < 50}


def test_a_cap_takes_the_same_conversations_whatever_their_order_and_file_order_stays(tmp_path, recipe):
    rows = [chat(i) for i in range(100)]
    shuffled = random.Random(2).sample(rows, 100)
    one, two = (
        taken(recipe({"source": lines(tmp_path / name, some), "max_examples": 30}))[0]["train"]
        for name, some in (("a.jsonl", rows), ("b.jsonl", shuffled))
    )
    assert numbers(one) == numbers(two)
    assert list(numbers(one)) == sorted(numbers(one))
    assert [int(c.key.split(":")[1]) for c in two] == sorted(int(c.key.split(":")[1]) for c in two)


def test_sets_of_several_forms_are_mixed_each_by_its_own_rules(tmp_path, recipe):
    sharegpt = [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]} for i in range(20)]
    alpaca = [{"frage": f"f{i}", "antwort": f"w{i}"} for i in range(10)] + [{"frage": "f", "antwort": 3}]
    fields = {"instruction": "frage", "output": "antwort"}
    values = recipe(
        {"source": str(OASST1), "split": "by_hash", "policy": "best_path", "filters": None},
        {"source": lines(tmp_path / "chats.jsonl", [*sharegpt, {"conversations": []}])},
        {"source": lines(tmp_path / "tasks.jsonl", alpaca), "form": "alpaca", "fields": fields, "max_examples": 4},
    )
    with selected(values) as selection:
        counts = {one.name.rpartition("/")[2]: (one.form, one.unit, one.read, dict(one.dropped)) for one in selection.sets}
        train, total = list(selection.splits["train"]), selection.num_read
        assert selection.unit == "messages and rows"
        manifest, _ = prepare(values, selection)
    assert counts == {
        OASST1.name: ("oasst", "messages", counts[OASST1.name][2], {"parent missing": 3}),
        "chats.jsonl": ("sharegpt", "rows", 21, {"empty": 1}),
        "tasks.jsonl": ("alpaca", "rows", 11, {"content is not text": 1}),
    }
    assert total == counts[OASST1.name][2] + 32 == manifest["counts"]["read"]
    assert [one["read"] for one in manifest["counts"]["sets"]] == [counts[OASST1.name][2], 21, 11]
    keys = [c.key for c in train]
    assert len([key for key in keys if key.startswith("2/chats.jsonl:")]) == 20
    assert len([key for key in keys if key.startswith("3/tasks.jsonl:")]) == 4
    trees = taken(recipe({"source": str(OASST1), "split": "by_hash", "policy": "best_path", "filters": None}))[0]
    assert [c for c in train if "jsonl" not in c.key] == trees["train"]
    for split in SPLITS:
        assert_adds_up(manifest["counts"][split], split)


def test_keys_are_their_own_even_for_files_of_one_name(tmp_path, recipe):
    for name in "ab":
        (tmp_path / name).mkdir()
    sets = [{"source": lines(tmp_path / name / "rows.jsonl", [chat(i) for i in range(5)]), "weight": 2} for name in "ab"]
    keys = [c.key for c in taken(recipe(*sets))[0]["train"]]
    assert len(keys) == len(set(keys)) == 20


# --- splits by hash


def split_numbers(recipe: Recipe) -> dict[str, set[int]]:
    return {split: set(numbers(found)) for split, found in taken(recipe)[0].items()}


def test_a_split_by_hash_stays_when_rows_are_reordered_and_added(tmp_path, recipe):
    rows = [chat(i) for i in range(400)]
    names = {"a": rows, "b": rows[::-1], "c": [chat(i) for i in range(400, 600)] + rows}
    one, turned, more = (
        split_numbers(recipe({"source": lines(tmp_path / f"{name}.jsonl", some), "split": "by_hash"}, dev_share=0.1))
        for name, some in names.items()
    )
    assert one == turned
    assert {split: {n for n in found if n < 400} for split, found in more.items()} == one
    assert 50 < len(one["validation"]) < 110  # a fifth
    assert 15 < len(one["dev"]) < 55  # a tenth of the rest
    assert sum(map(len, one.values())) == 400


def test_chats_of_one_first_question_stay_on_one_side(tmp_path, recipe):
    rows = [chat(i, question=f"question {i % 40}") for i in range(400)]
    sides = split_numbers(recipe({"source": lines(tmp_path / "a.jsonl", rows), "split": "by_hash"}, dev_share=0.2))
    assert all(sides.values())
    questions = [{n % 40 for n in found} for found in sides.values()]
    assert sum(map(len, questions)) == len(set().union(*questions)) == 40


# --- replies of a wanted length


def test_replies_of_another_length_become_context(tmp_path, recipe):
    two = {"messages": [*chat(1, words=1)["messages"], *chat(2, words=5)["messages"]]}
    rows = [two, chat(3, words=1), chat(4, words=5), chat(5, words=6), {"messages": [{"role": "user", "content": "hm"}]}]
    values = recipe({"source": lines(tmp_path / "a.jsonl", rows), "replies": {"min_words": 2, "max_words": 5}})
    splits, counts, _ = taken(values)
    train = counts["train"]
    assert (train.conversations, train.replies_outside, train.no_reply) == (5, 3, 2)
    assert [[t.learn for t in c.turns if t.role == "assistant"] for c in splits["train"]] == [[False, True], [True], []]
    assert [t.content for t in splits["train"][0].turns] == [m["content"] for m in two["messages"]]


@pytest.mark.parametrize(("words", "least", "most", "stays"), [(2, 2, None, True), (1, 2, None, False), (4, 1, 4, True), (5, 1, 4, False)])
def test_the_limits_of_a_reply_belong_to_it(tmp_path, recipe, words, least, most, stays):
    replies = {"min_words": least, "max_words": most}
    rows = [chat(1, words=words), chat(2, words=3)]
    assert (1 in numbers(taken(recipe({"source": lines(tmp_path / "a.jsonl", rows), "replies": replies}))[0]["train"])) is stays


def test_conversations_are_weighted_by_the_mean_length_of_what_is_learnt(tmp_path, recipe):
    long_context = {"messages": [{**m, "train": False} for m in chat(7, words=90)["messages"]] + chat(8, words=3)["messages"]}
    mean_of_four = {"messages": [*chat(1, words=1)["messages"], *chat(9, words=7)["messages"]]}
    rows = [chat(1, words=3), chat(2, words=4), chat(3, words=10), chat(4, words=11), mean_of_four, long_context]
    weights = [{"up_to_words": 3, "weight": 0}, {"up_to_words": 10, "weight": 2}]
    one = {"source": lines(tmp_path / "a.jsonl", rows), "replies": {"weights": weights}}
    assert numbers(taken(recipe(one))[0]["train"]) == {2: 2, 3: 2, 4: 1, 9: 2}
    one["replies"] = {"weights": [*weights, {"weight": 3}]}
    assert numbers(taken(recipe(one | {"weight": 2}))[0]["train"]) == {2: 4, 3: 4, 4: 6, 9: 4}


def test_a_prompt_without_an_answer_has_no_weight_by_its_length():
    weights = Replies.model_validate({"weights": ({"up_to_words": 3, "weight": 0}, {"weight": 2})})
    asked = (Turn("user", "why?"), Turn("assistant", ""))
    assert [_weight(Conversation("k", ("k",), "g", turns), weights) for turns in (asked, (asked[0], Turn("assistant", "so")))] == [1, 0]


def test_texts_that_begin_with_the_same_marker_do_not_hold_each_other_out_and_those_of_one_question_stay_together(tmp_path, recipe):
    poems = lines(tmp_path / "a.jsonl", [{"text": f"<poem>number {i}"} for i in range(60)])
    keys = {"split": "by_hash", "learn_after": "<poem>"}
    found, counts, _ = taken(recipe({"source": poems, **keys}, format="text", dev_share=0.1))
    assert sum(map(len, found.values())) == 60
    assert all(found[split] for split in SPLITS)
    asked = lines(tmp_path / "b.jsonl", [{"text": f"question {i % 20} A: answer {i}"} for i in range(200)])
    found, counts, _ = taken(recipe({"source": asked, "split": "by_hash", "learn_after": "A:"}, format="text", dev_share=0.1))
    questions = {split: {c.turns[0].content for c in found[split]} for split in SPLITS}
    assert sum(map(len, questions.values())) == len(set().union(*questions.values())) == 20
    assert counts["train"].same_question == counts["dev"].same_question == 0


# --- what does not go together


@pytest.mark.parametrize(
    ("rows", "keys", "format", "words"),
    [
        ([{"text": "x"}], {"policy": "all_paths"}, "oasst", "data.policy: all_paths has no effect on text rows"),
        ([{"message_id": "a", "parent_id": None}], {}, "oasst", "data.policy must say which conversations to take"),
        ([chat(1)], {"filters": {"languages": ["en"]}}, "oasst", "data.filters have no effect on messages rows"),
        ([{"text": "x"}], {}, "oasst", "are of form text, and chat.format is oasst; set chat.format: text"),
        ([chat(1)], {}, "text", "are of form messages, and chat.format is text; choose another chat.format"),
        ([chat(1)], {"learn_after": ["A:"]}, "text", "are of form messages, and chat.format is text"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_the_rows_are_refused(tmp_path, recipe, rows, keys, format, words):
    with pytest.raises(ValueError) as caught, selected(recipe({"source": lines(tmp_path / "a.jsonl", rows), **keys}, format=format)):  # noqa: PT011
        pass
    assert words in str(caught.value)
    assert not list((tmp_path / "out").glob(".*tmp"))


def test_two_splits_of_different_forms_are_refused(tmp_path, recipe):
    alpaca = lines(tmp_path / "b.jsonl", [{"instruction": "x", "output": "y"}])
    values = recipe({"source": lines(tmp_path / "a.jsonl", [chat(1)]), "split": "published", "validation_source": alpaca})
    with pytest.raises(ValueError, match="has rows of form messages, the validation split of form alpaca"), selected(values):
        pass


def test_a_list_of_files_of_two_forms_is_refused_even_if_the_second_comes_late(tmp_path, recipe):
    first = lines(tmp_path / "a.jsonl", [chat(i) for i in range(500)])
    other = lines(tmp_path / "b.jsonl", [{"instruction": "x", "output": "y"}])
    words = r"b\.jsonl is of form alpaca, the rows before it of form messages; give each a place in data\.sets"
    with pytest.raises(ValueError, match=words), selected(recipe({"source": [first, other]})):
        pass
    found, _, sets = taken(recipe({"source": first}, {"source": other}))
    assert (len(found["train"]), [one.taken for one in sets]) == (501, [500, 1])


# --- nothing stays behind


def test_a_selection_leaves_no_folder(tmp_path, recipe):
    values = recipe({"source": lines(tmp_path / "a.jsonl", [chat(1)])})
    with selected(values) as selection:
        assert isinstance(selection, Selection)
        assert list((tmp_path / "out").glob(".*tmp"))
    assert not list((tmp_path / "out").iterdir())

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), selected(values, interrupted):
        pass
    assert not list((tmp_path / "out").iterdir())
