"""Pairs of a chosen and a rejected answer, prepared: each is one row of two conversations, or counted where it was left out."""

import gzip
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import OASST1, ROOT, MakeRecipe
from in_process import script
from transformers import AutoTokenizer

from qlora_suite import dataset, preflight_checks
from qlora_suite.base_config import load_config
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation
from qlora_suite.dataset import Rows, load_manifest, read_conversations
from qlora_suite.files import write_json
from qlora_suite.preparation import prepare
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load
from qlora_suite.role_markers import RoleMarkers
from qlora_suite.selection import SPLITS, selected

TREES = ("data.policy=preference_pairs", "data.packing=false", "dpo={}", "data.max_length=8192")
ROWS = ("data.policy=null", "data.packing=false", "dpo={}", "data.split=all", "data.dev_share=0.0")


def prepared(recipe: Recipe, **options: Any) -> dict[str, Any]:
    with selected(recipe) as selection:
        prepare(recipe, selection, **options)
    return load_manifest(recipe)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def rows_of(recipe: Recipe, split: str = "train") -> Rows:
    return Rows(Path(recipe.data.prepared) / f"{split}.arrow")


def renderer_of(recipe: Recipe) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(Path(recipe.data.prepared) / "tokenizer")
    return Renderer(tokenizer, recipe.chat, RoleMarkers(**load_manifest(recipe)["role_markers"]))


def halves_of(rows: Rows) -> Iterator[tuple[str, list[tuple[list[int], list[bool]]]]]:
    """(key, (ids, flags) of the chosen and of the rejected conversation) of each row."""
    for number in range(len(rows)):
        row, keys = rows[number], rows.examples(number)
        assert len(row["lengths"]) == 2
        assert keys[0] == keys[1]
        ends = (slice(0, row["lengths"][0]), slice(row["lengths"][0], None))
        yield keys[0], [(row["input_ids"][part].tolist(), row["supervised"][part].tolist()) for part in ends]


def assert_adds_up(counts: dict[str, Any]) -> None:
    """Every conversation is a row, or counted as what became of it."""
    for split in SPLITS:
        c = counts[split]
        chosen = (
            c["conversations"] + c["copies"] - c["no_reply"] - c["duplicates"] - c["same_question"] - c["beyond_max"] - c["weighted_out"]
        )
        assert chosen == c["kept"] + c["unanswered"] + c["nothing_new"] + c["refused"] + c["dropped_too_long"] + c["same_answers"], split
        assert c["pairs"] == c["kept"]
        if split != "validation":
            assert c["rows"] == c["pairs"]
            assert c["supervised"] == c["chosen"] + c["rejected"]


def test_every_pair_of_the_real_file_is_a_row_of_two_rendered_conversations(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe(f"data.source={OASST1}", *TREES, "data.filters=null", "data.dev_share=0.1"))
    with selected(recipe) as selection:
        pairs = {c.key: c for split in SPLITS for c in selection.splits[split]}
        manifest, _ = prepare(recipe, selection)
    counts = manifest["counts"]
    assert manifest["pairs"] is True
    assert sum(counts[split]["conversations"] for split in SPLITS) == len(pairs) == 1026
    assert [sum(counts[split][key] for split in SPLITS) for key in ("same_answers", "dropped_too_long")] == [1, 0]
    assert_adds_up(counts)

    renderer, seen = renderer_of(recipe), []
    for split in ("train", "dev"):
        for key, halves in halves_of(rows_of(recipe, split)):
            seen.append(key)
            for half, (ids, flags) in zip(pairs[key].chosen_and_rejected(), halves, strict=True):
                rendered = renderer.render(half)
                answer = rendered.turns[-1]
                assert ids == rendered.ids
                assert flags == [False] * answer.start + [True] * (len(ids) - answer.start), "the last answer alone is learnt"
                assert renderer.answer_text(ids[answer.start :]) == half.turns[-1].content
                assert len(ids) == answer.end + 1, "and its end token"
    held_out = read_conversations(Path(recipe.data.prepared) / "validation.arrow")
    seen += [one.key for one in held_out]
    assert len(held_out) == counts["validation"]["pairs"] > 100
    assert all(one == pairs[one.key] for one in held_out)
    assert len(seen) == len(set(seen)) == 1025
    (equal,) = pairs.keys() - set(seen)
    assert pairs[equal].rejected.strip() == pairs[equal].turns[-1].content.strip()


