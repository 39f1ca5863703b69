"""Asked to stop, by a signal or by a file, and wherever it is, a run saves, says so, and goes on later to the same bits."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import processes
import pytest
from conftest import write_recipe
from in_process import column, lines, metrics, prepared, train
from killing import ask_in_call, signal_before_change
from same_run import assert_same, curve, leftovers, state_of

from qlora_suite import checkpoint
from qlora_suite.dataset import load_manifest
from qlora_suite.preemption import REQUEST
from qlora_suite.recipe_file import load
from qlora_suite.run_folder import Run

STEPS, EVERY = 6, 3
MICRO_BATCHES = 4
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = (
        f"train={{max_steps: {STEPS}, rows_per_step: 8, micro_batch: 2, gradient_checkpointing: false}}",
        "adapter={rank: 4, alpha: 8, dropout: 0.05}",
        "checkpoints.every_steps=2",
        f"evaluation.every_steps={EVERY}",
        f"previews={{prompts: [Hello, Hi], every_steps: {EVERY}, max_new_tokens: 12}}",
        "data.dev_share=0.3",  # several batches of it
    )
    return prepared(write_recipe(tmp_path_factory.mktemp("signals"), tiny_base, oasst_file, *overrides))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    return train(recipe, f"output.dir={recipe.parent}/whole")


PLACES = {
    # (module, function, its call, the step at which the run stops)
    "loading": ("qlora_suite.trainable", "build_model", 1, 0),
    "micro-batch": ("qlora_suite.loss", "summed_loss", MICRO_BATCHES + 3, 2),
    "evaluation": ("qlora_suite.evaluation", "summed_loss", 2, EVERY),
    "preview": ("qlora_suite.generation", "_Asked.__call__", 15, EVERY),  # 12 at step 0: the third token of the second previews
    "save": ("qlora_suite.checkpoint", "seal", 1, 3),  # of step 2; the step after it is the last
}
FILE = "the request file"
WAYS = {"twice SIGTERM": [TERM, TERM], "SIGUSR1": [USR1], FILE: [FILE]}


@pytest.mark.parametrize(
    ("place", "way"),
    [*itertools.product(PLACES, ["twice SIGTERM"]), *itertools.product(["micro-batch", "save"], ["SIGUSR1", FILE])],
)
def test_it_saves_and_goes_on(recipe: Path, whole: Path, tmp_path: Path, place: str, way: str) -> None:
    """Fault 3: in a micro-batch, in an evaluation, in previews, during a save, while the base is loaded."""
    run, (*where, step) = tmp_path / "run", PLACES[place]
    ways = [str(run / REQUEST) if one == FILE else one for one in WAYS[way]]
    process = processes.run("train.py", recipe, f"output.dir={run}", log=tmp_path / "log", prelude=(ask_in_call, *where, ways))
    assert process.process.exitcode == 0, process.output
    assert state_of(run) == ("stopped", step)
    assert "the same command goes on" in process.output
    saved = checkpoint.steps(run / "checkpoints")
    assert saved[-1:] == ([step] if step else [])
    assert checkpoint.latest(run / "checkpoints") == (run / "checkpoints" / f"step-{step:06d}" if step else None)
    assert not (run / "final").exists()
    assert not (run / REQUEST).exists(), "the next start would stop at once"
    if place == "evaluation":
        assert not any("dev_loss" in record for record in lines(run / "metrics.jsonl")), "it evaluated on"
    assert leftovers(run) == []
    train(recipe, f"output.dir={run}")
    assert_same(run, whole)


def test_an_evaluation_cut_short_twice_is_still_made_up_for(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Fault 3: the second time it was being made up for, before the first step of a start."""
    run = tmp_path / "run"
    for _ in range(2):
        ask = (ask_in_call, "qlora_suite.evaluation", "summed_loss", 2, [TERM])
        process = processes.run("train.py", recipe, f"output.dir={run}", log=tmp_path / "log", prelude=ask)
        assert process.process.exitcode == 0, process.output
        assert state_of(run) == ("stopped", EVERY)
    train(recipe, f"output.dir={run}")
    assert_same(run, whole)


