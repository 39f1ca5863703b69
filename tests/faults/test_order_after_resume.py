"""After a resume the rows come in the order of the uninterrupted run: none again, none left out, on another number of processes too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_recipe
from in_process import column, metrics, prepared, script, train
from same_run import assert_same

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "scripts/train.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("order")


@pytest.fixture(scope="module", params=["packed", "not packed"])
def recipe(request: pytest.FixtureRequest, folder: Path, tiny_base: Path, oasst_file: Path) -> Path:
    """Three epochs with four micro-batches a step, every step saved."""
    packing = request.param == "packed"
    where = folder / request.param
    where.mkdir()
    overrides = (
        f"data.packing={packing}",
        "train={epochs: 3, rows_per_step: 16, micro_batch: 4}",
        "checkpoints={every_steps: 1, keep: 2}",
        "adapter={rank: 4, alpha: 8, dropout: 0.05}",
    )
    return prepared(write_recipe(where, tiny_base, oasst_file, *overrides))


def trained(recipe: Path, run: str, monkeypatch: pytest.MonkeyPatch, stop_in_step: int | None = None) -> tuple[Path, dict[int, list]]:
    """Train in a folder, or until a signal in a step. The run, and which rows the model saw in each step, micro-batch by micro-batch."""
    module, seen = script("train"), {}
    micro_batches, seed_for, lists = module.micro_batches, module.seed_for, []

    def cut(*args: object) -> list[list[int]]:
        lists.append(micro_batches(*args))
        return lists[-1]

    def seed(run_seed: int, step: int, micro_batch: int, rank: int) -> None:
        """It is called before each forward pass."""
        seen.setdefault(step + 1, []).append(lists[-1][micro_batch])
        if step + 1 == stop_in_step and micro_batch == 1:
            os.kill(os.getpid(), 15)
        seed_for(run_seed, step, micro_batch, rank)

    with monkeypatch.context() as patch:
        patch.setattr(module, "micro_batches", cut)
        patch.setattr(module, "seed_for", seed)
        return train(recipe, f"output.dir={recipe.parent}/{run}"), seen


def test_rows_of_each_step_after_a_resume_within_an_epoch(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 10: stopped within the first epoch and within the third, in the second of four micro-batches. There are no worker
    processes: rows are read where they are used.
    """
    whole, order = trained(recipe, "whole", monkeypatch)
    num_steps = len(order)
    assert num_steps > 9
    assert all(len(micro) >= 2 for micro in order.values()), "no accumulation"
    assert order[1] != order[num_steps // 3 + 1], "the epochs are shuffled alike"
    epoch = sorted(row for micro in [*order.values()] for rows in micro for row in rows if row >= 0)
    assert epoch == sorted([*range(max(epoch) + 1)] * 3), "each row once an epoch"

    within = (2, num_steps - 2)
    seen: dict[int, list] = {}
    for stop_in_step in (*within, None):
        run, of_start = trained(recipe, "resumed", monkeypatch, stop_in_step)
        assert not seen.keys() & of_start.keys(), "a step that was saved is done again"
        seen |= of_start
    assert seen == order
    assert_same(run, whole)


def launch(recipe: Path, *overrides: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*LAUNCH, str(recipe), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("first", [1, 2])
def test_on_another_number_of_processes(folder: Path, tiny_base: Path, oasst_file: Path, first: int) -> None:
    """Fault 11: one process goes on as two, and two as one: the same rows and the same curve, to rounding (tests/test_engines.py hands
    one run through every engine in turn).
    """
    where = folder / f"{first} first"
    where.mkdir()
    recipe = prepared(write_recipe(where, tiny_base, oasst_file, "train={max_steps: 6, rows_per_step: 8}"))
    whole = metrics(train(recipe, f"output.dir={where}/whole"))
    run = f"output.dir={where}/run"
    (train if first == 1 else launch)(recipe, run, "stop.after_minutes=1e-6")
    assert column(metrics(where / "run"), "step") == [1]
    (launch if first == 1 else train)(recipe, run)
    found = metrics(where / "run")
    for key in ("step", "supervised_tokens", "tokens", "learning_rate"):
        assert column(found, key) == column(whole, key)
    for key in ("loss", "grad_norm"):
        assert column(found, key) == pytest.approx(column(whole, key), rel=1e-5)
