"""Two processes over gloo learn the curve of one: the loss of a step is a sum over all ranks divided once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, MakeRecipe
from in_process import metrics, prepared, train
from safetensors.torch import load_file

from qlora_suite.checkpoint import ADAPTER

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_two_processes_learn_the_curve_of_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = prepared(make_recipe("train.max_steps=8", "evaluation.every_steps=4", "previews.prompts=[Hello]", "previews.every_steps=4"))
    one = train(recipe)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*LAUNCH, "scripts/train.py", str(recipe), f"output.dir={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    two = tmp_path / "two"
    assert json.loads((two / "run.json").read_text())["processes"] == 2

    expected, found = metrics(one), metrics(two)
    assert [r["step"] for r in found] == list(range(1, 9))
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert (a["supervised_tokens"], a["tokens"]) == (b["supervised_tokens"], b["tokens"])
    ours, theirs = load_file(one / "final" / ADAPTER), load_file(two / "final" / ADAPTER)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)


def launched(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*LAUNCH, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_folder_that_is_not_shared_is_refused_at_the_start(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = prepared(make_recipe())
    done = launched("tests/unshared.py", tmp_path, "scripts/train.py", recipe)
    assert done.returncode != 0
    assert done.stderr.count("output.dir must be on a disk that all nodes share") == 1
    assert "starts in" not in done.stdout


def test_a_mistake_is_said_once(make_recipe: MakeRecipe) -> None:
    """Not once for each process; and not as the death of another."""
    recipe = prepared(make_recipe("train.rows_per_step=7"))
    done = launched("scripts/train.py", recipe)
    assert done.returncode != 0
    assert done.stderr.count("cannot be shared out: 2 processes") == 1
    assert "another process of this run died" not in done.stderr
