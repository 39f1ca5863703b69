"""What the files of a base say, looked at before anything is built from them: they may come from anybody.

A config can claim any size, an index can name any file, and a folder with an adapter_config.json makes transformers load another base
than the one that was named. Nothing here allocates what a file claims.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from qlora_suite.recipe import Model

UNSTORED, FEW = 2, 10_000_000
"""A model may have so many times the weights that its files hold, and some: weights that are missing are named when it is loaded."""
SMALLEST_WEIGHT = 0.5
"""Bytes of a 4-bit weight."""


def weight_files(model: Model) -> list[Path]:
    """The base's safetensors files, fetched if need be. Raises ValueError for an index that names anything else, OSError without any."""
    one = cached_file(model.base, SAFE_WEIGHTS_NAME, revision=model.revision, _raise_exceptions_for_missing_entries=False)
    if one is not None:
        return [Path(one)]
    index = cached_file(model.base, SAFE_WEIGHTS_INDEX_NAME, revision=model.revision)
    try:
        named = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} is damaged: it has no weight_map") from None
    for name in sorted(map(str, named)):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names {name!r}; weights are read from safetensors files beside it alone")
    return [Path(file) for file in get_checkpoint_shard_files(model.base, index, revision=model.revision)[0]]


def check_is_no_adapter(model: Model) -> None:
    """Raises ValueError if the base is an adapter, for transformers would load the base that the adapter names instead."""
    found = cached_file(model.base, ADAPTER_CONFIG_NAME, revision=model.revision, _raise_exceptions_for_missing_entries=False)
    if found is not None:
        raise ValueError(f"{model.base} holds an {ADAPTER_CONFIG_NAME}: an adapter, which names a base of its own; give that as model.base")


def check_weights(model: Model, config: PreTrainedConfig) -> None:
    """Raises ValueError if the weights are damaged, or far fewer than the config claims: all that it claims would be allocated."""
    held, stored = 0, 0
    files = weight_files(model)
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118 - it is no dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.name} is damaged ({str(error).strip()}); fetch it again") from None
        held += sum(torch.Size(shape).numel() for shape in shapes)
        stored += file.stat().st_size
    quantized = getattr(config, "quantization_config", None)
    skeleton_of = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        claimed = sum(p.numel() for p in AutoModelForCausalLM.from_config(skeleton_of, trust_remote_code=False).parameters())
    most = stored / SMALLEST_WEIGHT if quantized is not None else held
    if claimed > UNSTORED * most + FEW:
        raise ValueError(
            f"its config.json describes {claimed:,} weights, but {len(files)} file{'s'[: len(files) > 1]} hold {held:,} numbers; "
            "they are not of one model: fetch both again"
        )
