"""Applying gradients: scaled, clipped, or not at all when they are not finite; what the loop records; what it refuses."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, write_recipe
from in_process import column, lines, metrics, prepared, script, train
from safetensors.torch import load_file
from torch import nn

from qlora_suite import checkpoint
from qlora_suite.engine import Engine, _configure_deepspeed, seed_for, start
from qlora_suite.preemption import StopRequest
from qlora_suite.run_folder import Run


@pytest.fixture(autouse=True)
def _no_state_behind() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = ("train.max_steps=8", "checkpoints.every_steps=1")
    return prepared(write_recipe(tmp_path_factory.mktemp("engine"), tiny_base, oasst_file, *overrides))


def small_engine(dtype: torch.dtype = torch.float32, max_grad_norm: float = 1e9) -> tuple[Engine, nn.Linear]:
    """y = w x with w = 1 and plain SGD of rate 1, so that every update can be told by hand."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Engine(Accelerator(cpu=True), model, optimizer, dtype, max_grad_norm), model


def norm_of(engine: Engine) -> float:
    return engine.totals([torch.zeros(1)])[1]


# --- one step


def test_a_step_is_the_gradient_of_the_sum_over_the_tokens_of_the_step() -> None:
    """Two micro-batches, 4 tokens in all: (2 x (3, 0) + 2 x (0, 5)) / 4, whatever each held."""
    engine, model = small_engine()
    for i, x in enumerate(((3.0, 0.0), (0.0, 5.0))):
        with engine.accumulate(last=i == 1):
            engine.backward(2 * engine.model(torch.tensor(x)).sum(), num_tokens=4)
    assert norm_of(engine) == pytest.approx(math.hypot(1.5, 2.5))
    engine.step(apply=True)
    assert model.weight.tolist() == [[pytest.approx(1 - 1.5), pytest.approx(1 - 2.5)]]
    assert model.weight.grad is None


