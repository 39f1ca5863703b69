"""Recipe files: read, overridden from the command line, checked, and written out again.

    recipe = load("recipes/quickstart.yaml", ["optim.learning_rate=1e-4"])
    recipe.optim.learning_rate            # 0.0001

Every complaint about a recipe is raised at once, with the key's path; an unknown key names its nearest known one.
"""

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qlora_suite.leaks import holds_token, refuse_tokens, secrets_of_environment
from qlora_suite.recipe import Recipe, section_of

FOREIGN = {
    "device_map": "the base goes whole to each process's device; accelerate_configs/fsdp.yaml and deepspeed_zero3.yaml spread it over GPUs",
    "per_device_train_batch_size": "here it is train.micro_batch (found by itself) and train.rows_per_step",
    "gradient_accumulation_steps": "it follows from train.rows_per_step, which counts the rows of a step on all processes",
    "num_train_epochs": "here it is train.epochs",
    "mixed_precision": "it stands in the accelerate config, or follows the hardware",
    "num_processes": "it stands in the accelerate config, or behind accelerate launch: --num_processes N",
    "fsdp": "engines are chosen by the accelerate config: accelerate_configs/fsdp.yaml",
    "deepspeed": "engines are chosen by the accelerate config: accelerate_configs/deepspeed_zero2.yaml or deepspeed_zero3.yaml",
    "load_in_4bit": "here it is model.quantization: nf4",
    "load_in_8bit": "here it is model.quantization: int8",
    "bnb_4bit_quant_storage": "it is set by itself to what the engine can shard",
    "lora_r": "here it is adapter.rank",
    "lora_alpha": "here it is adapter.alpha",
    "lora_dropout": "here it is adapter.dropout",
    "target_modules": "here it is adapter.targets",
    "logging_steps": "every step is logged, in metrics.jsonl",
    "save_steps": "here it is checkpoints.every_steps",
    "eval_steps": "here it is evaluation.every_steps",
    "max_seq_length": "here it is data.max_length",
    "datasets": "here it is data.source, or data.sets for several with keys of their own",
    "base_model": "here it is model.base",
    "num_epochs": "here it is train.epochs",
    "dataset": "here it is data.source",
    "output_dir": "here it is output.dir",
    "optimizer": "here it is optim.name",
    "lr_scheduler_type": "here it is optim.schedule",
    "lr": "here it is optim.learning_rate",
    "r": "here it is adapter.rank",
    "template": "here it is chat.format",
    "conversation": "here it is data.form",
    "do_train": "scripts/train.py trains, scripts/evaluate.py evaluates",
    "finetuning_type": "adapter is a section (LoRA) or none (every weight)",
    "chat_template": "here it is chat.format: model (the base's own template), chatml, or one of the others",
    "train_on_inputs": "here it is chat.loss_on: all",
    "val_set_size": "here it is data.split: by_hash with data.validation_share",
    "num_generations": "here it is grpo.group_size",
    "max_completion_length": "here it is grpo.max_new_tokens",
    "reward_funcs": "here it is grpo.rewards",
    "num_iterations": "here it is grpo.updates",
    "pref_beta": "here it is dpo.beta",
    "dpo_beta": "here it is dpo.beta",
    "ref_model": "the reference is the adapter that the run starts from: adapter.start_from",
    "dataset_text_field": "here it is data.fields: {text: NAME}",
}
"""Keys of other suites, and where their meaning lives here."""
FOREIGN.update(dict.fromkeys(("bf16", "fp16"), FOREIGN["mixed_precision"]))
FOREIGN.update(dict.fromkeys(("model_name_or_path", "model_name"), FOREIGN["base_model"]))
FOREIGN.update(dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), FOREIGN["target_modules"]))
FOREIGN.update(dict.fromkeys(("micro_batch_size", "batch_size"), FOREIGN["per_device_train_batch_size"]))
FOREIGN.update(dict.fromkeys(("lr_scheduler", "scheduler"), FOREIGN["lr_scheduler_type"]))
FOREIGN["quantization_bit"] = FOREIGN["load_in_4bit"]
FOREIGN.update(dict.fromkeys(("sequence_len", "cutoff_len"), FOREIGN["max_seq_length"]))
FOREIGN.update(dict.fromkeys(("sample_packing", "neat_packing"), "here it is data.packing"))
_ATTENTION = "attention is torch's own, whose kernel follows the card (FlashAttention where it has one)"
FOREIGN.update(dict.fromkeys(("attn_implementation", "flash_attn", "flash_attention", "use_flash_attention_2"), _ATTENTION))


