"""benchmarks/scaling.md: its FLOPs are those that torch counts, and its bytes those that real processes send."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PhiConfig, PhiForCausalLM

from qlora_suite.files import read_json
from qlora_suite.launched_runs import CONFIGS
from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected

sys.path.insert(0, str(ROOT / "benchmarks"))

import collectives
import scaling

COUNTS = read_json(scaling.COUNTS)
MORE = {"zero2": {"all_reduce": 4}}
"""Known, and in no formula: ZeRO-2's flag."""


def on_paper(engine: str, micro_batches: int) -> dict[str, int]:
    live = 0 if engine == scaling.NOT_LIVE else scaling.LIVE
    found = scaling.sent(engine.partition(",")[0], scaling.tiny_parts(), micro_batches, live)
    for kind, number in MORE.get(engine, {}).items():
        found[kind] = found.get(kind, 0) + number
    return found


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("engine", [*CONFIGS, scaling.NOT_LIVE])
def test_what_was_counted_is_the_formula_to_the_byte(engine: str, micro_batches: int) -> None:
    assert scaling.plain_counts(COUNTS[engine][str(micro_batches)]) == on_paper(engine, micro_batches)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_real_processes_still_send_that(engine: str, tmp_path: Path) -> None:
    """Two micro-batches a rank; the libraries of today. ZeRO's are counted by the command alone: they take twice as long."""
    recipe, overrides = ROOT / "recipes" / "quickstart.yaml", [*scaling.overrides_of(tmp_path), "train.micro_batch=1"]
    values = load(recipe, overrides)
    with selected(values) as selection:
        prepare(values, selection)
    counted = collectives.count(engine, recipe, overrides, tmp_path / engine)
    assert scaling.plain_counts(counted) == on_paper(engine, 2)
    calls, in_all = counted["all_reduce float64"]
    assert calls <= 2
    assert in_all <= 64


def test_the_parts_are_those_of_the_real_model() -> None:
    """Without the adapter, in fp32 and unpacked: the small model's parameters."""
    config = AutoConfig.from_pretrained(ROOT / "assets" / "tiny_phi")
    with torch.device("meta"):
        model = PhiForCausalLM(config)
    frozen = [part for part in scaling.parts_of(config, 1, (), plain=1) if not part.trained]
    packed = [part for part in frozen if part.unit == "layer" and part.elements > config.intermediate_size]
    assert sum(part.all_bytes for part in frozen) + sum(part.all_bytes for part in packed) == sum(p.numel() for p in model.parameters())


def test_phi_2_has_the_sizes_that_are_published() -> None:
    with torch.device("meta"):
        model = PhiForCausalLM(scaling.PHI2)
    assert sum(p.numel() for p in model.parameters()) == 2_779_683_840
    assert scaling.block_weights(scaling.PHI2) == sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    assert scaling.lora_weights(scaling.PHI2, 32, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")) == 47_185_920
    assert scaling.lora_weights(scaling.PHI2, 32, ("Wqkv", "fc1", "fc2")) == 26_214_400


@pytest.mark.parametrize("training", [False, True])
def test_the_flops_are_those_that_torch_counts(training: bool) -> None:
    """Of a frozen model: forward, and the backward pass to its input. Every key counts, for eager attention multiplies with zeros."""
    config = PhiConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, vocab_size=96, attn_implementation="eager"
    )
    model, length = PhiForCausalLM(config).requires_grad_(False), 16
    inputs = torch.randn(1, length, 64, requires_grad=training)
    with FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        if training:
            logits.sum().backward()
    attention = scaling.attention_flops(config, length) * length
    if training:  # eager attention's backward pass is twice its forward pass; a fused kernel's is 2.5 times, for it computes scores again
        paper = scaling.training_flops(config, 0, length, 1, tiled=False) * length - 0.5 * attention
    else:
        paper = scaling.forward_flops(config, 0, length, 1) * length
    assert counter.get_total_flops() == paper


def test_a_trained_weight_costs_six_flops_and_a_frozen_one_four() -> None:
    layer, inputs = torch.nn.Linear(8, 32, bias=False), torch.randn(4, 8, requires_grad=True)
    for trained, each in ((True, 6), (False, 4)):
        layer.requires_grad_(trained)
        with FlopCounterMode(display=False) as counter:
            layer(inputs).sum().backward()
        assert counter.get_total_flops() == each * 8 * 32 * 4


def test_the_page_is_what_the_command_makes() -> None:
    assert scaling.PAGE.read_text() == scaling.page(COUNTS)
    assert scaling.PLOT.read_text().startswith("<?xml")


def test_a_predicted_step_is_never_shorter_than_its_computing_or_its_exchange() -> None:
    for engine in scaling.ENGINES:
        steps = [scaling.step_of(engine, "H200", "InfiniBand HDR", ranks) for ranks in (1, 8, 16, 128)]
        assert all(step.hidden == max(step.compute, step.links) <= step.exposed for step in steps)
        assert [step.links for step in steps] == sorted(step.links for step in steps)
        assert steps[0].links == 0
