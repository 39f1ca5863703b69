"""What an adapter's files say, looked at before PEFT builds anything from them: they may come from anybody.

    check(folder, base)      ValueError, in one sentence, unless it is a LoRA adapter whose config describes the weights beside it

PEFT puts LoRA of the config's rank on whatever the config's names and patterns match, and reads the weights afterwards: a rank of a
billion, or a pattern that never ends, is met before anything is compared. Some settings make it read further files or import modules.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from qlora_suite.files import read_json

LONGEST_PATTERN, MOST_REPEATS = 2000, 8
PREFIX = "base_model.model."
"""Of the names in an adapter's file, before the base's own."""
NOT_READ = ("megatron_config", "layer_replication", "eva_config", "corda_config", "lora_ga_config", "loftq_config")
"""Settings with which PEFT imports other packages, reads further files, or builds another model than the base."""
NOT_KNOWN = ("target_parameters",)
"""Settings that are harmless, but adapt what is not looked at here."""
Positive = Annotated[int, Field(gt=0)]
Names = str | list[str] | None


class AdapterConfig(BaseModel):
    """The keys of adapter_config.json that decide what is built; those that only tell something are let pass."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Positive
    lora_alpha: Annotated[float, Field(gt=0)] = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|olora|orthogonal|pissa(_niter_\d{1,3})?)$")] = True


def check(folder: Path, base: PreTrainedModel) -> None:
    """Raises ValueError if the adapter in `folder` is damaged, of another kind, or not what its config says, on this base."""
    config, shapes = read(folder / CONFIG_NAME), _shapes_in(folder / SAFETENSORS_WEIGHTS_NAME)
    of_lora = {name.removeprefix(PREFIX).partition(".lora_A.")[0]: shape for name, shape in shapes.items() if ".lora_A." in name}
    patterns = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    for names in (config.target_modules, config.exclude_modules, config.layers_pattern):
        patterns += [names] if isinstance(names, str) else names or []
    for pattern in patterns:
        _check_pattern(pattern)
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    rows = {shape[0] for shape in of_lora.values()}
    largest = max(base.get_input_embeddings().weight.shape)  # no module is wider, and no rank beyond that would be saved
    if of_lora and (not rows <= ranks or max(ranks) > max(largest, *rows)):
        raise ValueError(f"{CONFIG_NAME} has rank {max(ranks):,}, but its weights are of rank {', '.join(map(str, sorted(rows)))}")
    _check_tokens(config, base)
    if not getattr(base, "_checkpoint_conversion_mapping", None):  # else the file has other names than the model
        _check_places(config, shapes.keys(), of_lora, base)


def read(path: Path) -> AdapterConfig:
    """What it says. Raises ValueError for another kind of adapter, and for what is damaged or not known here."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} does not hold keys and values")
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path.name} has peft_type: {values.get('peft_type')}; what is read here is LORA")
    for key in (*NOT_READ, *NOT_KNOWN):
        if values.get(key):
            raise ValueError(f"{path.name} sets {key}, which is not read here; merge the adapter where it was made, and use the full model")
    try:
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key, said = str(first["loc"][0]), first["msg"]
        raise ValueError(f"{path.name} has {key}: {str(values.get(key))[:40]!r} ({said[0].lower()}{said[1:]})") from None


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """From the header, which safetensors checks against the file's length."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is damaged ({str(error).strip()})") from None


def _check_pattern(pattern: str) -> None:
    """Refuse a regular expression whose time may grow without bound: one that repeats a group, or repeats often."""
    if len(pattern) > LONGEST_PATTERN or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MOST_REPEATS:
        raise ValueError(f"{CONFIG_NAME} has the pattern {pattern[:60]!r}, which could take for ever; list the modules by name instead")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{CONFIG_NAME} has the pattern {pattern[:60]!r}, which is none ({error})") from None


def _check_tokens(config: AdapterConfig, base: PreTrainedModel) -> None:
    rows = base.get_input_embeddings().weight.shape[0]
    given = config.trainable_token_indices or []
    for ids in given.values() if isinstance(given, dict) else [given]:
        if outside := [i for i in ids if not 0 <= i < rows]:
            raise ValueError(f"{CONFIG_NAME} has trained rows for token {outside[0]:,}; the base has {rows:,} rows")


def _check_places(config: AdapterConfig, names: Any, of_lora: Mapping[str, tuple[int, ...]], base: PreTrainedModel) -> None:
    """Every module that PEFT would adapt or copy must have its weights in the file, of the module's width."""
    modules = dict(base.named_modules())
    for place, shape in of_lora.items():
        width = getattr(modules.get(place), "in_features", None)
        if width is not None and shape[1:] != (width,):
            raise ValueError(f"it has another shape in {place}: {shape[-1]:,} inputs instead of {width:,} (1 in all)")
    wanted = LoraConfig(
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    head = base.get_output_embeddings()
    everywhere = config.target_modules == "all-linear"
    targeted = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | nn.Embedding)
        and (module is not head and isinstance(module, nn.Linear) if everywhere else check_target_module_exists(wanted, name))
    ]
    lacking = [
        f"{PREFIX}{name}.lora_A.weight" for name in targeted if name not in of_lora and f"{PREFIX}{name}.lora_embedding_A" not in names
    ]
    lacking += [
        f"{PREFIX}{name}"
        for name, _ in base.named_parameters()
        if any(f".{saved}." in f".{name}" for saved in config.modules_to_save or ()) and f"{PREFIX}{name}" not in names
    ]
    if lacking:
        strange = [f"{PREFIX}{place}" for place in of_lora if place not in modules]
        beside = f"; it has what the base has no place for {', '.join(strange[:3])} ({len(strange)} in all)" if strange else ""
        raise ValueError(f"it lacks what its {CONFIG_NAME} names: {', '.join(lacking[:3])} ({len(lacking)} in all){beside}")
