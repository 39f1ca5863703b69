"""The same command again goes on, to the same bits, whatever ended it; and never with another recipe, other data or another base."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_recipe
from in_process import column, lines, metrics, prepared, script, train
from safetensors.torch import load_file
from same_run import FINAL, curve, snapshot, state_of

from qlora_suite import checkpoint
from qlora_suite.files import read_json
from qlora_suite.run_folder import Run

STEPS = 10
"""Within the first epoch of 84 rows, 8 a step."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """With dropout and previews; rank 64 makes tensors of 4,096 elements, below which 8-bit optimisers keep 32-bit states."""
    overrides = (
        f"train.max_steps={STEPS}",
        "adapter={rank: 64, alpha: 64, dropout: 0.05}",
        "optim.schedule=cosine",
        "checkpoints.every_steps=2",
        "previews={prompts: [Hello], every_steps: 1, max_new_tokens: 24}",
    )
    return prepared(write_recipe(tmp_path_factory.mktemp("resume"), tiny_base, oasst_file, *overrides))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Callable[[str], Path]:
    """The uninterrupted run with an optimiser."""
    runs: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in runs:
            runs[name] = train(recipe, f"optim.name={name}", f"output.dir={recipe.parent}/whole-{name}")
        return runs[name]

    return of


# --- ended from outside


def start(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(recipe), *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until metrics.jsonl has the step."""
    began = time.monotonic()
    while not (run / "metrics.jsonl").exists() or f'{{"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None, f"it ended before step {step}:\n{process.communicate()[0]}"
        assert time.monotonic() - began < 120
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_killed_twice_it_ends_bit_identical(recipe: Path, whole: Callable[[str], Path], name: str) -> None:
    """kill -9 in step 4 and in step 7 of 10, checkpoints at every second: what was learnt and what is written are the same."""
    run = recipe.parent / f"killed-{name}"
    overrides = (f"optim.name={name}", f"output.dir={run}")
    for step in (3, 6):
        process = start(recipe, *overrides)
        wait_for_step(process, run, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert state_of(run)[0] == "running"
        assert not (run / "final").exists()
    train(recipe, *overrides)

    uninterrupted = whole(name)
    assert (run / FINAL).read_bytes() == (uninterrupted / FINAL).read_bytes()
    assert curve(run) == curve(uninterrupted)
    assert column(metrics(run), "step") == list(range(1, STEPS + 1)), "each step once"
    attempts = column(metrics(run), "attempt")
    assert attempts == sorted(attempts)
    assert set(attempts) == {1, 2, 3}
    assert column(lines(run / "previews.jsonl"), "step") == list(range(STEPS + 1)), "each preview once"
    assert lines(run / "previews.jsonl") == lines(uninterrupted / "previews.jsonl")
    assert state_of(run) == ("finished", STEPS)
    last = Path("checkpoints") / f"step-{STEPS:06d}" / "optimizer.safetensors"
    ours, its = load_file(run / last), load_file(uninterrupted / last)
    assert ours.keys() == its.keys()
    assert all(tensor.equal(its[key]) for key, tensor in ours.items())
    assert any(t.dtype == torch.uint8 for t in ours.values()) == (name == "adamw_8bit"), "the states are not of the kind that was asked for"


def test_stop_after_minutes_ends_with_a_checkpoint(recipe: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "minutes"
    train(recipe, f"output.dir={run}", "stop.after_minutes=1e-6", "checkpoints.every_steps=null")
    assert state_of(run) == ("stopped", 1)
    assert checkpoint.steps(run / "checkpoints") == [1]
    assert not (run / "final").exists()
    assert "the same command goes on" in capsys.readouterr().out
    train(recipe, f"output.dir={run}")
    assert (run / FINAL).read_bytes() == (whole("adamw") / FINAL).read_bytes()


def test_checkpointing_that_is_asked_for_later_is_heard_also_where_the_micro_batch_stays(recipe: Path) -> None:
    run = f"output.dir={recipe.parent}/more"
    folder = train(recipe, run, "stop.after_minutes=1e-9")
    before = read_json(folder / "run.json")
    train(recipe, run, "train.gradient_checkpointing=true", "stop.after_minutes=1e-9")
    after = read_json(folder / "run.json")
    assert (before["gradient_checkpointing"], after["gradient_checkpointing"]) == (0, 1)
    assert before["micro_batch"] == after["micro_batch"]


def test_a_kill_before_final_was_written(recipe: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is there, final/ is not: the next start writes it and trains nothing."""
    run = recipe.parent / "before-final"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write_result", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, f"output.dir={run}")
    train(recipe, f"output.dir={run}")
    assert state_of(run) == ("finished", STEPS)
    assert set(column(metrics(run), "attempt")) == {1}
    assert (run / FINAL).read_bytes() == (whole("adamw") / FINAL).read_bytes()


# --- finished


def test_a_finished_run_says_so(recipe: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = whole("adamw")
    before = snapshot(run, ".lock")
    capsys.readouterr()
    train(recipe, f"output.dir={run}", "previews.prompts=[Another]")
    assert "is finished: 10 steps, result in" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"optim.learning_rate: was 0.002, is now 0.1"):
        train(recipe, f"output.dir={run}", "optim.learning_rate=0.1")
    assert snapshot(run, ".lock") == before


# --- the best on the development split


@pytest.fixture
def dev_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Let the development loss go as a test wants it."""

    def scripted(losses: list[float]) -> None:
        values = iter(losses)
        monkeypatch.setattr(script("train"), "dev_loss", lambda *_: [next(values)])

    return scripted


def test_the_best_checkpoint_is_kept_and_becomes_the_result(recipe: Path, dev_losses: Callable, whole: Callable[[str], Path]) -> None:
    """Best at step 3 of 10, two kept: it survives the pruning, and final/ is it; also if the run was ended in between."""
    run = recipe.parent / "best"
    overrides = (f"output.dir={run}", "evaluation.every_steps=1", "checkpoints={every_steps: 1, keep: 2}")
    dev_losses([5.0, 4.0, 3.0, 3.5, 3.2, *itertools.repeat(3.1, 5)])
    train(recipe, *overrides)
    assert checkpoint.steps(run / "checkpoints") == [3, STEPS - 1, STEPS]
    best = (run / "checkpoints" / "step-000003" / checkpoint.ADAPTER).read_bytes()
    assert (run / FINAL).read_bytes() == best != (whole("adamw") / FINAL).read_bytes()
    chosen = json.loads((run / "final" / "chosen.json").read_text())
    assert chosen == {"step": 3, "chosen_by": "lowest development loss (3.0000)"}
    assert curve(run) == curve(whole("adamw"))


def test_early_stopping_waits_for_its_patience(recipe: Path, dev_losses: Callable) -> None:
    run = recipe.parent / "early"
    dev_losses([5.0, 4.0, 3.9, 4.5, 4.4, 4.3, 4.2])
    train(recipe, f"output.dir={run}", "evaluation={every_steps: 1, patience: 3}")
    assert state_of(run) == ("finished", 6), "three in a row without a better one after step 3"
    assert json.loads((run / "final" / "chosen.json").read_text())["step"] == 3, "which no other rule would have saved"
    assert "early" in json.loads((run / "status.json").read_text())["reason"]
