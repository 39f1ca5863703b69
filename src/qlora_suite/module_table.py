"""A recipe's model without its weights: built on torch's meta device from the config alone, with the adapter on it, and counted.

skeleton = build(recipe, markers, torch.float16)      # seconds, no memory, no download beyond config.json
rows(skeleton)                                        # one line for each kind of module
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_suite.adapter import IN_A_LAYER, add_adapter
from qlora_suite.base_config import load_config
from qlora_suite.model import prepare_config
from qlora_suite.recipe import Recipe, Speed

BLOCK, NESTED_BLOCK = 64, 256
"""Of bitsandbytes: weights that share a scale, and scales that share a scale under double quantisation."""
NF4_CODE, NESTED_CODE, OFFSET = 16 * 4, 256 * 4, 4
"""Bytes that each 4-bit weight carries beside: the table of the 16 values, that of the 256 scales, and the scales' mean."""


@dataclass(frozen=True)
class Stored:
    """One tensor of the base."""

    name: str
    shape: tuple[int, ...]
    how: str
    """`nf4`, `int8`, or the type: `float16`."""
    bytes: int

    @property
    def parameters(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Skeleton:
    net: nn.Module
    """What would be trained, on the meta device: a PeftModel, or the base itself."""
    base: PreTrainedModel
    weights: tuple[Stored, ...]
    """Of the base, each once (a tied head is its embedding)."""
    buffers: int
    """Bytes of what is no parameter: rotary frequencies, and the rows that trained token rows stand for."""
    trained: dict[str, tuple[int, ...]]
    """Name -> shape of each trained parameter, all of them fp32."""
    dtype: torch.dtype
    """What is computed in."""
    speed: Speed
    """Which of the faster ways may be taken."""

    @property
    def num_trained(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.trained.values())


@dataclass(frozen=True)
class Row:
    """Modules of one kind, in all layers."""

    pattern: str
    """`model.layers.*.mlp.fc1`"""
    shape: tuple[int, ...]
    count: int
    stored: str
    adapted: int
    """Parameters that the adapter adds; 0 if the modules are left as they are."""
    parameters: int
    bytes: int


def build(recipe: Recipe, markers: Mapping[str, Any] | None, dtype: torch.dtype) -> Skeleton:
    """The skeleton of what scripts/train.py would train, computing in `dtype`. `markers`: role_markers of the prepared data, if any.

    Raises ValueError if there is no config, or the adapter's targets do not cover the model.
    """
    config = load_config(recipe.model)
    prepare_config(config, recipe.speed.gelu == "auto")
    everything = recipe.adapter == "none"
    stored_in = torch.float32 if everything or recipe.model.random_init else dtype
    config.quantization_config = None  # of a base that is quantised already; how it is held is the recipe's to say
    del config.quantization_config
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=stored_in)
    quantized = _quantized_modules(base) if recipe.model.quantization != "none" else frozenset()
    in_fp32 = re.compile("|".join(base._get_dtype_plan(stored_in)) or r"(?!)")
    weights = tuple(_stored(name, p, recipe, quantized, in_fp32, stored_in) for name, p in base.named_parameters())
    if everything:
        base.requires_grad_(True)
        net = base
    else:
        _take_quantized_classes(base, quantized, recipe, dtype)
        ids = tuple((markers or {}).get("token_ids", ()))
        targets = recipe.chat.loss_on == "all" or bool((markers or {}).get("predicted"))
        # an initialisation that reads the base's weights changes no size
        net = add_adapter(base, recipe.adapter.model_copy(update={"init": "default"}), ids, targets)
    buffers = sum({b.untyped_storage()._cdata: b.untyped_storage().nbytes() for b in net.buffers()}.values())
    trained = {name: tuple(p.shape) for name, p in net.named_parameters() if p.requires_grad}
    return Skeleton(net, base, weights, buffers, trained, dtype, recipe.speed)


def rows(skeleton: Skeleton) -> list[Row]:
    """One row for each kind of base module that holds weights, in the model's order."""
    adapter_sizes: dict[str, int] = defaultdict(int)
    for name, shape in skeleton.trained.items():
        if ".lora_" in name or ".trainable_tokens_" in name:
            where = re.split(r"\.lora_|\.(?:token_adapter\.)?trainable_tokens_", name)[0].removeprefix("base_model.model.")
            adapter_sizes[where] += torch.Size(shape).numel()
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[str, Stored]]] = defaultdict(list)
    biases: dict[str, list[Stored]] = defaultdict(list)
    for one in skeleton.weights:
        module, _, kind = one.name.rpartition(".")
        if kind == "bias":
            biases[module].append(one)
        else:
            match = IN_A_LAYER.match(module)
            pattern = f"{match['stack']}.*.{match['rest']}" if match else module or one.name
            groups[pattern, one.shape, one.how].append((module, one))
    found = []
    for (pattern, shape, how), members in groups.items():
        all_of = [s for module, one in members for s in (one, *biases[module])]
        adapted = sum(adapter_sizes[module] for module, _ in members)
        found.append(Row(pattern, shape, len(members), how, adapted, sum(s.parameters for s in all_of), sum(s.bytes for s in all_of)))
    return found


def bytes_of_nf4(numel: int, double: bool) -> int:
    """A 4-bit weight with its quantisation state: two values a byte, a scale for each 64, and the tables."""
    blocks = -(-numel // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + NESTED_CODE + OFFSET if double else 4 * blocks
    return -(-numel // 2) + scales + NF4_CODE


def bytes_of_int8(shape: tuple[int, ...]) -> int:
    """An 8-bit weight, with a scale for each of its rows."""
    return torch.Size(shape).numel() + 4 * shape[0]


def _quantized_modules(base: PreTrainedModel) -> frozenset[str]:
    """Linear modules that transformers would quantise: all but the head, and what a model says must stay in fp32."""
    kept = [*get_keys_to_not_convert(base), *(base._keep_in_fp32_modules or ())]
    linear = (name for name, module in base.named_modules() if isinstance(module, Conv1D) or type(module) is nn.Linear)
    return frozenset(name for name in linear if should_convert_module(name, kept))


def _stored(
    name: str, parameter: nn.Parameter, recipe: Recipe, quantized: frozenset[str], in_fp32: re.Pattern[str], dtype: torch.dtype
) -> Stored:
    module, _, kind = name.rpartition(".")
    shape = tuple(parameter.shape)
    if kind == "weight" and module in quantized:
        if recipe.model.quantization == "int8":
            return Stored(name, shape, "int8", bytes_of_int8(shape))
        return Stored(name, shape, "nf4", bytes_of_nf4(parameter.numel(), recipe.model.double_quantization is not False))
    dtype = torch.float32 if in_fp32.search(name) else dtype
    return Stored(name, shape, str(dtype).removeprefix("torch."), parameter.numel() * dtype.itemsize)


def _take_quantized_classes(base: PreTrainedModel, quantized: frozenset[str], recipe: Recipe, dtype: torch.dtype) -> None:
    """Put bitsandbytes' modules in the places of those that would be quantised, for PEFT computes otherwise on these.

    Not with DoRA, whose start wants the weights' norms: its activations are then those of an unquantised base, a little more.
    """
    import bitsandbytes.nn

    if recipe.adapter.dora:
        return
    for name in quantized:
        old = base.get_submodule(name)
        bias = old.bias is not None
        with torch.device("meta"):
            if recipe.model.quantization == "int8":
                new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, bias, has_fp16_weights=False)
            else:
                new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias, compute_dtype=dtype)
        new.requires_grad_(False)
        base.set_submodule(name, new)
