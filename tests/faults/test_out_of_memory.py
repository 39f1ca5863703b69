"""Fault 25: a step that runs out of memory is done again in smaller micro-batches: the same rows, the same tokens, the same curve."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import in_process
import poison
import pytest
import torch
from conftest import ROOT, write_recipe
from in_process import lines, metrics, prepared
from processes import Started, run
from safetensors.torch import load_file

from qlora_suite import checkpoint
from qlora_suite.batches import EMPTY, Limit
from qlora_suite.dataset import Rows
from qlora_suite.engine import Engine
from qlora_suite.launched_runs import apart
from qlora_suite.micro_batch import NOTE, SHARES, is_out_of_memory, smaller, within_note, write_note
from qlora_suite.recipe import Train

TOLERANCE = 1e-5
"""Of losses, relative: another micro-batch sums in another order."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = ("train={rows_per_step: 8, max_steps: 5}", "checkpoints={every_steps: 1, keep: 9}")
    return prepared(write_recipe(tmp_path_factory.mktemp("memory"), tiny_base, oasst_file, *overrides))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run on a machine with memory enough."""
    done = run("train.py", recipe, f"output.dir={recipe.parent}/whole", log=recipe.parent / "log")
    assert done.wait() == 0
    return recipe.parent / "whole"


def trained(recipe: Path, folder: Path, *overrides: str, prelude: tuple | None = None) -> Started:
    return run("train.py", recipe, f"output.dir={folder / 'run'}", *overrides, log=folder / "log", prelude=prelude)


def events(folder: Path) -> list[dict[str, Any]]:
    return [record for record in lines(folder / "run" / "metrics.jsonl") if "event" in record]


def check_equal(run_folder: Path, whole: Path) -> None:
    ours, its = metrics(run_folder), metrics(whole)
    assert apart(ours, its, "loss") < TOLERANCE
    assert apart(ours, its, "grad_norm") < TOLERANCE
    for key in ("supervised_tokens", "tokens", "learning_rate", "applied"):
        assert [r[key] for r in ours] == [r[key] for r in its], key
    a, b = (load_file(folder / "final" / checkpoint.ADAPTER) for folder in (run_folder, whole))
    assert all(torch.allclose(tensor, b[name], atol=1e-5) for name, tensor in a.items())


def test_a_step_out_of_memory_is_done_again_with_the_same_tokens(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Halved until it fits, from step 3 on; nothing of the half-made gradient is left; the next start knows it already."""
    fault = (poison.memory, 300, 3)
    done = trained(recipe, tmp_path, "stop.after_minutes=null", prelude=fault)
    assert done.wait() == 0, done.output
    check_equal(tmp_path / "run", whole)
    found = events(tmp_path)
    assert {(e["step"], e["event"]) for e in found} == {(3, "out of memory")}
    halved = [e["tokens_at_once"] for e in found]
    assert halved == sorted(halved, reverse=True)
    assert halved[-1] <= 300
    assert done.output.count("out of memory; done again") == len(found)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000005" / "state.json").read_text())
    assert state["micro_batch"]["tokens"] == halved[-1]

    (tmp_path / "run" / "status.json").unlink()  # another start of it
    for name in ("final", "checkpoints/step-000005", "checkpoints/step-000004"):
        shutil.rmtree(tmp_path / "run" / name)
    again = trained(recipe, tmp_path, prelude=(poison.memory, 300, 1))
    assert again.wait() == 0
    assert len(events(tmp_path)) == len(found)
    check_equal(tmp_path / "run", whole)


