"""The adapter into the weights: a folder that plain transformers loads, with its template, and that stops by itself.

    source = published_base(assistant)                      # "16bit": the base as it was published
    source = assistant.net.get_base_model()                 # "dequantised": the 4-bit base, as the run had it
    weights, notes = merged(assistant.net, source, torch.bfloat16)
    write_model(folder, weights, assistant, torch.bfloat16)

    W   = the base's weight, dequantised where it is quantised
    W'  = W + scale B A                                     LoRA; scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA
    W'  = m (W + scale B A) / |W + scale B A|               DoRA; the norm of each row, m is trained
    row = the trained row                                   role markers, in the embedding and the output layer

Computed in fp32, one weight at a time, and rounded once. PEFT's own merge of a 4-bit layer quantises the sum again, which loses
most of what was learnt; here nothing is quantised again.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from qlora_suite.adapter import drops_bias
from qlora_suite.assistant import Assistant
from qlora_suite.base_config import load_config
from qlora_suite.chat import Renderer
from qlora_suite.model import load_base
from qlora_suite.recipe import Model
from qlora_suite.result import save_pretrained
from qlora_suite.subject import unquantised_base

ADAPTER = "default"
"""PEFT's name for the only adapter."""
MAX_SHARD = "4GB"
_WRAPPERS = re.compile(r"\.(base_layer|token_adapter|original_module)(?=\.)")
_OF_THE_ADAPTER = re.compile(r"\.(lora_\w+|trainable_tokens_\w+)\.")

Bar = Callable[[list[Any]], Iterable[Any]]


def published_type(config: PreTrainedConfig) -> torch.dtype:
    """The type of the published weights, as their config names it; fp32 if it does not."""
    found = getattr(config.get_text_config(), "dtype", None) or torch.float32
    return found if isinstance(found, torch.dtype) else getattr(torch, str(found).removeprefix("torch."))


def published_base(model: Model, device: torch.device) -> PreTrainedModel:
    """The recipe's base as it was published, in its own type. Raises ValueError, with the reason, if it cannot be had."""
    plain, missing = unquantised_base(model)
    if missing:
        raise ValueError(missing)
    return load_base(plain, published_type(load_config(plain)), device)


def target_type(asked: str | None, computed_in: torch.dtype, published: torch.dtype) -> torch.dtype:
    """What the merged weights are rounded to: what was asked for, else the 16-bit type of the run, of the base, or bf16."""
    if asked:
        return getattr(torch, asked)
    return next((found for found in (computed_in, published) if found.itemsize == 2), torch.bfloat16)


@torch.no_grad()
def merged(net: PeftModel, source: PreTrainedModel, dtype: torch.dtype, bar: Bar = iter) -> tuple[dict[str, Tensor], list[str]]:
    """(weights by the name that they have in a plain model, what is to be said of them).

    `source` is the net's own base, which is left alone, or another copy of it, which is emptied on the way so that there are never
    two. Raises ValueError if a weight does not fit into `dtype` (fp16 ends at 65,504).
    """
    own = source is net.get_base_model()
    changed = {_plain(f"{name}.weight"): layer for name, layer in net.get_base_model().named_modules() if _changes(layer)}
    without_bias = {name.removesuffix("weight") + "bias" for name, layer in changed.items() if drops_bias(layer)}
    in_fp32 = re.compile("|".join(source._get_dtype_plan(dtype)) or r"(?!)")  # what a model says must not be rounded
    weights: dict[str, Tensor] = {}
    for names, tensor in bar(list(_weights_of(source))):
        for name in names:
            weight = _in_fp32(tensor, changed.get(name))
            if name in changed:
                weight = _with_change(weight, changed[name])
            if name in without_bias:
                weight = torch.zeros_like(weight)
            weights[name] = _rounded(name, weight, torch.float32 if in_fp32.search(name) else dtype)
        if not own:
            tensor.data = torch.empty(0)
    if unknown := changed.keys() - weights.keys():
        raise ValueError(f"the adapter changes {sorted(unknown)[0]}, which {source.name_or_path} does not have")
    notes = [
        f"{name} is zero: the model learnt without it, for PEFT leaves out the bias of a layer that has trained rows"
        for name in sorted(without_bias & weights.keys())
    ]
    return weights, notes


