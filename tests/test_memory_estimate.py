"""What scripts/preflight.py says of memory, against the bytes of real models: every kind of base, on the CPU, in true 4 and 8 bits."""

import functools
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_recipe
from families import tokenizer_of
from tiny_models import CONFIGS, tiny
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM

from qlora_suite import cards, compatibility, fast_paths, memory_estimate, module_table, optimizer
from qlora_suite.batches import Limit
from qlora_suite.engine import autocast
from qlora_suite.generation import decode
from qlora_suite.loss import Batch, collate, summed_loss
from qlora_suite.memory_estimate import Component, LiveBytes, loss_of, measured, sampled, stored, suggested, traced, traced_sampling
from qlora_suite.micro_batch import by_speed, set_checkpointing
from qlora_suite.model import compute_dtype
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load
from qlora_suite.samples import blank_row
from qlora_suite.sampling import Draw, Sampling
from qlora_suite.trainable import build_model

MARKERS = {"token_ids": [5, 9], "predicted": True}
LENGTH, ROWS = 64, 2
ACTIVATIONS, PEAK = 0.01, 0.05
"""Allowed differences to what was measured: of what is kept for the backward pass, and of the most that a step holds."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of each architecture, in Hugging Face format."""
    folders = {}
    for architecture in CONFIGS:
        folders[architecture] = folder = tmp_path_factory.mktemp(architecture)
        tiny(architecture).save_pretrained(folder)
        tokenizer_of("llama3").save_pretrained(folder)
    return folders


def recipe_of(folder: Path, base: Path, *overrides: str) -> Recipe:
    return load(write_recipe(folder, base, Path("unused.jsonl"), *overrides))


def storage_bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Of different storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_of_state(state: object) -> list[Tensor]:
    found = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = getattr(state, "state2", None)
    return found + (tensors_of_state(nested) if nested is not None else [])


def tensors_of_base(base: nn.Module) -> list[Tensor]:
    """Frozen weights, buffers, quantisation states, 8-bit scales."""
    found: list[Tensor] = []
    for name, parameter in base.named_parameters():
        if parameter.requires_grad or ".lora_" in name or "trainable_tokens" in name:
            continue
        found.append(parameter)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += tensors_of_state(state)
    for module in base.modules():
        if (scales := getattr(getattr(module, "state", None), "SCB", None)) is not None:  # bitsandbytes moves it there in the first pass
            found.append(scales)
    return [*found, *base.buffers()]


def batch_of(length: int, rows: int) -> Batch:
    """Packed rows, every token supervised: what train.py tries first."""
    half = length // 2
    row = {"input_ids": list(range(length)), "supervised": [False] * length, "lengths": [half, length - half]}
    return collate([row] * rows, 0, all_supervised=True)