LARGEST, DEEPEST = 1_000_000, 50
_OPENING = (yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string because it lacks a dot, where people mean the number, and takes the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            again = next(i for i, key in enumerate(keys) if key in keys[:i])
            first, mark = node.value[keys.index(keys[again])][0].start_mark, node.value[again][0].start_mark
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {keys[again]} stands twice (first in line {first.line + 1})", mark
            )
        return mapping


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would take for a number, and escapes the line breaks of Unicode, which YAML folds."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides (values are YAML).

    Raises ValueError with every complaint at once.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"there is no recipe at {path} (working folder: {Path.cwd()}){hint}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} does not hold keys and values")
    if "distributed_type" in tree:
        raise ValueError(
            f"{path} is an accelerate config, not a recipe; accelerate launch takes it as --config_file, slurm/submit.sh as CONFIG"
        )
    refuse_tokens(overrides)
    for override in overrides:
        _apply(tree, override)
    recipe = from_dict(tree, f"{path} with {' '.join(overrides)}" if overrides else str(path))
    recipe._command_line = shlex.join([str(path), *overrides])
    return recipe


def from_dict(tree: dict[str, Any], name: str = "recipe") -> Recipe:
    """Validate a nested dict; `name` stands in the message. Raises ValueError with every complaint at once."""
    known = secrets_of_environment()
    for path, text in _texts(tree):
        if holds_token(text, known):
            raise ValueError(
                f"{name}: {path} holds what looks like a token, and a recipe is copied into every run; take it out and set HF_TOKEN (or "
                "the tracker's own variable) in the environment"
            )
    try:
        return Recipe.model_validate(_tuples(tree))
    except ValidationError as error:
        complaints = _merged(line for e in error.errors() for line in _complaints(e))
        noun = "problem" if len(complaints) == 1 else "problems"
        raise ValueError(f"{name} has {len(complaints)} {noun}:\n" + "\n".join(f"  {c}" for c in complaints)) from None


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as it stands beside each checkpoint."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> Any:
    """What a small YAML file holds, whoever wrote it. Raises ValueError for what is none, and for what would take long to read."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a recipe has a few thousand")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, name: str) -> Any:
    try:
        _check_tokens(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one number format more
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-99-99
        said = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{name} is not valid YAML: {said}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deep; a recipe has sections and keys") from None


def _check_tokens(text: str) -> None:
    """Raises YAMLError for aliases, which let a few lines expand into gigabytes, and RecursionError long before Python does: the
    scanner takes minutes for a deep file.
    """
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError("aliases (*name) are not allowed here")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > DEEPEST:
            raise RecursionError


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not re.fullmatch(r"\w+(\.\w+)*", key) or key.count(".") > DEEPEST:
        raise ValueError(f"{override!r:.200} is not an override; write key=value, e.g. optim.learning_rate=1e-4")
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = _parse_yaml(text, override)


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a tree, with the path of its key; a key is a text too, at the path of what holds it."""
    if isinstance(value, str):
        yield path or "a key", value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield path or "a key", str(key)
            yield from _texts(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{i}")


def _tuples(value: Any) -> Any:
    """YAML's lists as tuples, so that a frozen recipe is frozen all the way down."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _complaints(error: Any) -> list[str]:
    """One pydantic error as sentences that name the key's path."""
    fields, path, section = Recipe.model_fields, [], Recipe
    for part in error["loc"]:
        # pydantic adds the name of the union's branch ("Adapter", "literal['none']") to the path; a person did not write it
        if part in fields or isinstance(part, int) or (error["type"] == "extra_forbidden" and part == error["loc"][-1]):
            path.append(str(part))
            inner = section_of(fields[part].annotation) if part in fields else None
            if inner is not None:
                section, fields = inner, inner.model_fields
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        if path[-1] in FOREIGN:
            return [f"{key}: unknown key; {FOREIGN[path[-1]]}"]
        elsewhere = [f"{name}.{path[-1]}" for name, inner in _sections() if path[-1] in inner.model_fields]
        if elsewhere:
            return [f"{key}: unknown key; did you mean {' or '.join(elsewhere)}?"]
        near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known here: {', '.join(section.model_fields)}"
        return [f"{key}: unknown key; {hint}"]
    if error["type"] == "missing":
        return [f"{key}: missing"]
    if error["type"] == "value_error":
        prefix = f"{key}: " if key else ""
        return [prefix + line for line in str(error["ctx"]["error"]).splitlines()]
    if error["type"] == "literal_error" and error["loc"][-1] == "literal['none']" and isinstance(error["input"], dict):
        return []  # the other branch of `adapter` says what is wrong
    message = re.sub(r"dictionary or instance of \w+", "section of keys", error["msg"]).replace("valid tuple", "valid list")
    return [f"{key}: {message[0].lower()}{message[1:]} (found {_as_written(error['input'])})"]


def _merged(complaints: Iterable[str]) -> list[str]:
    """Each once, in the order of the keys; what one key with several allowed types complains of, in one line."""
    wishes: dict[tuple[str, str], list[str]] = {}
    for line in sorted(set(complaints)):
        match = re.fullmatch(r"(.*?: input should be )(.*)( \(found .*\))", line, re.DOTALL)
        wishes.setdefault((match[1], match[3]) if match else (line, ""), []).append(match[2] if match else "")
    return [f"{before}{' or '.join(wish)}{found}" for (before, found), wish in wishes.items()]


def _as_written(value: Any) -> str:
    """A value as it stands in YAML, where null is not None and a list is no tuple."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """The recipe's sections by their names."""
    for name, field in Recipe.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            yield name, section
