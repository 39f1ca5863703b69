"""What a run probably did not mean is said, and what is usual is not."""

from conftest import MakeRecipe

from qlora_suite.recipe_file import load
from qlora_suite.remarks import FORGETS, forgetting, remarks
from qlora_suite.wording import counted


def test_a_usual_run_needs_no_remark(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe("optim.warmup_steps=10", "train.rows_per_step=8", "evaluation.every_steps=10"))
    assert remarks(recipe, num_rows=8, num_steps=10) == []


def test_each_oddity_is_named_with_its_key_and_numbers(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe("optim.warmup_steps=10", "train.rows_per_step=8", "evaluation.every_steps=10"))
    warmup, rows, evaluation = remarks(recipe, num_rows=7, num_steps=9)
    assert "optim.warmup_steps: 10" in warmup
    assert "7 rows" in rows
    assert "train.rows_per_step: 8" in rows
    assert "evaluation.every_steps: 10, 9 steps" in evaluation


def test_targets_that_match_nothing_are_named_beside_those_that_do(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe("adapter.targets=[Wqkv, fc1]"))
    assert remarks(recipe, num_rows=8, num_steps=10, adapted={"fc1", "Wqkv"}) == []
    (remark,) = remarks(recipe, num_rows=8, num_steps=10, adapted={"fc1"})
    assert remark == "adapter.targets Wqkv match nothing in this base; only fc1 are adapted"


def test_answers_that_became_unlikely_are_remarked_on_once() -> None:
    assert forgetting({}, []) == forgetting({"log_ratio": -0.99}, []) == forgetting({"log_ratio": float("nan")}, []) == ""
    assert "(-2.2 nats a token)" in forgetting({"log_ratio": -2.2}, [{"step": 1, "event": "spike"}])
    assert forgetting({"log_ratio": -2.2}, [{"step": 1, "loss": 0.0}, {"step": 2, "event": FORGETS}]) == ""


def test_one_is_singular(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe("optim.warmup_steps=10", "train.rows_per_step=8", "evaluation.every_steps=10"))
    warmup, rows, evaluation = remarks(recipe, num_rows=1, num_steps=1)
    assert warmup.startswith("the only step is warm-up")
    assert "the data has 1 row, fewer" in rows
    assert "evaluation.every_steps: 10, 1 step)" in evaluation
    assert [counted(n, "step") for n in (0, 1, 2, 2000)] == ["0 steps", "1 step", "2 steps", "2,000 steps"]
