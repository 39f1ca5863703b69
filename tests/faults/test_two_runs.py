"""Two runs in one folder would write over each other: the second is refused for as long as the first lives."""

import fcntl
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from in_process import metrics, prepared
from processes import has_step, run, start

from qlora_suite import checkpoint
from qlora_suite.files import read_json

STEPS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("two_runs")
    return prepared(write_recipe(folder, tiny_base, oasst_file, f"train.max_steps={STEPS}", "checkpoints.every_steps=2"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> bytes:
    done = run("train.py", recipe, f"output.dir={recipe.parent}/whole", log=recipe.parent / "log")
    assert done.wait() == 0, done.output
    return adapter(recipe.parent / "whole")


def adapter(folder: Path) -> bytes:
    return (folder / "final" / checkpoint.ADAPTER).read_bytes()


def waits(step: int, file: str) -> None:
    """A prelude: the run waits behind that step until the file is there."""
    from qlora_suite.run_folder import Run

    real = Run.add_metrics

    def add_metrics(self: Run, step: int, **values: Any) -> None:
        real(self, step, **values)
        while step == wanted and not Path(file).exists():
            time.sleep(0.01)

    wanted, Run.add_metrics = step, add_metrics


def test_a_second_run_is_refused_while_the_first_lives(recipe: Path, whole: bytes, tmp_path: Path) -> None:
    """Fault 25: it is told who is there, and the first does not notice."""
    folder = tmp_path / "run"
    words = ("train.py", recipe, f"output.dir={folder}")
    first = start(*words, log=tmp_path / "first", prelude=(waits, 3, str(tmp_path / "go")))
    try:
        first.wait_for(lambda: has_step(folder, 3))
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        second = run(*words, log=tmp_path / "second")
        assert second.wait() == 2, second.output
        error = second.output.strip().splitlines()[-1]
        assert error.startswith(f"error: another run (process {first.pid} on {os.uname().nodename}) is writing to {folder}; wait for it")
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
        (tmp_path / "go").touch()
        assert first.wait() == 0, first.output
    finally:
        first.kill()
    assert adapter(folder) == whole
    assert [record["attempt"] for record in metrics(folder)] == [1] * STEPS


def test_the_folder_is_free_after_a_kill(recipe: Path, whole: bytes, tmp_path: Path) -> None:
    """Fault 25: a lock that outlived its process would need a person to remove it."""
    folder = tmp_path / "run"
    words = ("train.py", recipe, f"output.dir={folder}")
    first = start(*words, log=tmp_path / "first", prelude=(waits, 3, str(tmp_path / "never")))
    first.wait_for(lambda: has_step(folder, 3))
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert (folder / ".lock").exists()
    second = run(*words, log=tmp_path / "second")
    assert second.wait() == 0, second.output
    assert adapter(folder) == whole


def test_of_two_that_start_at_once_one_trains(recipe: Path, whole: bytes, tmp_path: Path) -> None:
    """Fault 25: whoever is first, in a folder that is new."""
    folder = tmp_path / "run"
    both = [
        start("train.py", recipe, f"output.dir={folder}", log=tmp_path / name, prelude=(waits, 3, str(tmp_path / "go"))) for name in "ab"
    ]
    try:
        until = time.monotonic() + 60
        while all(one.running for one in both):  # the first waits behind step 3
            assert time.monotonic() < until, [one.output for one in both]
            time.sleep(0.01)
        (tmp_path / "go").touch()
        assert sorted(one.wait() for one in both) == [0, 2], [one.output for one in both]
    finally:
        for one in both:
            one.kill()
    refused = next(one for one in both if one.wait() == 2)
    assert "is writing to" in refused.output
    assert adapter(folder) == whole


def test_a_run_whose_folder_was_deleted_and_taken_leaves_it_to_the_other(recipe: Path, tmp_path: Path) -> None:
    """Fault 25: it ends with a sentence, and writes nothing there."""
    folder = tmp_path / "run"
    done = run("train.py", recipe, f"output.dir={folder}", log=tmp_path / "log", prelude=(taken_at, 3))
    assert done.wait() == 2, done.output
    assert f"the folder {folder} was deleted, and another run is writing there now" in done.output
    assert (folder / ".lock").read_text() == "1 on another-node"
    assert read_json(folder / "status.json") == {"state": "running", "reason": "the other's"}
    assert not (folder / "checkpoints").exists()


def taken_at(step: int) -> None:
    """A prelude: the folder is deleted and another run begins there, before that step is noted."""
    from qlora_suite import run_folder
    from qlora_suite.run_folder import Run

    run_folder.LOOK_PAUSE = 0
    real = Run.add_metrics

    def add_metrics(self: Run, step: int, **values: Any) -> None:
        if step == wanted:
            shutil.rmtree(self.path)
            self.path.mkdir()
            self.other = (self.path / ".lock").open("w")
            fcntl.flock(self.other, fcntl.LOCK_EX)
            self.other.write("1 on another-node")
            self.other.flush()
            (self.path / "status.json").write_text('{"state": "running", "reason": "the other\'s"}')
        real(self, step, **values)

    wanted, Run.add_metrics = step, add_metrics


def test_a_mirror_that_another_run_holds_is_refused(recipe: Path, tmp_path: Path) -> None:
    """Fault 25: the same for the second folder that a run writes to."""
    (tmp_path / "mirror").mkdir()
    with checkpoint.lock(tmp_path / "mirror"):
        done = run("train.py", recipe, f"output.dir={tmp_path}/run", f"output.mirror={tmp_path}/mirror", log=tmp_path / "log")
    assert done.wait() == 2, done.output
    assert f"is writing to {tmp_path}/mirror" in done.output
