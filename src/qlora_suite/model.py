"""The base model, quantised or not, in the precision of the hardware: the one place that knows bitsandbytes."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_suite import recipe as recipes
from qlora_suite.files import sha256

BF16_CAPABILITY = (8, 0)
"""Ampere. torch.cuda.is_bf16_supported() says yes on a T4 too, where bf16 is emulated and slow."""


def compute_dtype(device: torch.device, asked: str) -> torch.dtype:
    """The type of the forward and backward pass.

    `asked` is the accelerate config's mixed_precision; "no" follows the hardware: bf16 from compute capability 8.0, fp16 below,
    fp32 on a CPU. Raises ValueError for bf16 on a card that only emulates it.
    """
    if device.type == "cpu":
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[asked]
    capability = torch.cuda.get_device_capability(device)
    if asked == "bf16" and capability < BF16_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"bf16 was asked for, but {name} (compute capability {capability[0]}.{capability[1]}) has no bf16 units and would emulate it "
            "slowly; use accelerate_configs/single_t4.yaml (fp16)"
        )
    if asked == "no":
        return torch.bfloat16 if capability >= BF16_CAPABILITY else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[asked]


def load_config(model: recipes.Model) -> PreTrainedConfig:
    """The base's config. Raises ValueError if there is no such model."""
    try:
        return AutoConfig.from_pretrained(model.base, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load(model, error)) from error


def load_tokenizer(model: recipes.Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, as published. Raises ValueError if it is missing or has no end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.base, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load(model, error)) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model.base} has no end token, so a model could not learn to stop; give it an eos_token")
    return tokenizer


def load_base(model: recipes.Model, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base on its device. Quantised weights compute in `dtype`; the others are stored in it.

    Raises ValueError if weights are missing, left over or newly initialised.
    """
    config = load_config(model)
    _prepare_config(config)
    if model.random_init:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.base,
            revision=model.revision,
            config=config,
            dtype=dtype,
            quantization_config=_quantization(model, dtype),
            device_map={"": device if device.index is not None or device.type == "cpu" else 0},  # accelerate says "cuda" for the only GPU
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load(model, error)) from error
    wrong = {what: sorted(map(str, info[what]))[:5] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
    if wrong:
        found = "; ".join(f"{what.replace('_', ' ')}: {', '.join(names)}" for what, names in wrong.items())
        raise ValueError(f"the weights of {model.base} do not fit {type(loaded).__name__}: {found}")
    _keep_4bit_layout(loaded)
    return loaded


def _keep_4bit_layout(model: nn.Module) -> None:
    """Let previews and evaluation leave the weights alone.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in eval mode, for a faster kernel that
    computes in bf16 and has no backward pass, and never packs them back: training after a preview dies or goes wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def logical_size(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; a 4-bit parameter holds two in each byte of its storage."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def base_fingerprint(model: recipes.Model) -> str:
    """Names the base's weights: the commit of a hub id, or a hash over the files of a folder."""
    folder = Path(model.base)
    if not folder.is_dir():
        return f"{model.base}@{getattr(load_config(model), '_commit_hash', None) or model.revision}"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import accelerate
    import bitsandbytes
    import peft

    modules = (torch, transformers, accelerate, peft, bitsandbytes)
    return {module.__name__: module.__version__ for module in modules}


def _prepare_config(config: PreTrainedConfig) -> None:
    """Settings that make no difference to what the model computes when it is used, and a large one to training it."""
    # gelu_new and gelu_pytorch_tanh are the same function (to 2.4e-7); the second is one fused kernel instead of eight and
    # keeps 60 KiB a token and layer less for the backward pass (Phi-2).
    for key in ("hidden_act", "activation_function"):
        if getattr(config, key, None) == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")
    # The base's own dropouts (Phi-2: 0.1 on the residuals) were for its pretraining. adapter.dropout is the one that counts.
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "attention_dropout_prob"):
        if getattr(config, key, None):
            setattr(config, key, 0.0)


def _quantization(model: recipes.Model, dtype: torch.dtype) -> Any:
    if model.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.double_quantization is not False,
        bnb_4bit_compute_dtype=dtype,
    )


def _cannot_load(model: recipes.Model, error: Exception) -> str:
    where = f"folder {model.base}" if Path(model.base).exists() else f"{model.base} (neither a folder here nor reachable on the hub)"
    return f"cannot load the base model from {where}: {str(error).splitlines()[0]}"