def test_pairs_of_one_tree_stand_in_one_split(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe(f"data.source={OASST1}", *TREES, "data.policy=conciseness_pairs", "data.dev_share=0.2"))
    with selected(recipe) as selection:
        groups = [{c.group for c in selection.splits[split]} for split in SPLITS]
    assert all(groups)
    assert sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.parametrize("policy", ["preference_pairs", "conciseness_pairs"])
def test_pairs_that_people_ranked_otherwise_and_those_with_the_longer_answer_chosen_are_counted(
    make_recipe: MakeRecipe, policy: str
) -> None:
    recipe = load(make_recipe(f"data.source={OASST1}", *TREES, f"data.policy={policy}", "data.dev_share=0.1"))
    counts = prepared(recipe)["counts"]
    with gzip.open(OASST1, "rt", encoding="utf-8") as file:
        messages = {m["message_id"]: m for m in map(json.loads, file)}
    held_out = read_conversations(Path(recipe.data.prepared) / "validation.arrow")
    keys = {split: [key for key, _ in halves_of(rows_of(recipe, split))] for split in ("train", "dev")}
    for split, keys_of_split in {**keys, "validation": [one.key for one in held_out]}.items():
        pairs = [[messages[name] for name in key.split(">")] for key in keys_of_split]
        assert counts[split]["rejected_outranks"] == sum(chosen["rank"] > rejected["rank"] for chosen, rejected in pairs), split
        longer = sum(len(chosen["text"].split()) > len(rejected["text"].split()) for chosen, rejected in pairs)
        assert counts[split]["chosen_longer"] == longer, split
    sums = {name: sum(counts[split][name] for split in SPLITS) for name in ("rejected_outranks", "chosen_longer")}
    assert [name for name, number in sums.items() if number] == ["chosen_longer" if policy == "preference_pairs" else "rejected_outranks"]
    assert sum(one.rejected_outranks for one in held_out) == counts["validation"]["rejected_outranks"]


def test_the_same_pairs_are_taken_whatever_the_order_of_the_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [pair(f"question {i % 60}", f"good {i}", f"bad {i}") for i in range(200)]
    found = []
    for number in range(2):
        source = write_lines(tmp_path / f"{number}.jsonl", rows)
        random.Random(0).shuffle(rows)
        keys = (*ROWS, "data.split=by_hash", "data.dev_share=0.2", "data.weight=0.6", "data.max_examples=90")
        recipe = load(make_recipe(f"data.source={source}", *keys, f"data.prepared={tmp_path / f'p{number}'}"))
        assert_adds_up(prepared(recipe)["counts"])
        of_splits = [sorted(map(repr, (halves for _, halves in halves_of(rows_of(recipe, split))))) for split in ("train", "dev")]
        held_out = read_conversations(Path(recipe.data.prepared) / "validation.arrow")
        found.append([*of_splits, sorted((c.turns[-1].content, c.rejected) for c in held_out)])
    assert found[0] == found[1]
    assert all(found[0])


def test_pairs_that_differ_in_the_rejected_answer_alone_are_two_and_a_held_out_one_is_not_trained_on(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    held_out = write_lines(tmp_path / "held.jsonl", [pair("q", "good", "bad")])
    source = write_lines(tmp_path / "train.jsonl", [pair("q", "good", "bad"), pair("q", "good", "worse"), pair("other", "good", "bad")])
    recipe = load(make_recipe(f"data.source={source}", *ROWS, "data.split=published", f"data.validation_source={held_out}"))
    counts = prepared(recipe)["counts"]["train"]
    assert (counts["duplicates"], counts["same_question"], counts["pairs"]) == (1, 1, 1)


def test_a_second_copy_of_a_pair_is_a_pair(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [pair("q", "good", "bad")])
    recipe = load(make_recipe(f"data.source={source}", *ROWS, "data.weight=2.0"))
    assert_adds_up(prepared(recipe)["counts"])
    (first, halves), (second, again) = halves_of(rows_of(recipe))
    assert (first, second) == ("a.jsonl:1", "a.jsonl:1#2")
    assert halves == again


# --- lengths in words


def test_the_limits_of_a_reply_hold_for_both_answers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [pair("q", "a b", "a b c"), pair("q", "a", "a b"), pair("q", "a b", "a"), pair("q", "a b", "a b c d"), pair("q", "x y", "z z")]
    source = write_lines(tmp_path / "a.jsonl", rows)
    recipe = load(make_recipe(f"data.source={source}", *ROWS, "data.replies.min_words=2", "data.replies.max_words=3"))
    with selected(recipe) as selection:
        assert [c.key for c in selection.splits["train"]] == ["a.jsonl:1", "a.jsonl:5"]
        assert selection.counts["train"].no_reply == 3
        manifest, _ = prepare(recipe, selection)
    assert_adds_up(manifest["counts"])


def test_a_pair_is_weighted_by_the_mean_length_of_its_answers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [pair("q", "a", "a b c"), pair("r", "a", "a b c d")])
    recipe = load(make_recipe(f"data.source={source}", *ROWS, "data.replies.weights=[{up_to_words: 2, weight: 3}, {weight: 0}]"))
    with selected(recipe) as selection:
        assert [c.key for c in selection.splits["train"]] == ["a.jsonl:1", "a.jsonl:1#2", "a.jsonl:1#3"]