def _weights_of(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each tensor of a base once, with its plain names: two where weights are tied."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *_persistent_buffers(model)]:
        if not _OF_THE_ADAPTER.search(name):
            names.setdefault(id(tensor), []).append(_plain(name))
            tensors[id(tensor)] = tensor
    return ((sorted(set(of_one)), tensors[key]) for key, of_one in names.items())


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _plain(name: str) -> str:
    """A parameter's name without the modules that PEFT puts around it."""
    return _WRAPPERS.sub("", name)


def _changes(layer: nn.Module) -> bool:
    return isinstance(layer, TrainableTokensLayer) or (isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A)


def _in_fp32(tensor: Tensor, layer: nn.Module | None) -> Tensor:
    """The values that the base computes with."""
    import bitsandbytes.functional as bnb

    state = getattr(tensor, "quant_state", None)
    if state is not None:  # in the type that it computes in, for this is what the run saw
        return bnb.dequantize_4bit(tensor.data, state).float()
    if (scales := getattr(tensor, "SCB", None)) is not None or (scales := _int8_scales(tensor, layer)) is not None:
        return bnb.int8_vectorwise_dequant(tensor.data, scales).float()
    return tensor.detach().float()


def _int8_scales(tensor: Tensor, layer: nn.Module | None) -> Tensor | None:
    """After a forward pass bitsandbytes keeps them in the layer's state."""
    if tensor.dtype != torch.int8 or layer is None:
        return None
    return layer.get_base_layer().state.SCB


def _with_change(weight: Tensor, layer: nn.Module) -> Tensor:
    """[out, in] or [tokens, width], fp32."""
    if isinstance(layer, TrainableTokensLayer):
        rows = torch.tensor(layer.token_indices[ADAPTER], device=weight.device)
        return weight.index_copy(0, rows, layer.trainable_tokens_delta[ADAPTER].to(weight))
    # PEFT's scale times B A; it multiplies in the type of the two, which is fp32
    changed = weight + layer.get_delta_weight(ADAPTER).to(weight)
    if layer.use_dora[ADAPTER]:
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.to(weight)
        changed = changed * (magnitude / changed.norm(dim=1)).unsqueeze(1)
    return changed


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = weight.to(dtype).cpu()
    if not rounded.isfinite().all():
        kind, largest = str(dtype).removeprefix("torch."), weight.abs().max().item()
        raise ValueError(f"{name} does not fit into {kind} (largest weight: {largest:.3g}); use --dtype bfloat16")
    return rounded


def untie(weights: dict[str, Tensor], config: PreTrainedConfig, names: tuple[str, str] | None) -> str:
    """Let the embedding and the output layer be two if training made them differ. Says so, or is empty.

    `names` are those of the two weights in a model that ties them.
    """
    if names is None or not config.get_text_config().tie_word_embeddings:
        return ""
    embedding, head = names
    if head not in weights or torch.equal(weights[embedding], weights[head]):
        weights[head] = weights[embedding]
        return ""
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return f"{embedding} and {head} were tied in the base and are two weights now, for rows of one were trained and not of the other"


def tied_names(model: PreTrainedModel) -> tuple[str, str] | None:
    """(embedding, output layer), by their plain names; None if the model has no output layer of its own name."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [next((f"{name}.weight" for name, module in model.named_modules() if module is part), None) for part in parts]
    return (_plain(found[0]), _plain(found[1])) if all(found) else None


def generation_config(renderer: Renderer, model: Model) -> GenerationConfig:
    """The base's own, but for the tokens: it ends on what was trained to end an answer."""
    stop_ids = list(renderer.stop_token_ids)
    tokenizer = renderer.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else renderer.eos
    tokens = {"eos_token_id": stop_ids, "pad_token_id": pad, "bos_token_id": renderer.bos}
    try:
        config = GenerationConfig.from_pretrained(model.base, revision=model.revision)
        config.update(**tokens)
        config.validate(strict=True)
    except (OSError, ValueError):  # it has none, or one that cannot be written
        config = GenerationConfig(**tokens)
    vars(config).pop("_from_model_config", None)  # or transformers would take the tokens of config.json in its place
    return config


def write_model(folder: Path, weights: dict[str, Tensor], assistant: Assistant, dtype: torch.dtype) -> str:
    """config.json, safetensors in shards, generation_config.json, tokenizer and template. Says what had to be untied, or nothing.

    Everything but the weights is the base's, as it was published; no trace of the quantisation is left.
    """
    model = assistant.recipe.model
    config = load_config(model)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    note = untie(weights, config, tied_names(assistant.net.get_base_model()))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    expected = skeleton.state_dict().keys()
    assert weights.keys() == expected, f"not the weights of {type(skeleton).__name__}: {sorted(weights.keys() ^ expected)[:5]}"
    skeleton.generation_config = generation_config(assistant.renderer, model)
    save_pretrained(skeleton, folder, weights, max_shard_size=MAX_SHARD)
    assistant.renderer.tokenizer.save_pretrained(folder)
    return note
