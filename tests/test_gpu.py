"""What only a GPU can show: `pytest -m gpu` on a machine with one. Elsewhere these skip.

GPU_RESULTS=benchmarks/gpu.json pytest -m gpu       also records what was measured, with date, card and versions
"""

import contextlib
import datetime
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OASST1, ROOT, MakeRecipe
from in_process import column, metrics, prepared, script, train
from safetensors.torch import load_file
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

from qlora_suite.checkpoint import ADAPTER
from qlora_suite.engine import Engine
from qlora_suite.files import read_json, write_json
from qlora_suite.launched_runs import after_step
from qlora_suite.model import BF16_CAPABILITY, versions
from qlora_suite.tracking import read_journal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest -m gpu` on a machine with one"),
]


@pytest.fixture
def recipe(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    return prepared(make_recipe("train.max_steps=12", "previews.prompts=[Hello]", "previews.every_steps=4"))


Record = Callable[..., None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """record(peak_memory_gib=9.1): kept by the test's name in the file that GPU_RESULTS names."""

    def keep(**values: Any) -> None:
        path = Path(os.environ["GPU_RESULTS"]) if "GPU_RESULTS" in os.environ else None
        if path is not None:
            known = read_json(path) if path.exists() else {}
            made_by = {"date": datetime.date.today().isoformat(), "card": torch.cuda.get_device_name(), **versions()}
            write_json(path, {**known, request.node.name: {**values, **made_by}})

    return keep


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


def test_a_step_out_of_memory_is_done_again_with_the_same_tokens(recipe: Path, tmp_path: Path) -> None:
    """Fault 25, with the card's own error: after the second step this process may take 60 MiB more than it holds."""
    settings = ("train={rows_per_step: 64, micro_batch: 64, max_steps: 5, epochs: 9}", "previews.prompts=[]")
    whole = train(recipe, *settings, f"output.dir={tmp_path / 'whole'}")

    def squeeze() -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60 * 2**20) / total)

    try:
        with after_step(2, squeeze):
            run = train(recipe, *settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    events = [r for r in read_journal(run / "metrics.jsonl") if r.get("event") == "out of memory"]
    assert events
    assert events[0]["step"] == 3
    assert column(metrics(run), "supervised_tokens") == column(metrics(whole), "supervised_tokens")
    for a, b in zip(metrics(run), metrics(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_stopped_run_goes_on_bit_equal(recipe: Path, tmp_path: Path, name: str) -> None:
    settings = (f"optim.name={name}", "adapter.dropout=0.05", "train.micro_batch=2")
    whole = train(recipe, *settings, f"output.dir={tmp_path / 'whole'}")
    train(recipe, *settings, "stop.after_minutes=1e-6")
    again = train(recipe, *settings)
    assert column(metrics(again), "loss") == column(metrics(whole), "loss")
    first, second = (load_file(run / "final" / ADAPTER) for run in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


PHI2 = PhiConfig(
    vocab_size=51_200,
    hidden_size=2560,
    intermediate_size=10_240,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    partial_rotary_factor=0.4,
)


def test_phi2_trains_within_a_t4s_memory(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    """recipes/phi2_oasst1.yaml in fp16, with Phi-2's sizes and random weights, where no more than 14.7 GiB may be taken."""
    cap, card = int(14.7 * 2**30), torch.cuda.get_device_properties(0)
    if card.total_memory < cap:
        pytest.skip(f"needs 14.7 GiB of GPU memory, found {card.total_memory / 2**30:.1f}")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.float16)
        try:
            PhiForCausalLM(PHI2).save_pretrained(tmp_path / "phi2")
        finally:
            torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "phi2")
    torch.cuda.empty_cache()
    overrides = [
        f"model.base={tmp_path / 'phi2'}",
        f"data.source={OASST1}",
        "data.split=by_hash",
        f"data.prepared={tmp_path / 'prepared'}",
        f"output.dir={tmp_path / 'run'}",
        "train.max_steps=3",
        "evaluation={}",
        "previews.prompts=[]",
    ]
    recipe = prepared(ROOT / "recipes" / "phi2_oasst1.yaml", *overrides)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(name=card.name, total_memory=cap))
    torch.cuda.set_per_process_memory_fraction(cap / card.total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        run = train(recipe, *overrides)
        peak = torch.cuda.max_memory_reserved() / 2**30
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert len(metrics(run)) == 3
    assert peak <= 14.7
    found = {key: facts(run)[key] for key in ("micro_batch", "gradient_checkpointing")}
    record(peak_memory_gib=round(peak, 2), tokens_per_second=metrics(run)[-1]["tokens_per_second"], **found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_engine_learns_one_curve_on_the_gpus(tmp_path: Path, record: Record) -> None:
    verify = script("verify")
    processes = torch.cuda.device_count()
    complaints = verify.run_everything(verify.ENGINES, tmp_path, processes, gpu=True)
    results = verify.judged(verify.ENGINES, tmp_path, complaints, gpu=True)
    record(processes=processes, **{f"{engine}, {way}": vars(found) for engine, way, found, _ in results})
    assert not complaints
    assert all(ok for *_, ok in results), results


def test_the_faster_ways_give_the_plain_curve_on_this_card(recipe: Path, tmp_path: Path) -> None:
    """Attention by boundaries (or a mask made once), the tiled head, fused LoRA and unpacked copies, against transformers and PEFT."""
    plain = [f"speed.{key}=plain" for key in ("attention", "head", "lora", "gelu")] + ["speed.dequantize_once=false"]
    ours = train(recipe, "train.max_steps=6", "train.micro_batch=2", f"output.dir={tmp_path / 'ours'}")
    theirs = train(recipe, "train.max_steps=6", "train.micro_batch=2", *plain, f"output.dir={tmp_path / 'plain'}")
    assert column(metrics(ours), "loss") == pytest.approx(column(metrics(theirs), "loss"), rel=1e-2)
    assert not [way for way, what in facts(ours)["fast_paths"].items() if what.startswith("off")]


def test_a_step_waits_for_the_card_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts every time that the host waits for the device; reading the step's totals is the one."""
    waits: list[int] = []
    totals, step = Engine.totals, Engine.step

    def counted(self: Engine, *args: Any) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")  # this is where a step may wait
        return totals(self, *args)

    def stepped(self: Engine, apply: bool) -> None:
        torch.cuda.set_sync_debug_mode("error")  # from here to the next step's totals nothing may
        step(self, apply)
        waits.append(1)

    monkeypatch.setattr(Engine, "totals", counted)
    monkeypatch.setattr(Engine, "step", stepped)
    try:
        with contextlib.suppress(RuntimeError):  # the save at the end waits, and may
            train(recipe, "previews.prompts=[]", "checkpoints.every_minutes=null", "train.max_steps=4", "stop.after_minutes=60")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) >= 4