# --- what does not fit


def test_each_half_is_cut_by_itself_and_a_pair_without_both_is_left_out(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    long = " ".join(f"number {i}" for i in range(40))
    rows = [
        pair("short", "good", "bad"),  # fits
        pair("one long", "good", long),  # the rejected half is cut
        pair("other long", long + " x", "bad"),  # the chosen half
        pair("same start", long + " x", long + " y"),  # what fits is the same
        pair("no room " + long, "good", "bad"),  # nothing of either answer fits
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    whole = load(make_recipe(f"data.source={source}", *ROWS, "data.max_length=4096"))
    before = prepared(whole)["counts"]["train"]
    of_whole = dict(halves_of(rows_of(whole)))
    for too_long, kept, same, dropped in (("truncate", [1, 2, 3], 1, 1), ("drop", [1], 0, 4)):
        keys = ("data.max_length=40", f"data.too_long={too_long}", f"data.prepared={tmp_path / too_long}")
        recipe = load(make_recipe(f"data.source={source}", *ROWS, *keys))
        counts = prepared(recipe)["counts"]
        assert_adds_up(counts)
        c = counts["train"]
        assert (c["pairs"], c["same_answers"], c["dropped_too_long"], c["cut_conversations"]) == (len(kept), same, dropped, len(kept) - 1)
        everything = c["supervised"] + c["cut_tokens"] + c["dropped_tokens"]
        assert everything == before["supervised"], "every token is learnt, or counted as cut or as dropped with its pair"
        assert (c["cut_tokens"] > 0) is (c["cut_bytes"] > 0) is (too_long == "truncate")
        found = dict(halves_of(rows_of(recipe)))
        assert list(found) == [f"a.jsonl:{number}" for number in kept]
        for key, halves in found.items():
            assert halves == [(ids[:40], flags[:40]) for ids, flags in of_whole[key]]


def test_one_half_that_does_not_fit_leaves_out_the_pair(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [pair("q", "good", "bad"), pair("q", "good", " ".join(["very"] * 60) + " bad")]
    recipe = load(make_recipe(f"data.source={write_lines(tmp_path / 'a.jsonl', rows)}", *ROWS, "data.max_length=40", "data.too_long=drop"))
    counts = prepared(recipe)["counts"]["train"]
    assert (counts["pairs"], counts["dropped_too_long"], counts["same_answers"]) == (1, 1, 0)


def test_nothing_left_is_one_sentence_about_pairs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [pair("q", "a " * 90 + "b", "a " * 90 + "c")])
    recipe = load(make_recipe(f"data.source={source}", *ROWS, "data.max_length=40"))
    with pytest.raises(ValueError, match="no pair is left to train on: of 1 rows read, these were left out: 1 with two equal answers"):
        prepared(recipe)


# --- formats


def qwen(tiny_base: Path, folder: Path) -> Path:
    """The tiny base with Qwen3's template, which writes earlier answers without their thoughts, and so in another way."""
    base = shutil.copytree(tiny_base, folder / "thinking")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (ROOT / "tests" / "templates" / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize("way", ["last_turn", "each_turn"])
def test_where_a_template_rewrites_history_both_answers_are_last_turns(
    make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path, way: str
) -> None:
    asked = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b c"), ("user", "d"))]
    source = write_lines(tmp_path / "a.jsonl", [pair(asked, "good", "bad")] * 3)
    format = (f"model.base={qwen(tiny_base, tmp_path)}", "chat.format=model", f"chat.rewritten_history={way}")
    recipe = load(make_recipe(f"data.source={source}", *ROWS, *format))
    counts = prepared(recipe)["counts"]
    assert_adds_up(counts)
    assert (counts["train"]["pairs"], counts["train"]["rewritten"]) == (3, 0)
    decode = AutoTokenizer.from_pretrained(Path(recipe.data.prepared) / "tokenizer").decode
    for _, halves in halves_of(rows_of(recipe)):
        learnt = [decode([i for i, flag in zip(ids, flags, strict=True) if flag]) for ids, flags in halves]
        assert learnt == [f"<think>\n\n</think>\n\n{answer}<|im_end|>" for answer in ("good", "bad")]
        assert all("b c" in decode(ids) for ids, _ in halves), "as context"


@pytest.mark.parametrize("format", ["human_assistant", "instruct_output", "llama2", "chatml"])
def test_pairs_are_written_in_every_format(make_recipe: MakeRecipe, tmp_path: Path, format: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", [pair("q", "good", "bad", system="S")])
    recipe = load(make_recipe(f"data.source={source}", *ROWS, f"chat.format={format}"))
    assert prepared(recipe)["counts"]["train"]["pairs"] == 1
    ((_, halves),) = halves_of(rows_of(recipe))
    renderer = renderer_of(recipe)
    answers = [renderer.answer_text([i for i, flag in zip(ids, flags, strict=True) if flag]) for ids, flags in halves]
    assert answers == ["good", "bad"]


def test_what_the_chat_format_cannot_write_is_a_pair_less(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render = Renderer.render

    def refusing(self: Renderer, conversation: Conversation) -> Any:
        if conversation.turns[-1].content == "bad 1":
            raise ValueError(f"conversation {conversation.key}: that cannot be written")
        return render(self, conversation)

    monkeypatch.setattr(Renderer, "render", refusing)
    source = write_lines(tmp_path / "a.jsonl", [pair("q", f"good {i}", f"bad {i}") for i in range(3)])
    recipe = load(make_recipe(f"data.source={source}", *ROWS))
    counts = prepared(recipe)["counts"]
    assert_adds_up(counts)
    assert (counts["train"]["refused"], counts["train"]["pairs"]) == (1, 2)
    named = json.loads((Path(recipe.data.prepared) / "bad_rows.jsonl").read_text())
    assert (named["place"], named["reason"]) == ("a.jsonl:2", "the chat format cannot write it")


def test_texts_that_look_like_markers_are_counted_in_both_answers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [pair("q", "<|endoftext|>", "bad <|endoftext|> <|endoftext|>")])
    recipe = load(make_recipe(f"data.source={source}", *ROWS))
    assert prepared(recipe)["counts"]["train"]["control_texts"] == 3


# --- what does not go together


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        ([pair("q", "a", "b")], (), "are pairs of a chosen and a rejected answer, on which dpo trains: add dpo: {} to the recipe"),
        ([pair("q", "a", "b")], ("chat.format=text",), "are pairs of a chosen and a rejected answer"),
        ([{"prompt": "q", "completion": "a"}], ROWS[1:3], "dpo trains on pairs, and the rows of"),
        ([{"prompt": "q", "completion": "a"}], ROWS[1:3], "are of form prompt; give rows with chosen and rejected, or OASST trees"),
        ([{"text": "q"}], ROWS[1:3], "are of form text; give rows with chosen and rejected"),
        ([pair("q", "a", "b")], (*ROWS[1:3], "data.policy=preference_pairs"), "data.policy: preference_pairs has no effect on pairs rows"),
        ([pair("q", "a", "b")], (*ROWS[1:3], "data.filters.languages=[en]"), "data.filters have no effect on pairs rows"),
    ],
)
def test_pairs_and_dpo_need_each_other(make_recipe: MakeRecipe, tmp_path: Path, rows: list[Any], overrides: Any, words: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows)
    recipe = load(make_recipe(f"data.source={source}", "data.policy=null", *overrides))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        prepared(recipe)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*tmp"))


def test_pairs_and_other_rows_are_not_mixed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", [pair("q", "a", "b")])
    b = write_lines(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}])
    sets = f"data.sets=[{{source: {a}, split: all}}, {{source: {b}, split: all}}]"
    for overrides, words in (
        (("dpo={}", "data.packing=false"), "dpo trains on pairs, and the rows of .*b.jsonl"),
        ((), "a.jsonl are pairs"),
    ):
        recipe = load(make_recipe("data.source=null", "data.policy=null", "data.split=published", sets, *overrides))
        with pytest.raises(ValueError, match=words):
            prepared(recipe)