def test_clipping_scales_the_whole_gradient_and_reports_the_norm_before() -> None:
    engine, model = small_engine(max_grad_norm=0.5)
    engine.backward(engine.model(torch.tensor([3.0, 4.0])).sum(), num_tokens=1)
    assert norm_of(engine) == pytest.approx(5)
    engine.step(apply=True)
    assert (1 - model.weight).tolist() == [[pytest.approx(0.3, rel=1e-4), pytest.approx(0.4, rel=1e-4)]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_that_is_left_out_leaves_nothing_behind(bad: float, dtype: torch.dtype) -> None:
    engine, model = small_engine(dtype)
    engine.backward(engine.model(torch.tensor([1.0, bad])).sum(), num_tokens=1)
    assert not math.isfinite(norm_of(engine))
    engine.step(apply=False)
    assert model.weight.tolist() == [[1, 1]]
    engine.backward(engine.model(torch.tensor([0.25, 0.0])).sum(), num_tokens=1)
    assert norm_of(engine) == 0.25
    engine.step(apply=True)
    assert model.weight.tolist() == [[0.75, 1]], "nothing of the bad gradient is left"


def test_the_fp16_scale_backs_off_and_comes_back_after_a_resume() -> None:
    """The scaler on a CPU is ours; accelerate has none there."""
    engine, _ = small_engine(torch.float16)
    assert engine.scaler.get_scale() == 2**16
    for skipped in range(1, 4):
        engine.backward(engine.model(torch.tensor([math.inf, 0.0])).sum(), num_tokens=1)
        assert not math.isfinite(norm_of(engine))
        engine.step(apply=False)
        assert engine.scaler.get_scale() == 2.0 ** (16 - skipped)
    other, _ = small_engine(torch.float16)
    other.load_state(json.loads(json.dumps(engine.state())))
    assert other.scaler.get_scale() == 2**13
    assert other.state() == engine.state()


def test_randomness_is_a_function_of_the_position() -> None:
    """Not of what was drawn before; and each part of the position counts."""

    def draw(*position: int) -> tuple[float, ...]:
        seed_for(*position)
        return tuple(torch.rand(4).tolist())

    positions = [(seed, step, micro, rank) for seed in (0, 1) for step in range(5) for micro in range(5) for rank in range(2)]
    drawn = [draw(*p) for p in positions]
    torch.rand(17)
    assert [draw(*p) for p in positions] == drawn
    assert len(set(drawn)) == len(positions)


# --- in the loop


def test_fp16_overflows_are_skipped_and_counted(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss 2^10 times as large overflows fp16 until the scale has come down; then it learns, from where it stood."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    module = script("train")
    summed_loss = module.summed_loss
    monkeypatch.setattr(module, "summed_loss", lambda *args: summed_loss(*args) * 2**10)
    run = train(recipe, f"output.dir={recipe.parent}/fp16", "train.max_steps=16", "train.epochs=2")
    records = metrics(run)
    applied = column(records, "applied")
    assert not applied[0]
    assert applied[-1]
    skipped = applied.count(False)
    assert column(records, "skipped_steps")[-1] == skipped
    assert all("rows" in r for r in records if not r["applied"])
    assert all(math.isfinite(r["loss"]) for r in records), "an overflow of the gradient is none of the loss"
    assert json.loads((run / "run.json").read_text())["precision"] == "float16"
    state = json.loads((run / "checkpoints" / "step-000016" / "state.json").read_text())
    assert (state["skipped_steps"], state["scaler"]["scale"]) == (skipped, 2.0 ** (16 - skipped))
    weights = load_file(run / "final" / checkpoint.ADAPTER)
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in weights.values())


def test_the_schedule_reaches_the_optimiser(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up in 2 parts, then a line down to a tenth at the last of 8 steps; and the weights move by it."""
    overrides = ("optim={learning_rate: 0.01, schedule: linear, warmup_steps: 2, min_learning_rate_ratio: 0.1}", "checkpoints.keep=8")
    run = train(recipe, f"output.dir={recipe.parent}/schedule", *overrides)
    expected = [0.005, 0.01, 0.01, 0.0082, 0.0064, 0.0046, 0.0028, 0.001]
    assert column(metrics(run), "learning_rate") == pytest.approx(expected)
    # Adam moves each weight by about the rate in the first step, and never by much more than it afterwards.
    weights = [load_file(run / "checkpoints" / f"step-{n:06d}" / checkpoint.ADAPTER) for n in (1, 7, 8)]
    lora_b = [key for key in weights[0] if "lora_B" in key]
    assert max(weights[0][key].abs().max().item() for key in lora_b) == pytest.approx(0.005, rel=0.01)
    assert max((weights[2][key] - weights[1][key]).abs().max().item() for key in lora_b) < 0.0015


def test_every_step_records_what_is_promised(recipe: Path) -> None:
    run = train(recipe, f"output.dir={recipe.parent}/fields", "evaluation={every_steps: 4, budget_tokens: 300}")
    for record in metrics(run):
        wanted = (
            "step attempt loss learning_rate grad_norm tokens_per_second supervised_tokens peak_memory_gib skipped_steps applied tokens"
        )
        assert set(record) == set(wanted.split())
        assert record["tokens_per_second"] > 0
        assert record["peak_memory_gib"] > 0.1
    assert [r["step"] for r in lines(run / "metrics.jsonl") if "dev_loss" in r] == [4, 8]
    described = json.loads((run / "run.json").read_text())
    assert {"recipe", "versions", "hardware", "servable_as", "servable_because", "parameters", "data_manifest"} <= set(described)
    assert described["servable_as"] == "merged"


def test_tensorboard_gets_the_same_numbers(recipe: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe, f"output.dir={recipe.parent}/tensorboard", "tracking.trackers=[tensorboard]", "train.max_steps=3")
    folders = {path.parent for path in run.rglob("events.out.tfevents*")}  # one for the numbers, one for the recipe's keys
    readers = [EventAccumulator(str(folder)).Reload() for folder in folders]
    logged = [event.value for r in readers if "loss" in r.Tags()["scalars"] for event in r.Scalars("loss")]
    assert logged == pytest.approx(column(metrics(run), "loss"))


def test_wandb_goes_offline_by_itself_and_says_how_to_send_its_files(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = train(recipe, f"output.dir={recipe.parent}/wandb", "tracking.trackers=[wandb]", "train.max_steps=3")
    assert list(run.glob("wandb/offline-run-*"))
    assert f"wandb sync {run}/wandb/offline-run-*" in capsys.readouterr().out


# --- refused


def test_accumulation_from_outside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would beat the recipe's and change every gradient."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps to 4.*train.rows_per_step"):
        start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_what_needs_gpus_does_not_quietly_become_something_else_on_a_cpu(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=rf"asks for {engine}, which needs GPUs"):
        start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_config_for_several_gpus_without_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"meant for a GPU, but torch sees none"):
        start()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ValueError, match=r"8 processes were launched on this machine, which has 2 GPUs.*--num_processes 4"):
        start()


def test_fsdp1_and_offload_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP1.*fsdp_version: 2"):
        start()
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="fsdp_offload_params"):
        start()
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ValueError, match=r"fsdp_activation_checkpointing.*train\.gradient_checkpointing"):
        start()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_stage is 1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer_device to cpu"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param_device to nvme"),
        ({"gradient_clipping": 0.5}, "gradient_clipping to 0.5.*optim.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "enables bf16.*round"),
        ({"torch_autocast": {"enabled": True}}, "enables torch_autocast"),
        ({"communication_data_type": "fp16"}, "sets communication_data_type, which may change"),
        ({"optimizer": {"type": "AdamW"}}, "sets optimizer, which may change"),
    ],
)
def test_a_deepspeed_config_that_would_change_the_curve_is_refused(settings: dict, sentence: str) -> None:
    written_by_accelerate = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
        "steps_per_print": math.inf,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }

    def accelerator(config: dict) -> SimpleNamespace:
        return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))

    _configure_deepspeed(accelerator(written_by_accelerate))
    with pytest.raises(ValueError, match=sentence):
        _configure_deepspeed(accelerator({**written_by_accelerate, **settings}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_config_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises(ValueError, match=r"for a GPU, but torch sees none.*cpu\.yaml"):
        start()


def test_an_error_stands_in_the_status(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` turns every exit code into 1; a queue's script reads this instead."""

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(Run, "save", lost)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train(recipe, f"output.dir={recipe.parent}/error")
    status = json.loads((recipe.parent / "error" / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("failed", 1, "RuntimeError: the disk is gone")


def test_a_run_on_one_device_never_imports_deepspeed(recipe: Path, tmp_path: Path) -> None:
    """It takes seconds, a compiler and sometimes the run: accelerate's and transformers' helpers import it wherever it is installed."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from in_process import train
for number, overrides in enumerate(([], ["adapter=none", "model.quantization=none", "evaluation.every_steps=1"])):
    train(Path({str(recipe)!r}), f"output.dir={tmp_path}/{{number}}", "train.max_steps=2", "previews.prompts=[Hello]", *overrides)
print("imported:", sorted(name for name in sys.modules if name.partition(".")[0] == "deepspeed")[:3])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "1" / "final" / "model.safetensors").exists()
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_a_run_whose_launcher_dies_is_asked_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`accelerate launch` does not pass every signal on; a run started by hand may outlive its shell."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for launched in (True, False):
            if launched:
                monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
            else:
                monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
            request = StopRequest(tmp_path)
            assert not request.asked()
            with monkeypatch.context() as patch:
                patch.setattr("os.getppid", lambda: 1)
                assert request.asked() is launched
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
