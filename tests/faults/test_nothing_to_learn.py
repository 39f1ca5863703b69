"""Fault 17: what has no supervised token is dropped before batching, so that no step's loss is 0/0; a rank with nothing computes 0."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ROOT, MakeRecipe
from in_process import metrics, prepared
from processes import run

from qlora_suite import dataset
from qlora_suite.files import file_table, read_json, write_json
from qlora_suite.recipe_file import load

FEW = ("data.policy=null", "data.split=all", "data.dev_share=0.0", "data.max_length=64", "data.packing=false")


def chats(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SHORT = [(f"question {n}", f"answer {n}") for n in range(6)]
LONG = [(f"{n} " + "long " * 200, "its answer does not fit") for n in range(5)]


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_rows_truncated_to_their_question_are_dropped_and_counted(make_recipe: MakeRecipe, tmp_path: Path, too_long: str) -> None:
    """Fault 17: alone in a step they would be 0/0, and so they never come to one."""
    source = chats(tmp_path / "chats.jsonl", *LONG, *SHORT)
    settings = (f"data.too_long={too_long}", "train.rows_per_step=1", "train.max_steps=6", "train.epochs=1")
    recipe = make_recipe(f"data.source={source}", *FEW, *settings)
    ended = run("prepare_data.py", recipe, log=tmp_path / "prepare")
    assert ended.process.exitcode == 0, ended.output
    counts = read_json(tmp_path / "prepared" / "manifest.json")["counts"]["train"]
    assert (counts["kept"], counts["dropped_too_long"], counts["conversations"]) == (6, 5, 11)
    rows = dataset.Rows(tmp_path / "prepared" / "train.arrow")
    assert len(rows) == 6
    assert rows.num_supervised.min() > 0
    trained = run("train.py", recipe, log=tmp_path / "train")
    assert trained.process.exitcode == 0, trained.output
    found = metrics(tmp_path / "run")
    assert len(found) == 6
    assert all(m["applied"] and m["supervised_tokens"] > 0 and math.isfinite(m["loss"]) for m in found)


def test_when_every_row_loses_its_answer_the_preparation_says_so(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    source = chats(tmp_path / "chats.jsonl", *LONG)
    ended = run("prepare_data.py", make_recipe(f"data.source={source}", *FEW), log=tmp_path / "log")
    assert ended.process.exitcode == 2
    words = " ".join(ended.output.split())
    assert "no conversation is left to train on: of 5 rows read, these were left out: 5 too long" in words
    assert not (tmp_path / "prepared").exists()


def spoilt(folder: Path, change: Any) -> None:
    """The prepared rows as `change` makes them, with hashes that fit: as another program, or an older version, might write them."""
    path = folder / "train.arrow"
    records = dataset.read_table(path).to_pylist()
    for number, record in enumerate(records):
        change(number, record)
    dataset.write_table(path, records, dataset.ROWS)
    manifest = read_json(folder / dataset.MANIFEST)
    table = file_table(folder, but=dataset.MANIFEST)
    write_json(folder / dataset.MANIFEST, dataset.sealed({**manifest, "files": table}))


def mask_row(number: int, record: dict[str, Any]) -> None:
    if number == 3:
        record["supervised"] = [False] * len(record["supervised"])


def mask_all(number: int, record: dict[str, Any]) -> None:
    record["supervised"] = [False] * len(record["supervised"])


def supervise_the_first(number: int, record: dict[str, Any]) -> None:
    record["supervised"][0] = True


def forget_a_length(number: int, record: dict[str, Any]) -> None:
    record["lengths"] = [record["lengths"][0] - 1]


def forget_the_flags(number: int, record: dict[str, Any]) -> None:
    record["supervised"] = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (mask_row, "the row of chats.jsonl:4 has no supervised token"),
        (mask_all, "the row of chats.jsonl:1 has no supervised token"),
        (supervise_the_first, "the first token of a conversation is supervised, which nothing predicts"),
        (forget_a_length, "tokens, flags and lengths of a row do not fit together"),
        (forget_the_flags, "a row has nulls"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_prepared_row_that_cannot_be_trained_on_is_refused_when_it_is_read(
    make_recipe: MakeRecipe, tmp_path: Path, change: Any, words: str
) -> None:
    """Fault 17: hashes fit and labels do not. A whole step of them would have divided by zero after the others were trained on."""
    source = chats(tmp_path / "chats.jsonl", *SHORT)
    recipe = prepared(make_recipe(f"data.source={source}", *FEW, "train.rows_per_step=1", "train.max_steps=6"))
    spoilt(tmp_path / "prepared", change)
    said = f"train.arrow is not what scripts/prepare_data.py writes: {words}; remove the folder and run it again"
    with pytest.raises(ValueError, match=re.escape(said)):
        dataset.load_manifest(load(recipe), verify=True)
    ended = run("train.py", recipe, log=tmp_path / "log")
    assert ended.process.exitcode == 2, ended.output
    assert said in " ".join(ended.output.split())
    assert "Traceback" not in ended.output
    if change is not mask_row:  # every row is spoilt: not one was trained on
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""
    else:
        assert all(record["supervised_tokens"] > 0 for record in metrics(tmp_path / "run"))


def test_an_index_that_tells_another_number_of_supervised_tokens_never_divides_a_loss(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The step's loss is divided by what the index says before a row is read: where the two disagree, the loss would be wrong."""
    source = chats(tmp_path / "chats.jsonl", *SHORT)
    recipe = prepared(make_recipe(f"data.source={source}", *FEW, "train.rows_per_step=1", "train.max_steps=6"))
    path = tmp_path / "prepared" / "train.index.arrow"
    for column, words in (("supervised", "supervised tokens"), ("tokens", "tokens")):
        records = dataset.read_table(path, dataset.INDEX).to_pylist()
        dataset.write_table(path, [{**record, column: record[column] + 1} for record in records], dataset.INDEX)
        ended = run("train.py", recipe, log=tmp_path / f"log of {column}")
        dataset.write_table(path, records, dataset.INDEX)
        assert ended.process.exitcode == 2, ended.output
        said = f"train.arrow is not what scripts/prepare_data.py writes: the index tells another number of {words} than a row has"
        assert said in " ".join(ended.output.split())
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""