QUANTIZATIONS = {
    "nf4": ["model.quantization=nf4"],
    "nf4-plain": ["model.quantization=nf4", "model.double_quantization=false"],
    "int8": ["model.quantization=int8"],
    "none": ["model.quantization=none"],
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ["phi", "llama", "qwen3", "gemma2", "phi3"])
def test_base_adapter_gradients_and_optimiser_are_the_bytes_of_a_real_step(
    bases: dict[str, Path], tmp_path: Path, architecture: str, quantization: str
) -> None:
    recipe = recipe_of(tmp_path, bases[architecture], *QUANTIZATIONS[quantization], "adapter.rank=8")
    for dtype in (torch.float32, torch.bfloat16)[: 2 if architecture == "phi" else 1]:
        net, _ = build_model(recipe, {"role_markers": MARKERS}, dtype, CPU)
        net.train()
        steps = optimizer.build(net, recipe.optim)
        with autocast(CPU, dtype):
            summed_loss(net, batch_of(32, 1)).backward()
        steps.step()
        trained = [p for p in net.parameters() if p.requires_grad]

        skeleton = module_table.build(recipe, MARKERS, dtype)
        parts = {part.name: part.bytes for part in stored(skeleton, "adamw", compatibility.ONE, 1)}
        in_base = sum(size for name, size in parts.items() if name.startswith("base"))
        assert in_base == storage_bytes(tensors_of_base(net))
        assert parts["LoRA weights"] + parts["trained token rows"] == storage_bytes(trained)
        assert parts["gradients"] == storage_bytes([p.grad for p in trained])
        states = [v for state in steps.state.values() for v in state.values() if isinstance(v, Tensor)]
        assert parts["optimiser (adamw)"] == storage_bytes(states)
        assert sum(row.bytes for row in module_table.rows(skeleton)) + skeleton.buffers == in_base
        assert sum(row.adapted for row in module_table.rows(skeleton)) == sum(p.numel() for p in trained)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_each_optimisers_state_is_counted_to_the_byte(name: str) -> None:
    shapes = [(16, 64), (64, 64), (96, 65), (3,), (5000,)]
    model = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)
    recipe = Recipe.model_validate(
        {
            "model": {"base": "x"},
            "data": {"source": "x", "prepared": "x"},
            "optim": {"name": name, "learning_rate": 1e-3},
            "train": {"rows_per_step": 1},
            "output": {"dir": "x"},
        }
    )
    steps = optimizer.build(model, recipe.optim)
    sum(p.square().sum() for p in model).backward()
    steps.step()
    states = [v for state in steps.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert memory_estimate.optimizer_bytes(shapes, name) == storage_bytes(states)


@pytest.mark.parametrize("checkpointing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dropout", [0.0, 0.05])  # without it LoRA is fused
@pytest.mark.parametrize(
    ("architecture", "quantization", "dtype"),
    [
        ("phi", "nf4", torch.float32),
        ("phi", "nf4", torch.bfloat16),
        ("phi", "none", torch.bfloat16),
        ("llama", "nf4", torch.bfloat16),
        ("llama", "int8", torch.float32),
        ("qwen3", "nf4-plain", torch.float32),
        ("gemma2", "nf4", torch.bfloat16),
        ("phi3", "nf4", torch.bfloat16),
        ("mistral", "nf4", torch.float32),
    ],
)
def test_activations_and_peak_are_those_of_a_real_step(
    bases: dict[str, Path], tmp_path: Path, architecture: str, quantization: str, dtype: torch.dtype, checkpointing: float, dropout: float
) -> None:
    recipe = recipe_of(
        tmp_path,
        bases[architecture],
        *QUANTIZATIONS[quantization],
        f"adapter.dropout={dropout}",
        "speed.dequantize_once=false",
        "speed.attention=plain",
    )
    net, base = build_model(recipe, {"role_markers": MARKERS}, dtype, CPU)
    fast_paths.take(net, base, recipe.speed, dtype, LENGTH, packed=True, engine=compatibility.ONE)
    net.train()
    set_checkpointing(base, checkpointing)
    batch = batch_of(LENGTH, ROWS)

    def loss() -> Tensor:
        with autocast(CPU, dtype):
            return summed_loss(net, batch)

    loss().backward()  # gradients are there, and so are the states that bitsandbytes makes in its first pass
    gc.collect()
    real = measured(net, base.get_output_embeddings(), loss)
    guess = traced(module_table.build(recipe, MARKERS, dtype), ROWS, LENGTH, checkpointing, cuda=False)
    assert guess.activations == pytest.approx(real.activations, rel=ACTIVATIONS)
    assert guess.total == pytest.approx(real.total, rel=PEAK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["phi", "llama", "gemma2", "phi3"])
@pytest.mark.parametrize(("rows", "prompt", "more"), [(6, 16, 48), (4, 60, 4)])  # the last token's peak, and the prompts'
def test_what_sampling_takes_is_what_it_really_takes(
    bases: dict[str, Path], tmp_path: Path, architecture: str, dtype: torch.dtype, rows: int, prompt: int, more: int
) -> None:
    recipe = recipe_of(tmp_path, bases[architecture], "speed.dequantize_once=false")
    net, base = build_model(recipe, {"role_markers": MARKERS}, dtype, CPU)
    fast_paths.take(net, base, recipe.speed, dtype, LENGTH, packed=False, engine=compatibility.ONE)
    sampling, prompts = Sampling(1.0), [[7 + row] * prompt for row in range(rows)]
    gc.collect()
    known = [*tensors_of_base(base), *net.parameters(), *net.buffers()]
    with LiveBytes(known) as live, autocast(CPU, dtype):
        answers = decode(net, prompts, [0], more, draw=Draw(sampling, sampling.generators(prompts)))
    assert max(map(len, answers)) == more
    skeleton = module_table.build(recipe, MARKERS, dtype)
    cache, peak = traced_sampling(skeleton, rows, prompt, prompt + more, cuda=False)
    assert peak == pytest.approx(live.peak, rel=0.1)
    config = base.config
    heads, width = config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture != "gemma2":  # which keeps a window of some layers
        assert cache == pytest.approx(2 * config.num_hidden_layers * heads * width * dtype.itemsize * rows * (prompt + more - 1), rel=0.01)
    parts = [Component("gradients", 7, ""), Component("base", 100, "")]
    by_itself = sampled(skeleton, parts, compatibility.ONE, rows, prompt, prompt + more, None, True)
    assert (by_itself.answers, by_itself.cache, by_itself.total) == (rows, cache, peak + 100)


def test_at_another_temperature_all_logits_are_there_at_once(bases: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for temperature in (1.0, 0.7):
        grpo = f"grpo={{rewards: [{{name: no_repetition}}], max_new_tokens: 16, temperature: {temperature}}}"
        recipe = recipe_of(tmp_path, bases["phi"], "data.packing=false", "speed.dequantize_once=false", grpo)
        loss_sum = loss_of(recipe)
        net, base = build_model(recipe, {"role_markers": MARKERS}, torch.float32, CPU)
        fast_paths.take(net, base, recipe.speed, torch.float32, LENGTH, packed=False, engine=compatibility.ONE)
        net.train()
        set_checkpointing(base, 0.0)
        batch = collate([blank_row(LENGTH)] * ROWS, 0, all_supervised=True)
        loss_sum(net, batch).backward()
        gc.collect()
        real = measured(net, base.get_output_embeddings(), lambda net=net, batch=batch, loss_sum=loss_sum: loss_sum(net, batch))
        guess = traced(module_table.build(recipe, MARKERS, torch.float32), ROWS, LENGTH, 0.0, False, loss_sum)
        assert guess.total == pytest.approx(real.total, rel=PEAK)
        found[temperature] = guess.loss
    logits = ROWS * (LENGTH - 1) * base.config.vocab_size * 4
    assert found[0.7] > 2 * logits


def test_phi2_on_a_t4_samples_half_of_a_steps_answers_at_once(tmp_path: Path) -> None:
    """Keys and values of a token by hand: 32 layers x 2 x 2,560 x 2 B = 320 KiB; of 64 answers with 768 tokens 15 GiB, all it has."""
    recipe = load(ROOT / "recipes" / "phi2_concise_grpo.yaml", [f"model.base={phi2(tmp_path)}"])
    skeleton = module_table.build(recipe, {"token_ids": [50295, 50296], "predicted": False}, torch.float16)
    parts = [*stored(skeleton, "adamw", compatibility.ONE, 1), memory_estimate.reference(skeleton)]
    found = sampled(skeleton, parts, compatibility.ONE, 64, 512, 768, cards.named("t4").memory, False)
    assert found.answers == 32
    assert found.cache == pytest.approx(32 * 768 * 320 * 1024, rel=0.01)
    assert found.total - found.cache - sum(part.bytes for part in parts if part.name != "gradients") < 0.6 * 2**30
    assert sampled(skeleton, parts, compatibility.DDP, 1, 512, 768, None, False).total > found.total * 0.2


def saved_bytes(net: nn.Module, loss: object) -> int:
    """Of the tensors that autograd keeps, by its own hooks; weights and what is held in passing are not among them."""
    seen: dict[int, Tensor] = {}
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss()
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def test_two_steps_tell_what_more_rows_need(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bases["qwen2"])
    skeleton = module_table.build(recipe, MARKERS, torch.float16)
    for checkpointing in (0.0, 0.5, 1.0):
        one, two, five = (traced(skeleton, rows, LENGTH, checkpointing) for rows in (1, 2, 5))
        assert memory_estimate._with_rows(one, two, 5).total == pytest.approx(five.total, rel=0.01)


def test_the_card_decides_micro_batch_and_checkpointing_as_the_trial_would(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, bases["llama"])
    skeleton = module_table.build(recipe, MARKERS, torch.float16)
    parts = stored(skeleton, "adamw", compatibility.ONE, 1)
    held = sum(part.bytes for part in parts)
    once = functools.cache(lambda rows, share: traced(skeleton, rows, LENGTH, share))
    monkeypatch.setattr(memory_estimate, "traced", lambda _skeleton, rows, _length, share, *_: once(rows, share))
    ways = by_speed(recipe.train, 4, LENGTH)
    needs = {way: once(*way).total for way in ways}

    def choice(room: int) -> tuple[int, float]:
        memory = int((held + room) / memory_estimate.HEADROOM) + 64
        found = suggested(skeleton, parts, recipe.train.model_copy(update={"rows_per_step": 4}), 4, LENGTH, memory, False)
        return found.limit.tokens // LENGTH, found.checkpointing

    assert choice(needs[4, 0.0]) == (4, 0.0)
    assert choice(needs[4, 0.0] - 4096) == (4, 0.25)  # rows of so few tokens: weights are made ready half as often as with two rows
    for way in ways:
        assert choice(needs[way]) == next(faster for faster in ways if needs[faster] <= needs[way])
    assert choice(0) == (1, 1.0), "the smallest, where nothing fits"
    fixed = recipe.train.model_copy(update={"rows_per_step": 4, "micro_batch": 4, "gradient_checkpointing": False})
    assert suggested(skeleton, parts, fixed, 4, LENGTH, held, False).limit == Limit(4, 4 * LENGTH)


def test_engines_share_what_they_share(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bases["llama"])
    skeleton = module_table.build(recipe, MARKERS, torch.bfloat16)

    def parts(engine: str, processes: int = 4) -> dict[str, int]:
        return {part.name: part.bytes for part in stored(skeleton, "adamw", engine, processes)}

    one, ddp, zero2, zero3, fsdp = (
        parts(e) for e in (compatibility.ONE, compatibility.DDP, compatibility.ZERO2, compatibility.ZERO3, compatibility.FSDP2)
    )
    assert ddp == one  # its buckets are the gradients
    assert zero2["base, 4-bit"] == one["base, 4-bit"]
    assert zero2["optimiser (adamw)"] < one["optimiser (adamw)"]
    for sharded in (zero3, fsdp):
        assert sharded["base, 4-bit"] == -(-one["base, 4-bit"] // 4)
        assert sharded["gathered weights"] > 0
    assert fsdp["optimiser (adamw)"] == -(-one["optimiser (adamw)"] // 4)


def phi2(folder: Path) -> Path:
    """Phi-2's config in a folder: what is needed of the base, beside a tokenizer, to know what it takes."""
    PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
        max_position_embeddings=2048,
        resid_pdrop=0.1,
        hidden_act="gelu_new",
        architectures=["PhiForCausalLM"],
    ).save_pretrained(folder)
    tokenizer_of("phi2").save_pretrained(folder)
    return folder


def test_phi2_fits_a_t4_without_checkpointing_and_its_parts_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    recipe = load(ROOT / "recipes" / "phi2_oasst1.yaml", [f"model.base={phi2(tmp_path)}", "adapter.rank=16"])
    skeleton = module_table.build(recipe, {"token_ids": [50295, 50296], "predicted": False}, torch.float16)
    parts = stored(skeleton, "adamw", compatibility.ONE, 1)
    size = {part.name: part.bytes for part in parts}
    linear = 12 * 2560**2 * 32
    assert size["base, 4-bit"] == pytest.approx(linear * 4.127 / 8, rel=0.001)
    assert size["base, float16"] == pytest.approx(2 * 51200 * 2560 * 2, rel=0.01)
    assert size["LoRA weights"] == 4 * 23_592_960  # rank 16 on all six: q, k, v, dense 32 x 5,120 x 4, fc1 and fc2 16 x 12,800 each
    train = recipe.train.model_copy(update={"micro_batch": 1})
    found = suggested(skeleton, parts, train, 16, 2048, cards.named("t4").memory, False)
    assert found.checkpointing == 0
    # by hand, of 75 KiB a token and layer in bf16 on a CPU: 4.7 GiB; in fp16 on a GPU layer norms and residuals are fp32
    assert 4.7 * 2**30 < found.step.activations < 5.7 * 2**30
    assert 7 * 2**30 < found.total < 9 * 2**30


def test_without_checkpointing_activations_are_what_autograd_saves(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bases["llama"], "model.quantization=nf4")
    net, base = build_model(recipe, {"role_markers": MARKERS}, torch.float32, CPU)
    net.train()
    set_checkpointing(base, 0.0)

    def layers() -> None:
        ids = batch_of(LENGTH, ROWS)
        base.model(input_ids=ids.input_ids, position_ids=ids.position_ids, attention_mask=None, use_cache=False)

    saved = saved_bytes(net, layers)
    guess = traced(module_table.build(recipe, MARKERS, torch.float32), ROWS, LENGTH, 0.0, cuda=False)
    hidden = ROWS * LENGTH * base.config.hidden_size * 4
    assert saved <= guess.activations <= saved + 2 * hidden  # what the head is given is not saved, and there


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest -m gpu` on a machine with one")
@pytest.mark.parametrize("checkpointing", [0.0, 0.5, 1.0])
def test_on_a_gpu_the_allocators_peak_is_within_a_tenth_of_the_estimate(tmp_path: Path, checkpointing: float) -> None:
    config = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=4,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
        max_position_embeddings=2048,
    )
    PhiForCausalLM(config).to(torch.float16).save_pretrained(tmp_path / "base")
    tokenizer_of("phi2").save_pretrained(tmp_path / "base")
    recipe = recipe_of(tmp_path, tmp_path / "base", "adapter.rank=32")
    device = torch.device("cuda", 0)
    dtype = compute_dtype(device, "no")
    net, base = build_model(recipe, {"role_markers": MARKERS}, dtype, device)
    net.train()
    set_checkpointing(base, checkpointing)
    batch = batch_of(2048, 2).to(device)
    for _ in range(2):  # the second time gradients are there
        torch.cuda.reset_peak_memory_stats(device)
        with autocast(device, dtype):
            loss = summed_loss(net, batch)
        loss.backward()
        del loss
    peak = torch.cuda.max_memory_allocated(device)
    skeleton = module_table.build(recipe, MARKERS, dtype)
    held = sum(p.bytes for p in stored(skeleton, "adamw", compatibility.ONE, 1) if not p.name.startswith("optimiser"))
    assert held + traced(skeleton, 2, 2048, checkpointing).total == pytest.approx(peak, rel=0.1)