def test_what_has_failed_is_let_go_before_it_is_tried_again(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the backward pass: the graph that it leaves would fill the memory that the next try needs."""
    module, left, alive = in_process.script("train"), [], []
    summed_loss, backward = module.summed_loss, Engine.backward

    def noted(*args: Any) -> torch.Tensor:
        alive.extend(reference() is not None for reference in left)
        loss = summed_loss(*args)
        if not left:
            left.append(weakref.ref(loss))
        return loss

    def fails_once(self: Engine, loss_sum: torch.Tensor, num_tokens: int) -> None:
        if len(left) == 1 and not alive:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(self, loss_sum, num_tokens)

    monkeypatch.setattr(module, "summed_loss", noted)
    monkeypatch.setattr(Engine, "backward", fails_once)
    in_process.train(recipe, f"output.dir={tmp_path / 'run'}", "train.max_steps=2")
    assert alive
    assert not any(alive)


def test_recomputing_comes_when_a_row_alone_is_too_much(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """And where nothing is left to try, a sentence says what to lower, and the run goes on elsewhere from its checkpoint."""
    longest = max(Rows(recipe.parent / "prepared" / "train.arrow").lengths)
    done = trained(recipe, tmp_path, prelude=(poison.memory, longest - 1, 2))
    assert done.wait() == 2
    shares = [event["checkpointing"] for event in events(tmp_path)]
    assert shares[shares.count(0) :] == list(SHARES[1:]), "in steps: no more layers than it takes"
    assert "error: a single row of up to" in done.output
    assert "adapter.rank" in done.output
    assert "Traceback" not in done.output
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / NOTE).unlink()  # a larger card
    assert trained(recipe, tmp_path).wait() == 0
    check_equal(tmp_path / "run", whole)


def test_of_two_processes_the_run_ends_and_goes_on_with_half(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """One rank is short of memory in the middle of an exchange: nobody waits for it, and a queue is told to start the run again."""
    run_folder = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2"]
    train = ["scripts/train.py", str(recipe), f"output.dir={run_folder}"]

    def launched(places: int) -> subprocess.CompletedProcess[str]:
        program = ["tests/on_cpu.py", "tests/faults/poisoned_program.py", "memory", f"{places},3,1", *train]
        return subprocess.run(
            [*launch, "--main_process_port", "0", *program],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )

    job = [sys.executable, "slurm/job.py"]
    done = launched(300)
    assert done.returncode != 0
    assert "error: rank 1 ran out of memory in step 3; the same command goes on from the last checkpoint, with at most" in done.stderr
    note = json.loads((run_folder / NOTE).read_text())
    assert note["ended_attempt"] == 1
    ended = subprocess.run([*job, "end", str(run_folder), "before"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert ended[0] == "stopped", "so that a queue starts it again"
    assert "smaller micro-batches" in ended[1]
    while launched(300).returncode != 0:  # once more for each halving
        now = json.loads((run_folder / NOTE).read_text())
        assert now["limit"]["tokens"] < note["limit"]["tokens"]
        note = now
    check_equal(run_folder, whole)


# --- the arithmetic


LENGTHS = [400, 300, 200, 100]
AUTO, FIXED = Train(rows_per_step=4), Train(rows_per_step=4, micro_batch=2, gradient_checkpointing=False)
HALF = Train(rows_per_step=4, gradient_checkpointing=0.5)


@pytest.mark.parametrize(
    ("limit", "micro", "expected"),
    [
        (Limit(4, 1600), [[0, 1, 2, 3]], Limit(2, 800)),
        (Limit(4, 99_999), [[0, 1, 2, 3]], Limit(2, 800)),  # half of what was tried, not of what was allowed
        (Limit(4, 1000), [[0, 1], [2, 3]], Limit(1, 400)),
        (Limit(3, 1000), [[1, 2, 3], [EMPTY]], Limit(1, 450)),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_half_of_what_was_tried(limit: Limit, micro: list[list[int]], expected: Limit, share: float) -> None:
    assert smaller(limit, share, AUTO, micro, LENGTHS) == (expected, share)


@pytest.mark.parametrize(("share", "more"), [(0.0, 0.25), (0.25, 0.5), (0.3, 0.5), (0.75, 1.0)])
def test_a_row_that_went_alone_has_more_layers_recomputed(share: float, more: float) -> None:
    assert smaller(Limit(1, 400), share, AUTO, [[0], [1], [EMPTY]], LENGTHS) == (Limit(1, 400), more)


@pytest.mark.parametrize(("share", "train"), [(1.0, AUTO), (0.0, FIXED), (0.5, HALF)])
def test_nothing_is_left_to_try(share: float, train: Train) -> None:
    with pytest.raises(ValueError, match="a single row of up to 400 tokens"):
        smaller(Limit(1, 400), share, train, [[0]], LENGTHS)


def test_a_note_of_other_hardware_does_not_count_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    card, limit = {"device": "T4"}, Limit(8, 4096)
    assert within_note(tmp_path, limit, 0.25, card, 1) == (limit, 0.25)
    write_note(tmp_path, Limit(2, 512), 0.5, card, 1, None)
    assert within_note(tmp_path, limit, 0.0, card, 1) == (Limit(2, 512), 0.5)
    assert within_note(tmp_path, limit, 0.75, card, 1) == (Limit(2, 512), 0.75)
    assert within_note(tmp_path, limit, 0.0, {"device": "A100"}, 1) == (limit, 0.0)
    assert within_note(tmp_path, limit, 0.0, card, 2) == (limit, 0.0)
    note = json.loads((tmp_path / NOTE).read_text())
    for before, share in ((True, 1.0), (False, 0.0)):  # as notes had it when it was all layers or none
        (tmp_path / NOTE).write_text(json.dumps({**note, "checkpointing": before}))
        assert within_note(tmp_path, limit, 0.0, card, 1) == (Limit(2, 512), share)
    too_much = [json.dumps({**note, "checkpointing": value}) for value in (1.5, -1, "all", None)]
    for damaged in ("{", "[]", "{}", '{"limit": {"rows": "many", "tokens": 1}}', "null", *too_much):
        (tmp_path / NOTE).write_text(damaged)
        with pytest.raises(ValueError, match=NOTE):
            within_note(tmp_path, limit, 0.0, card, 1)


def test_the_words_of_every_allocator_are_known() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