def test_a_micro_batch_of_empty_places_alone_adds_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Fault 17: the last step has 1 row in 4 places, cut into micro-batches of one: three of them hold no token, nothing becomes NaN."""
    source = chats(tmp_path / "chats.jsonl", *SHORT[:5])
    recipe = prepared(
        make_recipe(f"data.source={source}", *FEW, "train.rows_per_step=4", "train.max_steps=2", "train.micro_batch=1", "train.epochs=1")
    )
    ended = run("train.py", recipe, log=tmp_path / "log")
    assert ended.process.exitcode == 0, ended.output
    alone = run("train.py", recipe, "train.micro_batch=4", f"output.dir={tmp_path / 'whole'}", log=tmp_path / "log")
    assert alone.process.exitcode == 0, alone.output
    cut, whole = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [m["supervised_tokens"] for m in cut] == [m["supervised_tokens"] for m in whole]
    for one, other in zip(cut, whole, strict=True):
        assert one["applied"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    rows = dataset.Rows(Path(load(recipe).data.prepared) / "train.arrow")
    assert sum(m["supervised_tokens"] for m in cut) == rows.num_supervised.sum()


def test_a_rank_with_nothing_but_empty_places_takes_part_and_adds_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Fault 17: of the last step's 4 places 1 holds a row, so rank 1 computes empty micro-batches alone, and all ends as on one process."""
    source = chats(tmp_path / "chats.jsonl", *SHORT[:5])
    few = ("train.rows_per_step=4", "train.max_steps=2", "train.micro_batch=1", "train.epochs=1")
    recipe = prepared(make_recipe(f"data.source={source}", *FEW, *few))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "scripts/train.py", str(recipe), f"output.dir={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one = run("train.py", recipe, log=tmp_path / "log")
    assert one.process.exitcode == 0, one.output
    two, alone = metrics(tmp_path / "two"), metrics(tmp_path / "run")
    assert read_json(tmp_path / "two" / "run.json")["processes"] == 2
    assert two[1]["supervised_tokens"] < two[0]["supervised_tokens"] / 2, "one row of four"
    for a, b in zip(two, alone, strict=True):
        assert a["applied"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_table_with_other_columns_is_named(tmp_path: Path) -> None:
    dataset.write_table(tmp_path / "t.arrow", [{"a": 1}], pa.schema([("a", pa.int64())]))
    dataset.write_table(tmp_path / "t.index.arrow", [], dataset.INDEX)
    with pytest.raises(ValueError, match=r"t\.arrow is damaged: it holds a, and wanted is input_ids, supervised, lengths, examples"):
        dataset.Rows(tmp_path / "t.arrow")