@pytest.mark.parametrize("ways", [[INT, INT], [TERM, INT, INT]], ids=["Ctrl-C twice", "SIGTERM and Ctrl-C twice"])
@pytest.mark.parametrize("place", ["micro-batch", "save"])
def test_a_second_ctrl_c_ends_it_at_once(recipe: Path, whole: Path, tmp_path: Path, place: str, ways: list[signal.Signals]) -> None:
    """Fault 3: unsaved, but with nothing half written."""
    run, (*where, _) = tmp_path / "run", PLACES[place]
    process = processes.run("train.py", recipe, f"output.dir={run}", log=tmp_path / "log", prelude=(ask_in_call, *where, ways))
    assert process.process.exitcode == 130, process.output
    assert "Traceback" not in process.output
    assert state_of(run)[0] == "failed"
    assert checkpoint.steps(run / "checkpoints") == []
    assert leftovers(run) == []
    train(recipe, f"output.dir={run}")
    assert_same(run, whole)


def test_a_signal_in_each_step(recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 3: every step is interrupted, twice; one step is done in each start."""
    run, add_metrics = tmp_path / "run", Run.add_metrics

    def interrupt(self: Run, step: int, **values: object) -> None:
        add_metrics(self, step, **values)
        for _ in range(2):
            os.kill(os.getpid(), TERM)

    monkeypatch.setattr(Run, "add_metrics", interrupt)
    without = ("previews.prompts=[]", "evaluation.every_steps=null")
    for step in range(1, STEPS + 1):
        try:
            train(recipe, f"output.dir={run}", *without)
        except KeyboardInterrupt:
            pytest.fail("the second SIGTERM ended the run")
        assert state_of(run) == ("finished" if step == STEPS else "stopped", step)
    assert curve(run) == curve(whole)
    assert column(metrics(run), "attempt") == list(range(1, STEPS + 1))


# --- preparation


def test_preparation_leaves_nothing_half(recipe: Path, tmp_path: Path) -> None:
    """Fault 3: SIGTERM before the 1st, 6th, ... change: no data, or whole data, no traceback; the same command starts anew."""
    folder, change = tmp_path / "data", 1
    arguments = (recipe, f"data.prepared={folder}/prepared")
    values = load(recipe, arguments[1:])
    while True:
        prelude = (signal_before_change, str(folder), [TERM], change)
        process = processes.run("prepare_data.py", *arguments, log=tmp_path / "log", prelude=prelude)
        assert "Traceback" not in process.output
        assert leftovers(folder) == []
        if process.process.exitcode == 0:
            break
        assert process.process.exitcode == 128 + TERM, process.output
        if list(folder.glob("*")):  # it was told when all was done, and cleared away what it had set aside
            load_manifest(values, verify=True)
            shutil.rmtree(folder / "prepared")
        change += 5
    load_manifest(values)
    assert change > 10, "not so many changes as a preparation makes"


def test_data_that_takes_the_place_of_older_data_is_never_half_there(recipe: Path, tmp_path: Path) -> None:
    """Fault 2: SIGKILL before each change from the moment on at which the older folder makes room. Half a folder without its manifest
    would be taken for somebody else's, and refused.
    """
    folder = tmp_path / "data"
    prepared(recipe, f"data.prepared={folder}/prepared")
    for change in itertools.count(1):
        arguments = (recipe, f"data.prepared={folder}/prepared", f"data.max_length={200 + change}")
        prelude = (signal_before_change, str(folder), [signal.SIGKILL], change, "os.rename /")
        process = processes.run("prepare_data.py", *arguments, log=tmp_path / "log", prelude=prelude)
        if process.process.exitcode == 0:
            break
        assert process.process.exitcode == -signal.SIGKILL, process.output
        if not (folder / "prepared").exists():
            assert processes.run("prepare_data.py", *arguments, log=tmp_path / "log").process.exitcode == 0
    assert change > 10
    load_manifest(load(recipe, arguments[1:]))
    assert leftovers(folder) == []
