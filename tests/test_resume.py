"""The same command again goes on, to the same bits, whatever ended it; and never with another recipe, other data or another base."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script, write_recipe
from in_process import column, lines, metrics, prepared, script, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_suite import checkpoint
from qlora_suite.run_folder import Run

STEPS = 10
"""Within the first epoch of 84 rows, 8 a step."""
FINAL = Path("final") / checkpoint.ADAPTER
VOLATILE = ("attempt", "tokens_per_second", "peak_memory_gib")


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


def curve(run: Path) -> list[dict]:
    """Everything that a step leaves in metrics.jsonl, but for its time and memory."""
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in metrics(run)]


def state_of(run: Path) -> tuple[str, int]:
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["step"]


def snapshot(folder: Path, *but: str) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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


def test_sigterm_ends_with_a_checkpoint_and_twice_is_no_more(recipe: Path, whole: Callable[[str], Path]) -> None:
    """Queues and launchers deliver one preemption several times; the run still saves, says so, and goes on later."""
    run = recipe.parent / "terminated"
    process = start(recipe, f"output.dir={run}", "checkpoints.every_steps=null")
    wait_for_step(process, run, 2)
    process.terminate()
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    state, step = state_of(run)
    assert state == "stopped"
    assert 2 <= step < STEPS
    assert "the same command goes on" in output
    assert checkpoint.steps(run / "checkpoints") == [step]
    train(recipe, f"output.dir={run}", "checkpoints.every_steps=null")
    assert (run / FINAL).read_bytes() == (whole("adamw") / FINAL).read_bytes()
    assert curve(run) == curve(whole("adamw"))


def test_a_signal_in_a_step_waits_for_its_end(recipe: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is interrupted, twice; one step is done in each start."""
    run, uninterrupted = recipe.parent / "one-by-one", curve(whole("adamw"))
    add_metrics = Run.add_metrics

    def interrupt(self: Run, step: int, **values: object) -> None:
        add_metrics(self, step, **values)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "add_metrics", interrupt)
    for step in range(1, STEPS + 1):
        try:
            train(recipe, f"output.dir={run}", "previews.prompts=[]")
        except KeyboardInterrupt:
            pytest.fail("the second SIGTERM ended the run")
        assert state_of(run) == ("finished" if step == STEPS else "stopped", step)
    assert curve(run) == uninterrupted
    assert column(metrics(run), "attempt") == list(range(1, STEPS + 1))


def test_a_second_ctrl_c_ends_at_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe.parent / "ctrl-c"
    add_metrics = Run.add_metrics

    def interrupt(self: Run, step: int, **values: object) -> None:
        add_metrics(self, step, **values)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "add_metrics", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, f"output.dir={run}")
    assert state_of(run) == ("failed", 1)
    assert not checkpoint.steps(run / "checkpoints")


