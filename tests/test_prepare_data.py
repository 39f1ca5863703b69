"""scripts/prepare_data.py: what it writes, what it counts, and what it says when it cannot."""

import gzip
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import ROOT, MakeRecipe, run_script
from transformers import AutoTokenizer

from qlora_suite import dataset
from qlora_suite.chat import Renderer
from qlora_suite.command_line import with_clear_errors
from qlora_suite.conversations import Conversation
from qlora_suite.dataset import MANIFEST, Rows, load_manifest, read_conversations
from qlora_suite.files import folder_aside, read_json, write_json
from qlora_suite.recipe import Recipe, curve_keys, names_files
from qlora_suite.recipe_file import load
from qlora_suite.rendered import Rendered
from qlora_suite.selection import SPLITS
from qlora_suite.train_prompts import read_prompts

ASSET = ROOT / "assets" / "oasst1_en_validation.jsonl.gz"


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """scripts/prepare_data.py as a module: starting a process for each test would take longer than the tests."""
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts" / "prepare_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(script: ModuleType, recipe: Recipe, ids: Path | None = None, export: Path | None = None, **options: Any) -> dict[str, Any]:
    """Run the script; returns the manifest."""
    script.run(recipe, str(ids) if ids else None, str(export) if export else None, **options)
    return load_manifest(recipe)


def rows_of(recipe: Recipe, split: str = "train") -> Rows:
    return Rows(Path(recipe.data.prepared) / f"{split}.arrow")


def validation_of(recipe: Recipe) -> list[Conversation]:
    return read_conversations(Path(recipe.data.prepared) / "validation.arrow")


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(script: ModuleType, recipe: Recipe, capsys: pytest.CaptureFixture[str], strict: bool = False) -> str:
    """What a person sees: one sentence, exit code 2, no traceback."""
    with pytest.raises(SystemExit) as ended:
        with_clear_errors(lambda: script.run(recipe, None, None, strict), debug=False)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    return shown


# --- what is written