def test_trees_and_rows_of_pairs_are_mixed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", [pair(f"q {i}", "good", "bad") for i in range(5)])
    sets = [{"source": str(OASST1), "split": "all", "policy": "conciseness_pairs"}, {"source": str(a), "split": "all"}]
    keys = ("data.source=null", "data.policy=null", "data.split=published", *ROWS[1:3], "data.dev_share=0.0", "data.max_length=4096")
    recipe = load(make_recipe(*keys, f"data.sets={json.dumps(sets)}"))
    counts = prepared(recipe)["counts"]
    assert_adds_up(counts)
    assert [(one["form"], one["taken"]) for one in counts["sets"]] == [("oasst", 557), ("pairs", 5)]
    assert counts["train"]["pairs"] == 562


def test_prepared_pairs_are_stale_without_dpo_and_other_data_with_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [pair("q", "good", "bad")])
    recipe = load(make_recipe(f"data.source={source}", *ROWS))
    manifest = prepared(recipe)
    load_manifest(load(recipe.command_line, ["dpo.beta=0.5", "dpo.length_normalized=true"]))
    with pytest.raises(ValueError, match=r"is stale: it holds pairs, and the recipe has no dpo; run: python scripts/prepare_data\.py"):
        load_manifest(load(recipe.command_line, ["dpo=null"]))
    path = Path(recipe.data.prepared) / dataset.MANIFEST
    write_json(path, dataset.sealed({**manifest, "pairs": False}))
    with pytest.raises(ValueError, match="is stale: the recipe has dpo, and it holds no pairs"):
        load_manifest(recipe)
    write_json(path, dataset.sealed({key: value for key, value in manifest.items() if key != "pairs"}))
    with pytest.raises(ValueError, match="is not a manifest of prepared data"):
        load_manifest(recipe)