def test_stop_after_minutes_ends_with_a_checkpoint(recipe: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "minutes"
    train(recipe, f"output.dir={run}", "stop.after_minutes=1e-6", "checkpoints.every_steps=null")
    assert state_of(run) == ("stopped", 1)
    assert checkpoint.steps(run / "checkpoints") == [1]
    assert not (run / "final").exists()
    assert "the same command goes on" in capsys.readouterr().out
    train(recipe, f"output.dir={run}")
    assert (run / FINAL).read_bytes() == (whole("adamw") / FINAL).read_bytes()


def test_a_kill_before_final_was_written(recipe: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is there, final/ is not: the next start writes it and trains nothing."""
    run = recipe.parent / "before-final"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write_final", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, f"output.dir={run}")
    train(recipe, f"output.dir={run}")
    assert state_of(run) == ("finished", STEPS)
    assert set(column(metrics(run), "attempt")) == {1}
    assert (run / FINAL).read_bytes() == (whole("adamw") / FINAL).read_bytes()


def test_a_damaged_newest_checkpoint_costs_its_steps_only(recipe: Path, whole: Callable[[str], Path]) -> None:
    run = recipe.parent / "damaged"
    shutil.copytree(whole("adamw"), run)
    shutil.rmtree(run / "final")
    (run / "status.json").unlink()
    newest = run / "checkpoints" / f"step-{STEPS:06d}" / checkpoint.ADAPTER
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="damaged"):
        train(recipe, f"output.dir={run}")
    assert curve(run) == curve(whole("adamw"))
    assert (run / FINAL).read_bytes() == (whole("adamw") / FINAL).read_bytes()


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_all_damaged_is_refused_with_nothing_deleted(recipe: Path, whole: Callable[[str], Path]) -> None:
    run = recipe.parent / "all-damaged"
    shutil.copytree(whole("adamw"), run)
    shutil.rmtree(run / "final")
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    before = sorted(snapshot(run).values())
    for _ in range(2):
        with pytest.raises(ValueError, match="every checkpoint"):
            train(recipe, f"output.dir={run}")
    after = sorted(snapshot(run, "status.json").values())
    assert set(after) <= set(before)
    assert len(metrics(run)) == STEPS


# --- changed between two starts


@pytest.fixture(scope="module")
def stopped(recipe: Path) -> Path:
    """A run that was ended after its first step."""
    return train(recipe, f"output.dir={recipe.parent}/stopped", "stop.after_minutes=1e-6")


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_a_changed_curve_key_is_refused_field_by_field(recipe: Path, copy: Path) -> None:
    """As a person sees it: both differences, what to do, exit code 2, no traceback, nothing written but the status."""
    before = snapshot(copy, "status.json", ".lock")
    done = run_script("train.py", recipe, f"output.dir={copy}", "optim.learning_rate=1e-5", "seed=7")
    assert done.returncode == 2
    assert "optim.learning_rate: was 0.002, is now 1e-05" in done.stderr
    assert "seed: was 0, is now 7" in done.stderr
    assert len(re.findall(r": was ", done.stderr)) == 2, "only what differs"
    assert "output.dir" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert snapshot(copy, "status.json", ".lock") == before
    assert state_of(copy) == ("failed", 1)
    train(recipe, f"output.dir={copy}")
    assert state_of(copy) == ("finished", STEPS)


@pytest.mark.parametrize(
    "changed",
    [
        "adapter.rank=32",
        "adapter.dropout=0",
        "train.rows_per_step=4",
        "train.max_steps=9",
        "optim.name=adamw_8bit",
        "optim.max_grad_norm=2",
    ],
)
def test_each_curve_key_is_refused(recipe: Path, copy: Path, changed: str) -> None:
    before = snapshot(copy, "status.json", ".lock")
    with pytest.raises(ValueError, match=rf"cannot go on.*\n  {re.escape(changed.partition('=')[0])}: was .*\n"):
        train(recipe, f"output.dir={copy}", changed)
    assert snapshot(copy, "status.json", ".lock") == before


def test_other_data_is_refused(recipe: Path, copy: Path) -> None:
    """Prepared with another policy, even under the same name."""
    other = ("data.policy=best_path", f"data.prepared={copy.parent}/best_path")
    prepared(recipe, *other)
    with pytest.raises(ValueError, match=r"data.policy: was 'all_paths'") as refusal:
        train(recipe, f"output.dir={copy}", *other)
    assert "data (hash of rows and tokenizer): was" in str(refusal.value)


def test_another_base_is_refused(recipe: Path, copy: Path, tiny_base: Path) -> None:
    """The weights count, not the folder's name: one that was only moved is the same."""
    moved, other = copy.parent / "moved", copy.parent / "other"
    shutil.copytree(tiny_base, moved)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.lm_head.bias.data += 0.1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(other)
    overrides = [f"output.dir={copy}", f"data.prepared={copy.parent}/rows"]
    for base in (other, moved):
        prepared(recipe, f"model.base={base}", *overrides)
        if base == other:
            with pytest.raises(ValueError, match=r"base \(commit, or hash of its files\): was") as refusal:
                train(recipe, f"model.base={base}", *overrides)
            assert str(refusal.value).count(": was ") == 1
        shutil.rmtree(copy.parent / "rows")
    prepared(recipe, f"model.base={moved}", *overrides)
    train(recipe, f"model.base={moved}", *overrides)
    assert state_of(copy) == ("finished", STEPS)


def test_free_keys_may_change(recipe: Path, copy: Path, whole: Callable[[str], Path]) -> None:
    """What is shown, saved and held at once; the curve goes on within the rounding of another micro-batch."""
    free = (
        "previews.prompts=[Say no.]",
        "checkpoints={every_steps: 3, keep: 3}",
        "train.micro_batch=2",
        "train.gradient_checkpointing=true",
        "evaluation={every_steps: 5, budget_tokens: 300}",
        f"output.mirror={copy.parent}/mirror",
    )
    train(recipe, f"output.dir={copy}", *free)
    assert state_of(copy) == ("finished", STEPS)
    # Dropout draws per micro-batch, so beyond the first step only the data and the rates are the same.
    for key in ("step", "learning_rate", "supervised_tokens"):
        assert column(metrics(copy), key) == column(metrics(whole("adamw")), key)
    assert checkpoint.steps(copy.parent / "mirror" / "checkpoints") == checkpoint.steps(copy / "checkpoints")


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
        monkeypatch.setattr(script("train"), "dev_loss", lambda *_: next(values))

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