def test_run_again_it_reuses_what_is_there(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    first, second = run_script("prepare_data.py", recipe), run_script("prepare_data.py", recipe)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "preparing" in first.stdout
    assert "up to date" in second.stdout
    assert "preparing" not in second.stdout
    manifest = dataset.load_manifest(load(recipe))
    assert manifest["counts"]["train"]["supervised"] > 0
    assert json.dumps(manifest["role_markers"]["token_ids"]) == "[1024, 1025]"


def test_the_same_recipe_gives_the_same_bytes(script: ModuleType, make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe())
    first = prepared(script, recipe)
    shutil.rmtree(recipe.data.prepared)
    assert prepared(script, recipe) == first


def test_no_tree_stands_in_two_splits(script: ModuleType, make_recipe: MakeRecipe, messages: list[dict[str, Any]]) -> None:
    recipe = load(make_recipe())
    manifest = prepared(script, recipe)
    tree_of = {m["message_id"]: m["message_tree_id"] for m in messages}
    trees = {
        split: {tree_of[key] for i in range(len(rows_of(recipe, split))) for key in rows_of(recipe, split).examples(i)}
        for split in ("train", "dev")
    }
    trees["validation"] = {c.group for c in validation_of(recipe)}
    assert all(trees.values())
    assert sum(map(len, trees.values())) == len(set().union(*trees.values()))
    assert {split: manifest["counts"][split]["trees"] for split in trees} == {split: len(found) for split, found in trees.items()}


def test_the_validation_rows_are_messages(script: ModuleType, make_recipe: MakeRecipe, messages: list[dict[str, Any]]) -> None:
    recipe = load(make_recipe())
    manifest = prepared(script, recipe)
    text_of = {m["message_id"]: m["text"] for m in messages}
    found = validation_of(recipe)
    assert len(found) == manifest["counts"]["validation"]["kept"] > 0
    for conversation in found:
        assert conversation.turns[-1].role == "assistant"
        assert [t.content for t in conversation.turns] == [text_of[i] for i in conversation.ids[: len(conversation.turns)]]
    learnt = [i for c in found for i, t in zip(c.ids, c.turns, strict=False) if t.role == "assistant" and t.learn]
    assert len(learnt) == len(set(learnt))


@pytest.mark.parametrize(
    ("policy", "count", "digest"),
    [
        ("best_path", 188, "44a8254bf4f6a2e5853016c81359aab97ff5105e1e81076c8e43591ec95f91d8"),
        ("joined_replies", 480, "c3214e99fddc5a8d7ba2d7e967774d041cd6482d63ef86890d8ff4193c396bec"),
        ("best_replies", 418, "37db4f23514a27246cbc08c55ae8d6f7bff04cacafc6b8c254883b194783bb5c"),
        ("all_replies", 1185, "ff0bc6efdc62168eaf1a1451d195bfe49f46a66e0d9dc095d59677989a5f1067"),
        ("all_paths", 1002, "f93ce5abac5410e1ccb58a50fa5096a056443bc56597adbfc83a601dbbd1598b"),
    ],
)
def test_ids_of_the_embedded_file_are_the_published_ones(
    script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, count: int, digest: str
) -> None:
    overrides = [f"data.source={ASSET}", "data.split=all", "data.filters=null", f"data.policy={policy}"]
    # The ids are written before anything is tokenised, which takes most of the time.
    monkeypatch.setattr(script, "prepare", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        script.run(load(make_recipe(), overrides), str(tmp_path / "ids.tsv"), None)
    lines = (tmp_path / "ids.tsv").read_text().splitlines(keepends=True)
    assert len(lines) == count
    assert hashlib.sha256("".join(sorted(lines)).encode()).hexdigest() == digest


def test_readable_conversations_are_exported(
    script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path, messages: list[dict[str, Any]]
) -> None:
    recipe = load(make_recipe())
    ids, export = tmp_path / "ids.tsv", tmp_path / "chats.jsonl"
    manifest = prepared(script, recipe, ids, export)
    lines = [json.loads(line) for line in export.read_text().splitlines()]
    text_of = {m["message_id"]: m["text"] for m in messages}
    assert len(lines) == sum(manifest["counts"][split]["conversations"] for split in SPLITS)
    for line, named in zip(lines, ids.read_text().splitlines(), strict=True):
        key, _, conversation_ids = named.partition("\t")
        assert line["key"] == key
        assert [m["content"] for m in line["messages"]] == [text_of[i] for i in conversation_ids.split()]
        assert {m["role"] for m in line["messages"]} <= {"user", "assistant"}
    # Chats that were written are chats that can be read, also when the data is up to date.
    again = tmp_path / "again.jsonl"
    assert prepared(script, recipe, export=again) == manifest
    assert again.read_bytes() == export.read_bytes()
    chats = load(make_recipe(f"data.source={export}", f"data.prepared={tmp_path / 'chats'}", "data.policy=null"))
    assert prepared(script, chats)["counts"]["train"]["kept"] > 0


@pytest.mark.parametrize(
    "overrides", [("data.max_length=4096",), ("data.max_length=64",), ("data.max_length=64", "data.too_long=drop", "data.packing=false")]
)
def test_the_funnel_adds_up(script: ModuleType, make_recipe: MakeRecipe, overrides: tuple[str, ...], capsys) -> None:
    recipe = load(make_recipe(), overrides)
    counts = prepared(script, recipe)["counts"]
    assert counts["read"] == 400
    for split in SPLITS:
        c = counts[split]
        assert c["conversations"] == c["kept"] + c["unanswered"] + c["nothing_new"] + c["dropped_too_long"]
        assert c["cut_conversations"] <= c["kept"]
        assert c["trees"] <= c["conversations"]
    for split in ("train", "dev"):
        rows, c = rows_of(recipe, split), counts[split]
        assert (c["rows"], c["tokens"], c["supervised"]) == (len(rows), rows.lengths.sum(), rows.num_supervised.sum())
        assert sum(len(rows.examples(i)) for i in range(len(rows))) == c["kept"]
        assert all(rows.lengths <= recipe.data.max_length)
        assert all(rows.num_supervised > 0), "a row without a supervised token"
    short = recipe.data.max_length == 64
    assert (counts["train"]["cut_tokens"] > 0) is short
    assert (counts["train"]["dropped_too_long"] > 0) is short
    shown = capsys.readouterr().out
    assert ["messages", "read", "400"] in [line.split() for line in shown.splitlines()]
    assert f"{counts['train']['supervised']:,}" in shown


def test_what_is_cut_and_what_is_kept_is_everything(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = prepared(script, load(make_recipe("data.max_length=4096")))["counts"]["train"]
    assert whole["cut_tokens"] == 0
    for i, too_long in enumerate(("truncate", "drop")):
        recipe = load(make_recipe("data.max_length=64", f"data.too_long={too_long}", f"data.prepared={tmp_path / str(i)}"))
        cut = prepared(script, recipe)["counts"]["train"]
        assert cut["supervised"] + cut["cut_tokens"] + cut["dropped_tokens"] == whole["supervised"]
        assert (cut["dropped_tokens"] > 0) is (cut["dropped_too_long"] > 0) is True
        assert cut["cut_bytes"] > cut["cut_tokens"] > 0


def test_max_examples_takes_that_many_and_the_rest_stays_as_it_is(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole, few = (prepared(script, load(make_recipe(f"data.max_examples={n}", f"data.prepared={tmp_path / n}"))) for n in ("null", "9"))
    counts = few["counts"]["train"]
    fates = ("kept", "unanswered", "nothing_new", "dropped_too_long")
    assert counts["conversations"] - counts["beyond_max"] == sum(counts[fate] for fate in fates) == 9
    assert few["counts"]["dev"] == whole["counts"]["dev"]
    assert few["files"]["validation.arrow"] == whole["files"]["validation.arrow"]


# --- other kinds of rows


def test_plain_texts_are_learnt_but_for_the_start(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    texts = [f"The number {i} comes after {i - 1}, and so on." for i in range(40)]
    source = write_lines(tmp_path / "texts.jsonl", [{"text": t} for t in texts] + [{"text": "  "}, {"text": 5}])
    recipe = load(make_recipe(f"data.source={source}", "data.policy=null", "chat.format=text", "data.packing=false"))
    manifest = prepared(script, recipe)
    assert manifest["counts"]["dropped"] == {"empty": 1, "no text": 1}
    assert manifest["role_markers"]["token_ids"] == []
    rows = rows_of(recipe)
    assert len(rows) == manifest["counts"]["train"]["conversations"]
    for row in (rows[i] for i in range(len(rows))):
        assert row["supervised"].tolist() == [False] + [True] * (len(row["input_ids"]) - 1)
        assert row["input_ids"][0] == row["input_ids"][-1]  # the tiny base starts and ends texts with the same token
    assert {c.turns[0].content for c in validation_of(recipe)} < set(texts)


def test_split_texts_lose_nothing(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    overrides = ["data.policy=each_message", "chat.format=text", "data.packing=false"]
    whole = load(make_recipe(*overrides, "data.max_length=4096"))
    split = load(make_recipe(*overrides, "data.max_length=50", "data.too_long=split", f"data.prepared={tmp_path / 'split'}"))
    one, many = (prepared(script, recipe)["counts"]["train"] for recipe in (whole, split))
    assert many["supervised"] == one["supervised"]
    assert many["cut_tokens"] == 0
    assert many["kept"] == one["kept"] < many["rows"] == len(rows_of(split))


def test_chats_are_prepared(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"Answer {i}."}]} for i in range(40)]
    open_end = {"messages": [*chats[0]["messages"], {"role": "user", "content": "And then?"}]}
    unanswered = {"messages": [{"role": "user", "content": "Anyone?"}]}
    source = write_lines(tmp_path / "chats.jsonl", [*chats[1:], open_end, unanswered, {"messages": []}])
    recipe = load(make_recipe(f"data.source={source}", "data.policy=null", "data.split=all", "data.dev_share=0.0"))
    manifest = prepared(script, recipe)
    counts = manifest["counts"]
    assert (counts["unit"], counts["read"], counts["dropped"]) == ("rows", 42, {"empty": 1})
    assert (counts["train"]["kept"], counts["train"]["open_ends"], counts["train"]["unanswered"]) == (40, 1, 1)
    assert counts["dev"]["rows"] == len(rows_of(recipe, "dev")) == len(validation_of(recipe)) == 0
    assert manifest["chat_template"] == {"checked": 40, "agreed": 40}


# --- what cannot be prepared


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.policy=null"], "data.policy must say which conversations to take"),
        (["data.source=nothing.jsonl"], "there is no file or folder nothing.jsonl"),
        (["data.max_length=4", "data.too_long=drop"], "no conversation is left to train on: of 400 messages read"),
        (["data.filters.languages=[fr]"], "these were left out: 400 language"),
        (["model.base=nothing/here"], "cannot load the base model from nothing/here"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(script, make_recipe: MakeRecipe, capsys, overrides: list[str], words: str) -> None:
    recipe = load(make_recipe(), overrides)
    assert words in refusal(script, recipe, capsys)
    assert not Path(recipe.data.prepared).exists()
    assert not list(Path(recipe.data.prepared).parent.glob(".*tmp"))


def chats_with_bad_rows(path: Path) -> Path:
    good = [{"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"Answer {i}."}]} for i in range(30)]
    narrated = [{"messages": [{"role": "narrator", "content": f"Once {i}."}]} for i in range(5)]
    lines = [json.dumps(row) for row in [*good[:3], *narrated, *good[3:], {"messages": "hello"}]]
    path.write_text("\n".join([*lines, '{"messages": [', ""]))
    return path


def of_chats(make_recipe: MakeRecipe, source: Path, *overrides: str) -> Recipe:
    return load(make_recipe(f"data.source={source}", "data.policy=null", "data.split=all", "data.dev_share=0.0", *overrides))


def test_bad_rows_are_counted_shown_and_kept_with_their_places(script, make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    recipe = of_chats(make_recipe, chats_with_bad_rows(tmp_path / "chats.jsonl"))
    counts = prepared(script, recipe)["counts"]
    assert (counts["read"], counts["train"]["kept"]) == (37, 30)
    assert counts["dropped"] == {"no list of messages": 1, "not JSON": 1, "unknown role (see data.roles)": 5}
    kept = [json.loads(line) for line in (Path(recipe.data.prepared) / "bad_rows.jsonl").read_text().splitlines()]
    narrated = [
        {"place": f"chats.jsonl line {n}", "reason": "unknown role (see data.roles)", "key": "role", "value": '"narrator"'}
        for n in range(4, 9)
    ]
    assert kept[:6] == [*narrated, kept[5]]
    assert kept[5] == {"place": "chats.jsonl line 36", "reason": "no list of messages", "key": "messages", "value": '"hello"'}
    assert (kept[6]["place"], kept[6]["reason"], len(kept)) == ("chats.jsonl line 37", "not JSON", 7)
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        'chats.jsonl line 4: unknown role (see data.roles), role: "narrator"',
        'line 36: no list of messages, messages: "hello"',
        "line 37: not JSON",
    ):
        assert words in shown
    assert shown.count("left out: chats.jsonl") == 5  # three of each reason
    assert "see bad_rows.jsonl" in shown
    assert "dropped: unknown role (see data.roles) 5" in shown


@pytest.mark.parametrize(
    ("skip", "words"),
    [(0, 'chats.jsonl line 4: unknown role (see data.roles), role: "narrator"'), (8, "chats.jsonl line 28: not JSON")],
)
def test_strict_stops_at_the_first_bad_row(script, make_recipe: MakeRecipe, tmp_path: Path, capsys, skip: int, words: str) -> None:
    source = chats_with_bad_rows(tmp_path / "chats.jsonl")
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[skip:-2] + lines[-1:] if skip else lines))
    recipe = of_chats(make_recipe, source)
    assert words in " ".join(refusal(script, recipe, capsys, strict=True).split())
    assert not list(Path(recipe.data.prepared).parent.glob(".*tmp"))
    assert not Path(recipe.data.prepared).exists()


def test_strict_takes_what_has_no_bad_row(script, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = load(make_recipe())
    strict = prepared(script, recipe, strict=True)
    again = load(make_recipe(f"data.prepared={tmp_path / 'again'}"))
    assert prepared(script, again)["files"] == strict["files"]


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat format that cannot write one of the answers."""
    render = Renderer.render

    def refusing(self: Renderer, conversation: Conversation) -> Rendered:
        if "Answer 7." in (turn.content for turn in conversation.turns):
            raise ValueError(f"conversation {conversation.key}: that cannot be written")
        return render(self, conversation)

    monkeypatch.setattr(Renderer, "render", refusing)


@pytest.mark.parametrize("split", ["all", "by_hash"])
def test_what_the_chat_format_cannot_write_is_counted_and_named(
    script, make_recipe: MakeRecipe, tmp_path: Path, capsys, picky: None, split: str
) -> None:
    share = ["data.split=by_hash", "data.validation_share=0.999"] if split == "by_hash" else []
    recipe = of_chats(make_recipe, chats_with_bad_rows(tmp_path / "chats.jsonl"), *share)
    if split == "by_hash":  # everything is held out but what stands in another file
        rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
        recipe = of_chats(
            make_recipe, write_lines(tmp_path / "x.jsonl", rows), "data.split=published", f"data.validation_source={recipe.data.source}"
        )
    counts = prepared(script, recipe)["counts"]
    c = counts["train" if split == "all" else "validation"]
    assert (c["refused"], c["kept"], c["conversations"]) == (1, 29, 30)
    kept = [json.loads(line) for line in (Path(recipe.data.prepared) / "bad_rows.jsonl").read_text().splitlines()]
    assert (kept[-1]["place"], kept[-1]["reason"]) == ("chats.jsonl:13", "the chat format cannot write it")
    assert "that cannot be written" in kept[-1]["value"]
    assert "dropped: the chat format cannot write them" in capsys.readouterr().out


def test_strict_stops_at_what_the_chat_format_cannot_write(script, make_recipe: MakeRecipe, tmp_path: Path, capsys, picky: None) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": f"Answer {i}."}]} for i in range(9)]
    recipe = of_chats(make_recipe, write_lines(tmp_path / "a.jsonl", rows))
    assert "conversation a.jsonl:8: that cannot be written" in " ".join(refusal(script, recipe, capsys, strict=True).split())
    assert not list(Path(recipe.data.prepared).parent.glob(".*tmp"))


def test_data_without_one_good_row_is_named_with_the_first(script, make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    source = tmp_path / "broken.jsonl"
    source.write_text('{"messages": [\n{"messages": "x"\n')
    said = " ".join(refusal(script, of_chats(make_recipe, source), capsys).split())
    assert "none of the first 2 rows can be read; broken.jsonl line 1: not JSON" in said
    source.write_text('{"messages": "x"}\n{"messages": []}\n')
    said = " ".join(refusal(script, of_chats(make_recipe, source), capsys).split())
    assert "no conversation is left to train on: of 2 rows read" in said
    assert "1 no list of messages, 1 empty" in said
    assert "(the first: broken.jsonl line 1: no list of messages" in said


def test_a_policy_for_data_without_trees_is_refused(script, make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    source = write_lines(tmp_path / "texts.jsonl", [{"text": "Hello"}])
    said = refusal(script, load(make_recipe(f"data.source={source}")), capsys)
    assert "data.policy: all_paths has no effect on text rows" in said


def test_a_tree_in_train_and_validation_is_refused(script, make_recipe: MakeRecipe, oasst_file: Path, capsys) -> None:
    recipe = load(make_recipe("data.split=published", f"data.validation_source={oasst_file}"))
    assert "trees stand in both train and validation" in refusal(script, recipe, capsys)


def test_a_folder_of_something_else_is_not_overwritten(script, make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    recipe = load(make_recipe(f"data.prepared={tmp_path / 'mine'}"))
    assert "holds something else, which would be overwritten" in refusal(script, recipe, capsys)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


# --- stale and damaged


def complaint(recipe: Recipe, verify: bool = False) -> str:
    with pytest.raises(ValueError, match=r"run: python scripts/prepare_data\.py ") as caught:
        load_manifest(recipe, verify=verify)
    return str(caught.value)


def test_train_answers_missing_data_with_the_one_command_to_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    ended = run_script("train.py", recipe, "data.max_length=128")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stdout + ended.stderr
    command = f"run: python scripts/prepare_data.py {recipe} data.max_length=128"
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: there is no prepared data in") and command in line]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.max_length=128", "data.max_length was 256 and is now 128"),
        ("data.policy=best_path", "data.policy was 'all_paths' and is now 'best_path'"),
        ("chat.format=human_assistant", "chat.format was 'oasst' and is now 'human_assistant'"),
        ("data.filters=null", "data.filters was "),
        ("model.revision=main", "model.revision was None and is now 'main'"),
    ],
)
def test_data_of_another_recipe_is_stale(script, make_recipe: MakeRecipe, override: str, words: str) -> None:
    recipe = make_recipe()
    prepared(script, load(recipe))
    assert words in complaint(load(recipe, [override]))
    load_manifest(load(recipe, ["optim.learning_rate=0.5", "adapter.rank=2", "seed=3"]))  # these prepare nothing else


def test_data_of_a_changed_source_is_stale(script, make_recipe: MakeRecipe, oasst_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = oasst_file.read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:200]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[200:])
    recipe = load(make_recipe(f"data.source={folder}"))
    prepared(script, recipe)
    kept = (folder / "b.jsonl.gz").read_bytes()

    (folder / "b.jsonl.gz").unlink()
    assert "b.jsonl.gz is gone" in complaint(recipe)
    (folder / "b.jsonl.gz").write_bytes(kept)
    load_manifest(recipe)
    (folder / "a.jsonl").write_text("".join(lines[:199]))
    assert "a.jsonl has changed" in complaint(recipe)
    assert prepared(script, recipe)["counts"]["read"] == 399
    shutil.rmtree(folder)
    load_manifest(recipe)  # a compute node has the rows, not the raw data


def test_data_of_a_base_with_another_tokenizer_is_stale(script, make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    recipe = load(make_recipe(f"model.base={base}"))
    prepared(script, recipe)
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + "\n")
    assert "tokenizer.json has changed" in complaint(recipe)


@pytest.mark.parametrize(
    "name", ["train.arrow", "train.index.arrow", "dev.arrow", "dev.index.arrow", "validation.arrow", "tokenizer/tokenizer.json"]
)
def test_one_flipped_bit_is_found_on_request_and_a_lost_byte_at_every_start(script, make_recipe: MakeRecipe, name: str) -> None:
    recipe = load(make_recipe())
    before = prepared(script, recipe)
    load_manifest(recipe, verify=True)
    path = Path(recipe.data.prepared) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    assert f"is damaged: {name} does not have the hash" in complaint(recipe, verify=True)
    assert load_manifest(recipe) == before, "a start looks at sizes; what it reads then is checked as it is read"
    path.write_bytes(whole[:-1])
    assert f"is damaged: {name} has {len(whole) - 1} bytes instead of {len(whole)}" in complaint(recipe)
    path.unlink()
    assert f"is damaged: {name} is missing" in complaint(recipe)
    assert prepared(script, recipe) == before, "preparing again reads everything, and repairs it"


def test_a_manifest_that_was_edited_is_not_the_one_that_was_written(script, make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe())
    manifest = prepared(script, recipe)
    manifest["files"]["train.arrow"]["sha256"] = "0" * 64
    write_json(Path(recipe.data.prepared) / MANIFEST, manifest)
    assert f"{MANIFEST} is damaged: it does not have the hash it was written with" in complaint(recipe)


def test_a_source_of_the_same_size_and_time_is_read_on_request_alone(
    script, make_recipe: MakeRecipe, oasst_file: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copyfile(oasst_file, tmp_path / "messages.jsonl"))
    long_ago = 1_600_000_000 * 10**9
    os.utime(source, ns=(long_ago, long_ago))
    recipe = load(make_recipe(f"data.source={source}"))
    assert prepared(script, recipe)["source_stats"][str(source)] == {"bytes": source.stat().st_size, "mtime_ns": long_ago}
    content = source.read_bytes()
    source.write_bytes(content.replace(b"a", b"e", 1))
    assert "messages.jsonl has changed" in complaint(recipe)
    os.utime(source, ns=(long_ago, long_ago))  # as nobody does who means well
    load_manifest(recipe)
    assert "messages.jsonl has changed" in complaint(recipe, verify=True)
    source.write_bytes(content)
    load_manifest(recipe)  # another time, the same bytes
    load_manifest(recipe, verify=True)


def test_a_source_that_was_written_a_moment_before_is_read_again(script, make_recipe: MakeRecipe, oasst_file: Path, tmp_path: Path) -> None:
    source = Path(shutil.copyfile(oasst_file, tmp_path / "messages.jsonl"))
    recipe = load(make_recipe(f"data.source={source}"))
    prepared(script, recipe)
    of_manifest = (Path(recipe.data.prepared) / MANIFEST).stat().st_mtime_ns
    manifest = read_json(Path(recipe.data.prepared) / MANIFEST)
    manifest["source_stats"][str(source)]["mtime_ns"] = of_manifest - 10**9
    write_json(Path(recipe.data.prepared) / MANIFEST, dataset.sealed(manifest))
    source.write_bytes(source.read_bytes().replace(b"a", b"e", 1))
    os.utime(source, ns=(of_manifest - 10**9,) * 2)
    assert "messages.jsonl has changed" in complaint(recipe)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}'])
def test_a_manifest_that_is_none_is_answered_with_the_command(script, make_recipe: MakeRecipe, text: str) -> None:
    recipe = load(make_recipe())
    prepared(script, recipe)
    (Path(recipe.data.prepared) / MANIFEST).write_text(text)
    assert "scripts/prepare_data.py" in complaint(recipe)
    prepared(script, recipe)


@pytest.mark.parametrize("at", ["reading", "trees of", "tokenising train", "tokenising dev", "checking validation"])
def test_an_interrupted_preparation_leaves_the_old_data(
    script, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    recipe = load(make_recipe())
    before = prepared(script, recipe)

    def progress(items: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if description.startswith(at) and number == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(script, "progress", progress)
    (Path(recipe.data.prepared) / "dev.arrow").rename(tmp_path / "aside")
    with pytest.raises(KeyboardInterrupt):
        script.run(recipe, None, None)
    (tmp_path / "aside").rename(Path(recipe.data.prepared) / "dev.arrow")
    assert load_manifest(recipe) == before
    assert not list(Path(recipe.data.prepared).parent.glob(".*"))


@pytest.mark.parametrize(("way", "answers"), [("last_turn", 1), ("each_turn", 2)])
def test_where_a_template_rewrites_history_each_answer_may_be_an_example_of_its_own(
    script: ModuleType, make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path, way: str, answers: int
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "thinking")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (ROOT / "tests" / "templates" / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(base)
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e"))]
    source = write_lines(tmp_path / "chats.jsonl", [{"messages": chat}] * 3 + [{"messages": [*chat[:3], chat[3] | {"train": False}]}])
    overrides = [f"model.base={base}", f"data.source={source}", "data.policy=null", "data.split=all", "data.dev_share=0.0"]
    recipe = load(make_recipe(*overrides, "data.packing=false", "chat.format=model", f"chat.rewritten_history={way}"))
    counts = prepared(script, recipe)["counts"]["train"]
    rows, decode = rows_of(recipe), AutoTokenizer.from_pretrained(base).decode
    learnt = [decode(rows[i]["input_ids"][rows[i]["supervised"]]) for i in range(len(rows))]
    lead = "<think>\n\n</think>\n\n"
    each = [f"{lead}b c<|im_end|>", f"{lead}e<|im_end|>"]
    only_first = {"last_turn": [], "each_turn": each[:1]}[way]
    assert sorted(learnt) == sorted(each[-answers:] * 3 + only_first)
    assert (counts["kept"], counts["nothing_new"]) == ((4, 0) if way == "each_turn" else (3, 1))
    assert counts["dropped_too_long"] == counts["cut_conversations"] == 0
    assert counts["rewritten"] == (0 if way == "each_turn" else 4)


def test_data_of_a_base_with_another_template_is_stale(
    script: ModuleType, make_recipe: MakeRecipe, tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (ROOT / "tests" / "templates" / "llama3.jinja").read_text()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]})
    tokenizer.save_pretrained(base)
    recipe = load(make_recipe(f"model.base={base}", "chat.format=model"))
    prepared(script, recipe)
    with (base / "chat_template.jinja").open("a") as file:
        file.write("{# another #}")
    assert "chat_template.jinja has changed" in complaint(recipe)


def test_of_many_data_sets_the_key_that_changed_is_named(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(30)])
    sets = [{"source": str(source), "split": "all"}, {"source": str(source), "split": "all", "weight": 2.0}]

    def of(sets: list[dict[str, Any]]) -> Recipe:
        plain = ("data.source=null", "data.policy=null", "data.split=published", "data.dev_share=0.1")
        return load(make_recipe(*plain, f"data.sets={json.dumps(sets)}"))

    recipe = of(sets)
    prepared(script, recipe)
    sets[1]["weight"] = 3.0
    changed = of(sets)
    manifest = json.loads((Path(recipe.data.prepared) / MANIFEST).read_text())
    assert dataset.staleness(manifest, changed) == "data.sets.1.weight was 2.0 and is now 3.0"


def test_moved_files_of_several_data_sets_are_the_same_data(make_recipe: MakeRecipe) -> None:
    plain = ("data.source=null", "data.policy=null", "data.split=published")
    here, there = (load(make_recipe(*plain, f"data.sets=[{{source: {place}/a.jsonl, split: all}}]")) for place in ("here", "there"))
    differ = {key for key, value in curve_keys(here).items() if curve_keys(there)[key] != value}
    assert differ == {"data.sets.0.source"}
    assert all(names_files(key) for key in differ)
    assert not any(names_files(key) for key in curve_keys(here) if key.endswith(("weight", "split", "form")))


def test_prepared_data_among_the_raw_data_is_refused(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    (tmp_path / "raw").mkdir()
    write_lines(tmp_path / "raw" / "a.jsonl", [{"prompt": "x", "completion": "y"}])
    recipe = load(make_recipe(f"data.source={tmp_path}/raw", "data.policy=null", f"data.prepared={tmp_path}/raw/prepared"))
    assert "would be read as data the next time; name a folder outside" in refusal(script, recipe, capsys)


def test_what_killed_processes_left_is_cleared_away_and_what_others_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    node = platform.node()
    names = {
        f".p.{node}-{dead.pid}.tmp": False,
        f".p.{node}-{os.getppid()}.tmp": True,
        f".p.elsewhere-{dead.pid}.tmp": True,
        ".p.x.tmp": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    aside = folder_aside(tmp_path / "p", "tmp")
    assert aside.is_dir()
    assert {name: (tmp_path / name).exists() for name in names} == names
    selected = folder_aside(tmp_path / "p", "selected.tmp")
    assert folder_aside(tmp_path / "p", "tmp") == aside  # one that an earlier process of this number left
    assert selected.is_dir(), "of this process too, and in use"


def test_a_missing_folder_for_a_list_is_said_before_the_work(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--ids: there is no folder"):
        prepared(script, load(make_recipe()), ids=tmp_path / "none" / "ids.tsv")


def test_what_follows_the_last_learnt_part_of_a_text_stays_and_no_end_is_taught_there(
    script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"hi {i} <t>x {i}</t> tail"} for i in range(30)])
    plain = (f"data.source={source}", "data.policy=null", "data.split=all", "data.dev_share=0.0", "data.packing=false", "chat.format=text")
    recipe = load(make_recipe(*plain, "data.learn_after=<t>", "data.learn_until=</t>"))
    counts, rows = prepared(script, recipe)["counts"]["train"], rows_of(recipe)
    decode = AutoTokenizer.from_pretrained(Path(recipe.data.prepared) / "tokenizer").decode
    whole, learnt = (
        {decode(rows[i]["input_ids"] if all_ else rows[i]["input_ids"][rows[i]["supervised"]]) for i in range(len(rows))} for all_ in (1, 0)
    )
    assert "<|endoftext|>hi 7 <t>x 7</t> tail<|endoftext|>" in whole
    assert "x 7" in learnt
    assert not any("<|endoftext|>" in text for text in learnt)
    assert counts["open_ends"] == 0


def test_lines_to_paste_hold_every_rule_that_rows_were_read_by_and_any_name(
    script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path, capsys
) -> None:
    odd = write_lines(tmp_path / "sp ace: x.jsonl", [{"b, c": "Q: x A: y"}] * 3)
    rules = ["data.fields={text: 'b, c'}", "data.learn_after=['A:']", "data.learn_until=['Q: ']", "data.form=text", "chat.format=text"]
    script.show_inspection(load(make_recipe("data.policy=null", "data.filters=null", *rules)), str(odd))
    pasted = yaml.safe_load(capsys.readouterr().out.split("of a recipe:")[1])
    assert pasted["data"].items() >= {"source": str(odd), "form": "text", "fields": {"text": "b, c"}, "split": "by_hash"}.items()
    assert (pasted["data"]["learn_after"], pasted["data"]["learn_until"]) == (["A:"], ["Q: "])
    assert pasted["chat"] == {"format": "text"}


# --- prompts without answers


GRPO = ("data.policy=null", "data.packing=false", "chat.role_markers=text", "grpo={rewards: [{name: no_repetition}], max_new_tokens: 16}")


def test_prompts_without_answers_are_data_for_grpo_alone(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"What is {n}?"} for n in range(60)])
    path = make_recipe(f"data.source={file}", *GRPO)
    recipe = load(path)
    export = tmp_path / "out.jsonl"
    counts = prepared(script, recipe, export=export)["counts"]
    for split in SPLITS:
        assert counts[split]["prompts"] == counts[split]["kept"] > 0
    assert len(rows_of(recipe)) == counts["train"]["kept"]
    assert all(one.is_prompt and len(one.turns) == 2 for one in validation_of(recipe))
    assert all(len(json.loads(line)["messages"]) == 1 for line in export.read_text().splitlines())
    with pytest.raises(ValueError, match="it was prepared for a recipe with grpo, and this has none"):
        load_manifest(load(path, ["grpo=null"]))
    with pytest.raises(ValueError, match="the rows have the keys prompt, which are no form that is known here"):
        script.run(load(path, ["grpo=null", f"data.prepared={tmp_path}/other"]))


def test_limits_of_replies_do_not_drop_what_has_none(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": "one two three" if n % 2 else None} for n in range(40)]
    file = write_lines(tmp_path / "prompts.jsonl", rows)
    limits = ("data.replies={max_words: 2}", "data.validation_share=0.0", "data.dev_share=0.0")
    counts = prepared(script, load(make_recipe(f"data.source={file}", *GRPO, *limits)))["counts"]["train"]
    assert (counts["kept"], counts["prompts"], counts["no_reply"]) == (20, 20, 20)


def test_pairs_are_prompts_for_grpo_and_policies_of_pairs_are_not(script: ModuleType, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", [{"prompt": f"What is {n}?", "chosen": "This", "rejected": "That"} for n in range(60)])
    path = make_recipe(f"data.source={file}", *GRPO)
    for override in ("data.form=null", "data.form=pairs"):
        manifest = prepared(script, load(path, [override]))
        assert not manifest["pairs"]
        assert manifest["counts"]["train"]["prompts"] == 0
        assert {one.turns[1].content for one in validation_of(load(path))} == {"This"}
        assert {one.rejected for one in validation_of(load(path))} == {None}
    with pytest.raises(ValueError, match="preference_pairs gives pairs, of which grpo would ask the prompts; use policy: all_paths"):
        load(path, ["data.policy=preference_pairs"])


def test_trees_are_the_same_with_grpo_and_without(script: ModuleType, make_recipe: MakeRecipe) -> None:
    path = make_recipe("data.packing=false", "chat.role_markers=text")
    manifest = prepared(script, load(path))
    assert load_manifest(load(path, [GRPO[-1]]))["files"] == manifest["files"], "not stale"


def test_prompts_are_shown_for_grpo_and_nothing_of_answers_that_are_not_read(script: ModuleType, make_recipe: MakeRecipe, capsys) -> None:
    keys = ("data.packing=false", "data.max_length=96", "grpo={rewards: [{name: no_repetition}], max_new_tokens: 48}")
    recipe = load(make_recipe(*keys))
    manifest = prepared(script, recipe)
    counts, prompts = manifest["counts"], read_prompts(rows_of(recipe), 48)
    assert counts["train"]["cut_conversations"] > 0.1 * counts["train"]["kept"]
    assert prompts.num_too_long > 0.05 * len(rows_of(recipe))
    shown = capsys.readouterr().out
    assert f"prompts to answer: {prompts} (more than 48 tokens)" in shown
    assert " of the prompts leave no room in data.max_length: 96, of which an answer may take grpo.max_new_tokens: 48" in shown
    assert not any(word in shown for word in ("supervised tokens", "to learn", "what is learnt"))
    (asked,) = re.findall("⟦([^⟧]*)⟧", shown.partition("one prompt; what is asked is in ⟦ ⟧")[2])
    tokenizer = AutoTokenizer.from_pretrained(Path(recipe.data.prepared) / "tokenizer")
    assert asked in {tokenizer.decode(prompt) for prompt in (prompts[i] for i in range(len(prompts)))}
    prepared(script, recipe)
    assert f"prompts to answer: {prompts}" in capsys.readouterr().out, "shown again where nothing is to do"


def test_a_recipe_whose_prompts_leave_no_room_hears_of_it_when_the_data_is_made(
    script: ModuleType, make_recipe: MakeRecipe, capsys
) -> None:
    keys = ("data.packing=false", "data.max_length=96", "grpo={rewards: [{name: no_repetition}], max_new_tokens: 95}")
    prepared(script, load(make_recipe(*keys)))
    assert "note: every prompt of " in capsys.readouterr().out
