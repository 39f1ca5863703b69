"""The base model, quantised or not, in the precision of the hardware: the one place that knows bitsandbytes."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from qlora_suite import base_files, prequantized
from qlora_suite import recipe as recipes
from qlora_suite.base_config import cannot_load, load_config
from qlora_suite.files import sha256

PRECISIONS = {"no": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the accelerate config; `fp32` is not accelerate's: scripts/verify.py sets it in the environment."""
BF16_CAPABILITY = (8, 0)
"""Ampere. torch.cuda.is_bf16_supported() says yes on a T4 too, where bf16 is emulated and slow."""


def compute_dtype(device: torch.device, asked: str) -> torch.dtype:
    """The type of the forward and backward pass.

    `asked` is the accelerate config's mixed_precision; "no" follows the hardware: bf16 from compute capability 8.0, fp16 below,
    fp32 on a CPU. Raises ValueError for bf16 on a card that only emulates it, and for what is no precision.
    """
    if asked not in PRECISIONS:
        raise ValueError(f"mixed_precision: {asked} is not supported; use bf16, fp16 or no, which follows the hardware")
    if device.type == "cpu":
        return PRECISIONS[asked] or torch.float32
    capability = torch.cuda.get_device_capability(device)
    if asked == "bf16" and capability < BF16_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"bf16 was asked for, but {name} (compute capability {capability[0]}.{capability[1]}) has no bf16 units and would emulate it "
            "slowly; use accelerate_configs/single_t4.yaml (fp16)"
        )
    if asked == "no":
        return torch.bfloat16 if capability >= BF16_CAPABILITY else torch.float16
    return PRECISIONS[asked]


def load_base(
    model: recipes.Model, dtype: torch.dtype, device: torch.device, quant_storage: torch.dtype | None = None, fused_gelu: bool = True
) -> PreTrainedModel:
    """The base on its device. Quantised weights compute in `dtype`; the others are stored in it.

    4-bit weights are packed two in a byte and the bytes held as `quant_storage`, which changes no value: FSDP2 shards only what has
    the type of its other parameters. None: uint8, or however a base that is quantised already holds them.
    Raises ValueError if weights are missing, left over or newly initialised, or quantised in another way than the recipe asks for,
    and OutOfMemoryError if a GPU is too small.
    """
    if model.quantization != "none":
        _check_bitsandbytes(model.quantization)
    config = load_config(model)
    prepare_config(config, fused_gelu)
    if model.random_init:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).to(device)
    try:
        base_files.check_is_no_adapter(model)
        base_files.check_weights(model, config)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(model, error)) from error
    prequantized.check_quantization(model, config, quant_storage)
    quantized_already = prequantized.quantization_of(config) is not None
    if quantized_already:  # its own settings stand, but for the precision, which is this run's
        config.quantization_config = {**config.quantization_config, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    memory_was_short = _times_memory_was_short(device)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.base,
            revision=model.revision,
            config=config,
            dtype=dtype,
            quantization_config=None if quantized_already else _quantization(model, dtype, quant_storage or torch.uint8),
            device_map={"": device if device.index is not None or device.type == "cpu" else 0},  # accelerate says "cuda" for the only GPU
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(model, error)) from error
    except RuntimeError as error:
        # transformers goes on after an error in quantising a weight, and in the end raises one of its own that does not name it
        if _times_memory_was_short(device) > memory_was_short and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(f"{model.base} does not fit into the memory of {device}") from error
        if quantized_already and not isinstance(error, torch.OutOfMemoryError):
            raise ValueError(f"the quantised weights of {model.base} are not whole, or not in a form that can be read here") from error
        raise
    wrong = {what: sorted(map(str, info[what]))[:5] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
    if wrong:
        found = "; ".join(f"{what.replace('_', ' ')}: {', '.join(names)}" for what, names in wrong.items())
        raise ValueError(f"the weights of {model.base} do not fit {type(loaded).__name__}: {found}")
    if quantized_already:
        _take_precision(loaded, dtype)
    _keep_4bit_layout(loaded)
    return loaded


def _check_bitsandbytes(quantization: str) -> None:
    """Raises ValueError if it cannot be used, before transformers says that it is too old, or missing, or without CUDA."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # it loads a library of its own, and raises whatever that raises
        raise ValueError(
            f"model.quantization: {quantization} needs bitsandbytes, which cannot be imported ({type(error).__name__}: {error}); "
            "pip install -r requirements.txt, or set model.quantization: none"
        ) from error


def _times_memory_was_short(device: torch.device) -> int:
    """How often an allocation on this GPU has failed so far."""
    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


def _take_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What `dtype` means to a base that is quantised while it is loaded, for one that was quantised before.

    transformers then leaves every `weight` in the type that it was saved in, embeddings and norms too, and bitsandbytes
    dequantises to the type that the weights had when they were quantised, and casts from there.
    """
    in_fp32 = re.compile("|".join(model._get_dtype_plan(dtype)) or r"(?!)")  # what a model says must not be rounded
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if in_fp32.search(name) else dtype)


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


def commit_of(model: recipes.Model) -> str | None:
    """The commit of the hub that a base's revision stands for, now and here; for a folder, the revision. Raises ValueError if there is
    no such model.
    """
    if Path(model.base).is_dir():
        return model.revision
    try:
        config = cached_file(model.base, CONFIG_NAME, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(model, error)) from error
    return extract_commit_hash(config, None) or model.revision  # the cache keeps each commit in a folder that is named for it


def base_fingerprint(model: recipes.Model) -> str:
    """Names the base's weights: the commit of a hub id, or a hash over the files of a folder.

    What scripts/quantize_base.py wrote has the name of the weights that it was made from, so that a run goes on with it, and from it
    to one that is packed otherwise: how they are quantised is in the recipe. Raises ValueError if its files have changed.
    """
    folder = Path(model.base)
    if not folder.is_dir():
        return f"{model.base}@{commit_of(model)}"
    if record := prequantized.record_of(model.base):
        prequantized.check_files(model.base, record)
        return record["source"]["fingerprint"]
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def hub_commit(model: recipes.Model) -> str | None:
    """The hub's commit that the base is read from; None for a folder of this machine."""
    return None if Path(model.base).is_dir() else commit_of(model)


def check_reachable(model: recipes.Model) -> None:
    """Raises ValueError if the base's config or weights are neither here nor to be had from the hub. Fetches them."""
    load_config(model)
    try:
        base_files.check_is_no_adapter(model)
        base_files.weight_files(model)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(model, error)) from error


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import accelerate
    import bitsandbytes
    import peft

    modules = (torch, transformers, accelerate, peft, bitsandbytes)
    return {module.__name__: module.__version__ for module in modules}


def prepare_config(config: PreTrainedConfig, fused_gelu: bool = True) -> None:
    """Settings that make no difference to what the model computes when it is used, and a large one to training it."""
    # gelu_new and gelu_pytorch_tanh are the same function (to 2.4e-7); the second is one fused kernel instead of eight and
    # keeps 60 KiB a token and layer less for the backward pass (Phi-2).
    for key in ("hidden_act", "activation_function"):
        if fused_gelu and getattr(config, key, None) == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")
    # The base's own dropouts (Phi-2: 0.1 on the residuals) were for its pretraining. adapter.dropout is the one that counts.
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "attention_dropout_prob"):
        if getattr(config, key, None):
            setattr(config, key, 0.0)


def _quantization(model: recipes.Model, dtype: torch.dtype, storage: torch.dtype) -> Any:
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
        bnb_4bit_quant_storage=storage,
    )
