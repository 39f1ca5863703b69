"""What an accelerate config asks for, read before anything is launched, and whether nodes without a network would find the base.

It imports neither torch nor transformers: slurm/job.py wants a quick answer.
"""

from pathlib import Path
from typing import Any

from qlora_suite import compatibility
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import read_yaml

CONFIGS = {"one": "cpu", "ddp": "ddp", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3", "fsdp": "fsdp"}
"""Engine -> file in accelerate_configs/ (`one` process on a GPU: single_gpu)."""
SECTIONS = ("fsdp_config", "deepspeed_config")
OFFLOADS = ("offload_optimizer_device", "offload_param_device")


def check_config(config: Path, nodes: int, processes: int | None) -> dict[str, Any]:
    """The accelerate config. Raises ValueError if it is not there, or would start other processes than the job has places for."""
    if not config.is_file():
        known = ", ".join(sorted(path.name for path in Path("accelerate_configs").glob("*.yaml")))
        raise ValueError(f"there is no accelerate config at {config} (in accelerate_configs/: {known})")
    values = read_yaml(config)
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise ValueError(f"{config} is no accelerate config: it has no distributed_type")
    if not isinstance(values["distributed_type"], str):
        raise ValueError(f"{config} has distributed_type: {values['distributed_type']!r:.40}; it is a word, such as NO or MULTI_GPU")
    for section in SECTIONS:
        if not isinstance(values.get(section) or {}, dict):
            raise ValueError(f"{config} has {section}: {values[section]!r:.40}; it is a section of keys")
    # "NO" starts one process a node, whatever --num_processes says, and each of them would train alone
    if values["distributed_type"] == "NO" and max(nodes, processes or 1) > 1:
        wanted = f"{processes} processes" if processes else f"{nodes} nodes"
        raise ValueError(
            f"{config} runs one process (distributed_type: NO) but the job has {wanted}; take a config for several, e.g. ddp.yaml"
        )
    return values


def engine_of(config: dict[str, Any]) -> str:
    """The engine that an accelerate config asks for, in compatibility.py's words. Raises ValueError for FSDP1."""
    if config["distributed_type"] == "FSDP":
        if (config.get("fsdp_config") or {}).get("fsdp_version", 1) != 2:
            raise ValueError("the accelerate config asks for FSDP1; set fsdp_version: 2, as accelerate_configs/fsdp.yaml does")
        return compatibility.FSDP2
    if config["distributed_type"] == "DEEPSPEED":
        stage = (config.get("deepspeed_config") or {}).get("zero_stage", 2)
        return compatibility.ZERO3 if stage == 3 else compatibility.ZERO2
    return compatibility.ONE if config["distributed_type"] == "NO" else compatibility.DDP


def objections(values: dict[str, Any]) -> list[str]:
    """What the engines would refuse of a config once it is launched, a sentence each (engine.py says why)."""
    fsdp, deepspeed = values.get("fsdp_config") or {}, values.get("deepspeed_config") or {}
    found = []
    for where, section in (("", values), ("deepspeed_config.", deepspeed)):
        if str(section.get("gradient_accumulation_steps", 1)) not in ("1", "auto"):
            found.append(f"{where}gradient_accumulation_steps is set; it follows from train.rows_per_step: remove it")
    for key in ("fsdp_offload_params", "fsdp_activation_checkpointing"):
        if fsdp.get(key):
            found.append(f"{key} does not work on what is trained here: remove it")
    for key in OFFLOADS:
        if deepspeed.get(key) not in (None, "none"):
            found.append(f"{key} is {deepspeed[key]}, which changes the optimiser's arithmetic: set it to none")
    if values["distributed_type"] == "DEEPSPEED" and deepspeed.get("zero_stage", 2) not in (2, 3):
        found.append(f"zero_stage is {deepspeed['zero_stage']}: use 2, 3, or accelerate_configs/ddp.yaml, which is stage 0")
    if str(deepspeed.get("gradient_clipping", "auto")) not in ("auto", "none"):
        found.append("gradient_clipping is set; the recipe's optim.max_grad_norm does it: remove it")
    known = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")
    if values["distributed_type"] not in known:
        found.append(f"distributed_type is {values['distributed_type']}, which no engine here does: use one of accelerate_configs/")
    return found


def check_base(recipe: Recipe) -> None:
    """Raises ValueError if the base is a hub id that compute nodes, being offline, would not find in the cache."""
    if Path(recipe.model.base).is_dir():
        return
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(recipe.model.base, "config.json", revision=recipe.model.revision)
    # fetch() leaves the config for the end, so where it is, the weights are
    if not isinstance(found, str):
        raise ValueError(
            f"{recipe.model.base} is not in {constants.HF_HUB_CACHE}; on the login node run: bash slurm/prefetch.sh {recipe.command_line}"
        )
