"""A request to stop is honoured between steps, in an evaluation and in previews, and what it cut short is made up for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_recipe
from in_process import lines, metrics, prepared, train
from safetensors.torch import load_file

from qlora_suite import checkpoint, evaluation, generation
from qlora_suite.files import read_json
from qlora_suite.preemption import REQUEST
from qlora_suite.run_folder import Run

STEPS, EVERY = 6, 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = (
        f"train.max_steps={STEPS}",
        f"evaluation.every_steps={EVERY}",
        f"previews.every_steps={EVERY}",
        "previews.prompts=[Hello, Hi]",
        "previews.max_new_tokens=12",
        "checkpoints.every_minutes=60",
        "train.micro_batch=1",
        "data.dev_share=0.3",  # several batches of it
    )
    return prepared(write_recipe(tmp_path_factory.mktemp("stop_request"), tiny_base, oasst_file, *overrides))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    return train(recipe, f"output.dir={recipe.parent}/whole")


def told(run: Path) -> tuple[list, list]:
    """Every number of the curve and every answer, without what depends on time."""
    curve = [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("dev_loss")) for r in lines(run / "metrics.jsonl")]
    return sorted(curve, key=str), [(r["step"], r["answers"]) for r in lines(run / "previews.jsonl")]


def assert_made_up_for(run: Path, whole: Path) -> None:
    assert told(run) == told(whole)
    ours, theirs = (load_file(r / "final" / checkpoint.ADAPTER) for r in (run, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert read_json(run / "final" / "chosen.json") == read_json(whole / "final" / "chosen.json")


def after(calls: int, act: Callable[[], object], real: Callable) -> Callable:
    """`real`, but `act` once before the call of this number."""
    count = [0]

    def call(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == calls:
            act()
        return real(*args, **kwargs)

    return call


def test_a_file_asks_between_steps(recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe.parent / "between"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "add_metrics", after(2, (run / REQUEST).touch, Run.add_metrics))
        train(recipe, f"output.dir={run}")
    status = read_json(run / "status.json")
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 2, "on a request to stop")
    assert not (run / REQUEST).exists(), "the next start would stop at once"
    train(recipe, f"output.dir={run}")
    assert_made_up_for(run, whole)


@pytest.mark.parametrize("step", [EVERY, STEPS], ids=["in the middle", "the last"])
def test_an_evaluation_is_cut_short_and_made_up_for(recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run = recipe.parent / f"evaluation{step}"
    summed_loss, batches = evaluation.summed_loss, []

    def ask_in_the_first_batch(*args: object) -> object:
        now = metrics(run)[-1]["step"]
        batches.append(now)
        if now == step:
            (run / REQUEST).touch()
        return summed_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "summed_loss", ask_in_the_first_batch)
        train(recipe, f"output.dir={run}")
    status = read_json(run / "status.json")
    assert (status["state"], status["step"]) == ("stopped", step)
    assert batches.count(step) == 1, "it went on"
    assert not any("dev_loss" in r for r in lines(run / "metrics.jsonl") if r["step"] == step)
    assert not (run / "final").exists()
    train(recipe, f"output.dir={run}")
    assert_made_up_for(run, whole)


def test_previews_are_cut_short_and_made_up_for(recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe.parent / "previews"
    asked = generation._Asked.__call__
    tokens = []

    def ask(self: generation._Asked, *args: object, **kwargs: object) -> object:
        tokens.append(1)
        if len(tokens) == 15:  # 12 at step 0: the third token of the second previews
            (run / REQUEST).touch()
        return asked(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(generation._Asked, "__call__", ask)
        train(recipe, f"output.dir={run}")
    assert len(tokens) == 15, "it generated on"
    assert (read_json(run / "status.json")["state"], len(metrics(run))) == ("stopped", EVERY)
    assert [r["step"] for r in lines(run / "previews.jsonl")] == [0]
    train(recipe, f"output.dir={run}")
    assert_made_up_for(run, whole)