# --- for people


def test_the_script_shows_pairs_lists_them_and_writes_what_can_be_read_again(make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    recipe = make_recipe(f"data.source={OASST1}", *TREES, "data.max_length=512", "evaluation.every_steps=5")
    ids, export = tmp_path / "ids.tsv", tmp_path / "pairs.jsonl"
    script("prepare_data").run(load(recipe), str(ids), str(export))
    shown = capsys.readouterr().out
    words = [line.split() for line in shown.splitlines()]
    counts = load_manifest(load(recipe))["counts"]
    assert ["pairs", "kept", *(f"{counts[split]['pairs']:,}" for split in SPLITS)] in words
    assert ["of", "them,", "of", "rejected", "answers", *(f"{counts[split]['rejected']:,}" for split in SPLITS[:2]), "-"] in words
    assert "conversations kept" not in shown
    _, chosen, rejected = shown.split("; what is compared is in ⟦ ⟧")
    assert chosen.count("⟦") == 1
    assert "⟦" in rejected
    assert "data.too_long: drop compares whole answers alone" in " ".join(shown.split())

    listed = [line.split("\t") for line in ids.read_text().splitlines()]
    assert len(listed) == len({key for key, _ in listed}) == sum(counts[split]["conversations"] for split in SPLITS) == 1022
    for key, named in listed:
        _, better, worse = named.split(" ")
        assert key == f"{better}>{worse}"
    written = [json.loads(line) for line in export.read_text().splitlines()]
    assert [line["key"] for line in written] == [key for key, _ in listed]

    again = load(make_recipe(f"data.source={export}", *ROWS, "data.max_length=512", f"data.prepared={tmp_path / 'again'}"))
    with selected(again) as selection:
        read = [(c.turns, c.rejected) for c in selection.splits["train"]]
        assert selection.dropped == {"chosen and rejected are the same answer": 1}
    with selected(load(recipe)) as selection:
        trees = [(c.turns, c.rejected) for split in SPLITS for c in selection.splits[split]]
    assert sorted(map(repr, read)) == sorted(repr(one) for one in trees if one[0][-1].content.strip() != one[1].strip())


def test_inspection_shows_pairs_and_lines_that_prepare_them(make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    rows = [pair(f"question {i}", "a good answer", "a bad answer of more words") for i in range(30)]
    file = write_lines(tmp_path / "a.jsonl", [*rows, pair("q", "same", "same"), pair("q", "x", None)])
    base = load(ROOT / "recipes" / "my_chat_data.yaml", [f"model.base={ROOT / 'assets' / 'tiny_phi'}"])
    script("prepare_data").show_inspection(base, str(file))
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["pairs", "30;", "turns:", "user", "30,", "assistant", "30"] in lines
    assert ["words,", "chosen", "3", "3", "3", "3"] in lines
    assert ["words,", "rejected", "6", "6", "6", "6"] in lines
    for words in (
        "1: chosen and rejected are the same answer",
        "1: no text and no list of messages",
        "a.jsonl line 32",
        "the rejected answer; what is compared",
    ):
        assert words in shown
    pasted = yaml.safe_load(shown.split("in place of the sections data, chat and dpo of a recipe:")[1])
    assert (pasted["data"]["form"], pasted["data"]["packing"], pasted["dpo"]) == ("pairs", False, {"beta": 0.1})
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in pasted["data"].items()]
    recipe = load(make_recipe("data.policy=null", *overrides, f"dpo={json.dumps(pasted['dpo'])}"))
    assert_adds_up(prepared(recipe)["counts"])


def test_inspection_of_trees_shows_the_pairs_that_the_recipe_wants(make_recipe: MakeRecipe, capsys) -> None:
    recipe = load(make_recipe(*TREES, "data.policy=conciseness_pairs", "data.pairs.shorter=0.5"))
    script("prepare_data").show_inspection(recipe, str(OASST1))
    shown = capsys.readouterr().out
    pasted = yaml.safe_load(shown.split("of a recipe:")[1])
    assert pasted["data"]["policy"] == "conciseness_pairs"
    assert pasted["data"]["pairs"] == {"shorter": 0.5}
    assert "pairs           348; turns" in shown


def test_whole_pairs_that_are_dropped_are_not_called_cut(make_recipe: MakeRecipe, capsys) -> None:
    keys = (f"data.source={OASST1}", *TREES, "data.max_length=512", "data.too_long=drop", "evaluation.every_steps=5")
    recipe = load(make_recipe(*keys))
    script("prepare_data").run(recipe)
    shown = capsys.readouterr().out
    manifest = load_manifest(recipe)
    counts = manifest["counts"]["train"]
    dropped, share = counts["dropped_tokens"], counts["dropped_tokens"] / (counts["dropped_tokens"] + counts["supervised"])
    assert counts["cut_tokens"] == counts["cut_conversations"] == 0
    rows = {line.rstrip()[:40].strip(): line.split()[-3:] for line in shown.splitlines() if line.count("  ") > 2}
    assert rows["supervised tokens dropped as too long"] == [f"{dropped:,}", f"{manifest['counts']['dev']['dropped_tokens']:,}", "-"]
    assert rows["dropped: too long"][2] == "-", "nothing is dropped from the validation split here"
    assert "the validation split is kept whole; scripts/evaluate.py says what of it does not fit" in shown
    assert f"{counts['dropped_too_long']} pairs left out as longer than data.max_length: 512, {share:.0%} of what there is" in shown
    assert " cut" not in shown.replace("is cut by a hash", "")

    found = preflight_checks.data_findings(recipe, manifest, rows_of(recipe), rows_of(recipe, "dev"), load_config(recipe.model))
    (cut,) = [one for one in found if one.what == "cut"]
    all_pairs = counts["kept"] + counts["dropped_too_long"]
    lost = f"{counts['dropped_too_long']} ({counts['dropped_too_long'] / all_pairs:.1%}) are dropped"
    assert (cut.level, cut.text) == ("look", f"of {all_pairs} pairs at 512 tokens: {lost}")


def test_what_is_empty_of_a_pair_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": " "}]
    rows = [pair("q", "good", "bad"), pair("q", "", "bad"), pair("q", "good", "  "), pair("", "good", "bad"), pair("q", "good", said)]
    recipe = load(make_recipe(f"data.source={write_lines(tmp_path / 'a.jsonl', rows)}", *ROWS))
    with selected(recipe) as selection:
        assert [(bad.reason, bad.key, bad.value) for bad in selection.bad_rows] == [
            ("empty", "chosen", '""'),
            ("empty", "rejected", '"  "'),
            ("empty", "prompt", '""'),
            ("empty", "rejected", '" "'),
        ]
