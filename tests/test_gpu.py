"""What only a GPU can show: `pytest -m gpu` on a machine with one. Elsewhere these skip."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MakeRecipe
from in_process import column, metrics, prepared, train
from safetensors.torch import load_file

from qlora_suite.checkpoint import ADAPTER
from qlora_suite.model import BF16_CAPABILITY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest -m gpu` on a machine with one"),
]


@pytest.fixture
def recipe(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    return prepared(make_recipe("train.max_steps=12", "previews.prompts=[Hello]", "previews.every_steps=4"))


def facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def test_precision_follows_the_card_and_the_loss_falls(recipe: Path) -> None:
    run = train(recipe)
    expected = "bfloat16" if torch.cuda.get_device_capability() >= BF16_CAPABILITY else "float16"
    assert facts(run)["precision"] == expected
    losses = column(metrics(run), "loss")
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in load_file(run / "final" / ADAPTER).values())


def test_fp16_finds_its_scale_and_applies_its_steps(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    records = metrics(train(recipe))
    assert sum(column(records, "applied")) >= len(records) // 2
    assert records[-1]["applied"]
    assert records[-1]["loss"] < records[0]["loss"]


def test_the_memory_trial_ends_in_a_micro_batch_and_does_not_touch_the_curve(recipe: Path, tmp_path: Path) -> None:
    auto, one = train(recipe), train(recipe, f"output.dir={tmp_path / 'one'}", "train.micro_batch=1", "train.gradient_checkpointing=true")
    assert facts(auto)["micro_batch"]["rows"] >= 1
    for a, b in zip(metrics(auto), metrics(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)  # 16-bit sums in another order


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_stopped_run_goes_on_bit_equal(recipe: Path, tmp_path: Path, name: str) -> None:
    settings = (f"optim.name={name}", "adapter.dropout=0.05", "train.micro_batch=2")
    whole = train(recipe, *settings, f"output.dir={tmp_path / 'whole'}")
    train(recipe, *settings, "stop.after_minutes=1e-6")
    again = train(recipe, *settings)
    assert column(metrics(again), "loss") == column(metrics(whole), "loss")
    first, second = (load_file(run / "final" / ADAPTER) for run in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
