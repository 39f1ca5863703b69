"""A base that was quantised once, by scripts/quantize_base.py, instead of at every load.

    bases/phi2-nf4/
      model.safetensors, config.json, tokenizer files     as transformers writes a quantised model
      quantized_base.json                                 what it was made from, how, and the hash of each file

Such a base takes a fraction of the memory and time to load. Quantised models that others made (`quantization_config` in their
config) are read by the same code; they lack the record, and with it the way back to the weights they were made from.
"""

import shlex
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from qlora_suite.files import check_version, complaint_about, read_json
from qlora_suite.recipe import Model

RECORD = "quantized_base.json"
FORMAT_VERSION = 1


def quantization_of(config: PreTrainedConfig) -> str | None:
    """How the published weights are quantised: `nf4`, `int8`, the name of another method, or None."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return None
    if how.get("load_in_8bit"):
        return "int8"
    if how.get("load_in_4bit"):
        return str(how.get("bnb_4bit_quant_type", "fp4"))
    return str(how.get("quant_method", "unknown"))


def check_quantization(model: Model, config: PreTrainedConfig, storage: torch.dtype | None) -> None:
    """Raises ValueError if the base is quantised already, but not as the recipe and the engine want it.

    `storage` is the type that 4-bit weights must be packed in; None takes any, for they hold the same bytes.
    """
    found = quantization_of(config)
    if found is None:
        return
    saved = config.quantization_config
    packed = getattr(torch, str(saved.get("bnb_4bit_quant_storage", "uint8")), None)
    if not isinstance(packed, torch.dtype):
        raise ValueError(
            f"the config.json of {model.base} has bnb_4bit_quant_storage: {saved['bnb_4bit_quant_storage']!r}, which is no type"
        )
    doubled = bool(saved.get("bnb_4bit_use_double_quant"))
    seen = _in_words(found, doubled, packed)
    if model.quantization == "none":
        source = source_of(model.base)
        remedy = f"give the base that it was made from, {source.base}" if source else "give the base that it was made from"
        raise ValueError(f"{model.base} is quantised ({seen}), but quantization: none wants weights as they were published; {remedy}")
    wanted_double, wanted_storage = model.double_quantization is not False, storage or packed
    if found == model.quantization and (found == "int8" or (doubled, packed) == (wanted_double, wanted_storage)):
        return
    raise ValueError(
        f"{model.base} is quantised already ({seen}), but {_in_words(model.quantization, wanted_double, wanted_storage)} is wanted here; "
        f"make another one: {command_for(model, storage)}"
    )


def command_for(model: Model, storage: torch.dtype | None) -> str:
    """The command that makes the quantised base that `model` (a recipe's section) asks for, beside the one that is not right."""
    source = source_of(model.base) or Model(base="THE_PUBLISHED_BASE")
    type_ = str(storage).removeprefix("torch.") if storage and model.quantization == "nf4" else ""
    plain = "nf4-plain" if model.double_quantization is False else model.quantization
    words = ["python", "scripts/quantize_base.py", "RECIPE", "-".join(filter(None, [model.base.rstrip("/"), plain, type_]))]
    words += [f"model.base={source.base}", *([f"model.revision={source.revision}"] if source.revision else [])]
    words += [f"model.quantization={model.quantization}"] + ["model.double_quantization=false"] * (plain == "nf4-plain")
    return shlex.join(words + (["--storage", type_] if type_ else []))


def record_of(base: str) -> dict[str, Any] | None:
    """What scripts/quantize_base.py noted in a folder, or None if it did not make it. Raises ValueError for a newer format."""
    path = Path(base) / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    check_version(path, record, FORMAT_VERSION)
    return record


def source_of(base: str) -> Model | None:
    """The base that a folder was made from, as it was published. None without a record."""
    record = record_of(base)
    return Model(base=record["source"]["base"], revision=record["source"]["revision"], quantization="none") if record else None


def check_files(base: str, record: dict[str, Any]) -> None:
    """Raises ValueError if the weights or the config are not those that were written."""
    decisive = {name: entry for name, entry in record["files"].items() if name.endswith(".safetensors") or name == "config.json"}
    if complaint := complaint_about(Path(base), decisive):
        raise ValueError(
            f"the quantised base in {base} is damaged ({complaint}); remove it and make it again with scripts/quantize_base.py"
        )


def _in_words(kind: str, doubled: bool, storage: torch.dtype) -> str:
    if kind != "nf4":
        return kind
    return f"nf4 {'with' if doubled else 'without'} double quantisation, packed in {str(storage).removeprefix('torch.')}"
