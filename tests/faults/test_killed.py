"""Killed at any instant and before any of its writes, a run goes on to the same bits and is never without a good checkpoint."""

import functools
import random
import re
import signal
import time
from pathlib import Path

import processes
import pytest
from conftest import write_recipe
from in_process import prepared, train
from killing import signal_before_change
from same_run import assert_same, leftovers

from qlora_suite import checkpoint
from qlora_suite.tracking import read_journal

KILLS = 12
SHORT = ("train.max_steps=6", "evaluation={every_steps: 2, budget_tokens: 600}", "previews.every_steps=3")
HALF_A_LINE = '{"step": 4, "attempt": 1, "lo'
"""What a kill within a write leaves at the end of a journal."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """Every step is saved, two checkpoints and the best are kept; with dropout, evaluations and previews."""
    overrides = (
        "train={max_steps: 24, epochs: 2, rows_per_step: 4, micro_batch: 4}",
        "adapter={rank: 4, alpha: 8, dropout: 0.05}",
        "optim.schedule=cosine",
        "checkpoints={every_steps: 1, keep: 2}",
        "evaluation={every_steps: 6, budget_tokens: 600}",
        "previews={prompts: [Hello], every_steps: 12, max_new_tokens: 4}",
    )
    return prepared(write_recipe(tmp_path_factory.mktemp("killed"), tiny_base, oasst_file, *overrides))


def assert_good_checkpoints(run: Path, had: bool) -> bool:
    """Whatever bears the name of a checkpoint is one, and the best is among them. Are there some (`had`: there were some before)?"""
    found = [run / "checkpoints" / f"step-{step:06d}" for step in checkpoint.steps(run / "checkpoints")]
    for folder in found:
        assert checkpoint.complaint_about_checkpoint(folder) is None
        assert checkpoint.complaint_about_contents(folder) is None
    assert found or not had
    if found and (best := checkpoint.read_state(found[-1]).best):
        assert run / "checkpoints" / f"step-{best['step']:06d}" in found
    return bool(found)


def test_at_random_instants(recipe: Path, tmp_path: Path) -> None:
    """Fault 1: SIGKILL at 12 instants of its life, from the start of the process; every finished run is the uninterrupted one."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    instants = random.Random(seed)
    start = functools.partial(processes.start, "train.py", recipe, *SHORT, log=tmp_path / "log")
    began, whole = time.monotonic(), tmp_path / "whole"
    assert start(f"output.dir={whole}").wait() == 0
    life = time.monotonic() - began

    kills, number, had = 0, 0, False
    while kills < KILLS:
        run = tmp_path / f"run{number}"
        process = start(f"output.dir={run}")
        process.process.join(instants.uniform(0, life))
        process.kill()
        if process.wait() == 0:
            assert_same(run, whole)
            number, had = number + 1, False
            continue
        kills += 1
        had = assert_good_checkpoints(run, had)
    assert start(f"output.dir={run}").wait() == 0
    assert_same(run, whole)


def test_before_every_change_of_a_save(recipe: Path, tmp_path: Path) -> None:
    """Fault 2: SIGKILL before the 1st, 2nd, ... change that a start makes in the run's folder, until the first step and its save,
    pruning included, are behind it; then before the 1st, 2nd, ... of the writing of final/. One run bears it all.
    """
    whole, run, log = train(recipe, f"output.dir={tmp_path}/whole"), tmp_path / "run", tmp_path / "log"
    change, had = 0, False
    while steps_of_last_attempt(run) < 2:
        change += 1
        had = killed(recipe, run, log, change, "", had)
    assert change > 30, "not so many changes as a save makes"

    change, trained = 0, 0
    while (change := change + 1) and killed(recipe, run, log, change, "os.mkdir /.final.tmp", had):
        trained = trained or steps_done(run)
        assert steps_done(run) == trained == 24, "it trained again"
        assert not (run / "final").exists() or checkpoint.complaint_about_checkpoint(run / "final") is None
    assert change > 10, "not so many changes as the writing of final/ makes"
    assert_same(run, whole)


def steps_of_last_attempt(run: Path) -> int:
    attempts = [record["attempt"] for record in read_journal(run / "metrics.jsonl") if "loss" in record]
    return attempts.count(max(attempts, default=0))


def steps_done(run: Path) -> int:
    return sum("loss" in record for record in read_journal(run / "metrics.jsonl"))


def killed(recipe: Path, run: Path, log: Path, change: int, since: str, had: bool) -> bool:
    """Start, and be killed before that change. Is there a checkpoint now? False, too, if it came to its end instead."""
    prelude = (signal_before_change, str(run), [signal.SIGKILL], change, since)
    process = processes.run("train.py", recipe, f"output.dir={run}", log=log, prelude=prelude)
    assert "Traceback" not in process.output
    if process.process.exitcode == 0 and since:
        return False
    assert process.process.exitcode == -signal.SIGKILL, process.output
    for name in leftovers(run):
        pid = re.search(r"\.(\d+)\.tmp$", name)
        assert pid is None or int(pid[1]) == process.pid, f"{name} was left by an earlier attempt"
    if run.exists() and (run / "metrics.jsonl").exists() and change % 2:
        with (run / "metrics.jsonl").open("a") as journal:
            journal.write(HALF_A_LINE)
    return assert_good_checkpoints(run, had)
