"""Training that begins with an adapter which is there already: SFT before DPO or GRPO, or one more round on other data.

    adapter: {rank: 16, alpha: 32, start_from: runs/phi2_oasst1}      # a run's folder, or one in PEFT's layout, or a hub id

It goes on as the run's own adapter: what is saved is one adapter on the same base. Its optimiser starts afresh.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from qlora_suite import adapter_config, checkpoint
from qlora_suite.adapter import adapter_folder, split_revision
from qlora_suite.files import hash_of, read_json, sha256
from qlora_suite.prequantized import source_of
from qlora_suite.recipe import Model, Recipe
from qlora_suite.recipe_file import load as load_recipe

RUN = "run.json"
START = "adapter.start_from (hash of its weights)"
"""Its name in a run's identity."""
KEYS = {
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "target_modules": "adapter.targets",
    "trainable_token_indices": "chat.role_markers",
}
"""What decides the function that its weights are part of: in PEFT's words, and in the recipe's."""


def folder_of(adapter: str) -> Path:
    """Where its files are. Raises ValueError for a run that is not finished, and if there is no adapter."""
    run = Path(adapter)
    if (run / "recipe.yaml").is_file() and not (run / CONFIG_NAME).is_file():
        if not (run / "final").is_dir():
            raise ValueError(f"adapter.start_from: the run in {run} is not finished and has no final/; train on, or name a checkpoint")
        return adapter_folder(str(run / "final"))
    if is_missing(adapter):
        near = difflib.get_close_matches(run.name, [other.name for other in run.parent.glob("*") if other.is_dir()], n=1)
        hint = f"; did you mean {run.parent / near[0]}?" if near else ""
        raise ValueError(f"adapter.start_from: there is no folder {adapter} (working folder: {Path.cwd()}){hint}")
    return adapter_folder(adapter)


def is_missing(adapter: str) -> bool:
    """Does it name a folder, and there is none? What has one slash, and nothing of its name here, may be a hub id."""
    name, _ = split_revision(adapter)
    if Path(adapter).is_dir():
        return False
    return name.count("/") != 1 or name.startswith(("/", "~", ".", "runs/")) or Path(name).parent.is_dir()


def noted_by_finished_run(recipe: Recipe) -> str | None:
    """The fingerprint of a start that is gone, from the finished run that began with it: nothing more is asked of that."""
    status = Path(recipe.output.dir) / "status.json"
    if not is_missing(recipe.adapter.start_from) or not status.is_file():
        return None
    try:
        found = read_json(status)
        noted = found["identity"][START] if found["state"] == "finished" else None
    except (ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, str) else None


def fingerprint(adapter: str) -> str:
    """Names its weights and what they are part of, wherever they lie. Raises ValueError for what is no LoRA adapter."""
    folder = folder_of(adapter)
    config = _config(adapter, folder)
    return hash_of([sha256(folder / checkpoint.ADAPTER), {key: _plain(getattr(config, key)) for key in KEYS}])


def check_base(adapter: str, base: str) -> None:
    """Raises ValueError if the adapter's run stood on another base than the one of this name (model.base_fingerprint).

    Only names of one kind tell: of two commits of the hub, or of the files of two folders. An adapter without its run tells nothing.
    """
    theirs = _base_of_run(adapter)
    if theirs is None or theirs == base or ("@" in theirs) != ("@" in base):
        return
    raise ValueError(
        f"adapter.start_from: the run of {adapter} stood on another base ({theirs[:80]}) than this one ({base[:80]}), and what it learnt "
        "is a difference to that; set model.base (and model.revision) to what it had"
    )


def load(net: PeftModel, base: PreTrainedModel, adapter: str) -> None:
    """Give a new adapter the weights of a saved one. Raises ValueError unless it is the same function, on this base."""
    folder = folder_of(adapter)
    try:
        adapter_config.check(folder, base)
        theirs, ours = _config(adapter, folder), net.peft_config["default"]
        differing = [
            f"{name}: there {_words(getattr(theirs, key))}, here {_words(getattr(ours, key))}"
            for key, name in KEYS.items()
            if _plain(getattr(theirs, key)) != _plain(getattr(ours, key))
        ]
        if differing:
            raise ValueError(f"{'; '.join(differing)}; give the recipe what the adapter has")
        checkpoint.load_weights(folder, net, cast=True)
    except ValueError as error:
        raise ValueError(_cannot(adapter, error)) from None


def check_recipe(recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    """What can be said of the start before anything is loaded: a remark, or nothing.

    Raises ValueError if the run that is named has learnt another format, or if there is none and something is asked of a model that has
    never seen its role markers.
    """
    start, way = recipe.adapter.start_from if recipe.adapter != "none" else None, "dpo" if recipe.dpo else "grpo" if recipe.grpo else ""
    if start is None:
        if way and manifest["role_markers"]["token_ids"]:
            raise ValueError(
                f"{way} starts from what the model says already, and here its role markers are new tokens that it has never seen; train on "
                "answers first and name that run in adapter.start_from, or set chat.role_markers: text"
            )
        return ""
    if noted_by_finished_run(recipe) is not None:
        return ""
    fingerprint(start)
    if not (Path(start) / "recipe.yaml").is_file():
        return _remark_on_base(start, recipe.model)
    before = load_recipe(Path(start) / "recipe.yaml")
    asked = [(f"chat.{key}", getattr(before.chat, key), getattr(recipe.chat, key)) for key in ("format", "role_markers", "system_prompt")]
    if changed := [f"{key} (there {_words(theirs)}, here {_words(ours)})" for key, theirs, ours in asked if theirs != ours]:
        raise ValueError(
            f"adapter.start_from: the run in {start} was trained with another {' and '.join(changed)}; give the recipe what it has"
        )
    held_out = [([(one.source, one.split, one.validation_share) for one in r.data.each], r.data.dev_share) for r in (before, recipe)]
    if held_out[0] == held_out[1]:
        return ""
    return f"{start} was trained on other data or another split: what is held out here may have been learnt there"


def _base_of_run(adapter: str) -> str | None:
    """The name of the base that an adapter was trained on, from run.json of the run that its folder is a part of."""
    folder = folder_of(adapter)
    run = folder.parent if folder.name == "final" else folder.parent.parent if folder.parent.name == "checkpoints" else folder
    about = read_json(run / RUN) if (run / RUN).is_file() else {}
    found = about.get("base") if isinstance(about, dict) else None
    return found if isinstance(found, str) else None


def _remark_on_base(adapter: str, model: Model) -> str:
    """Of an adapter without its run only the base's name is known: other weights may have the same one, and these another."""
    theirs = read_json(folder_of(adapter) / CONFIG_NAME).get("base_model_name_or_path")
    ours = (source_of(model.base) or model).base
    if not isinstance(theirs, str) or not theirs or Path(theirs).name == Path(ours).name or _base_of_run(adapter) is not None:
        return ""
    return f"{adapter} says that it was trained on {theirs[:80]}, and model.base is {ours}: on other weights than its own it is of no use"


def _config(adapter: str, folder: Path) -> LoraConfig:
    """Raises ValueError for another kind than LoRA, and for one whose weights alone do not say what it computes."""
    try:
        adapter_config.read(folder / CONFIG_NAME)
        config = LoraConfig.from_pretrained(folder)
        if str(config.init_lora_weights).startswith(("pissa", "olora")):
            how = config.init_lora_weights
            raise ValueError(f"it was begun with adapter.init: {how}, which changed its base; merge it, and take the merged model as base")
        if config.alpha_pattern:
            raise ValueError(
                "it has an alpha of its own for some modules, which no recipe says; merge it, and take the merged model as base"
            )
    except ValueError as error:
        raise ValueError(_cannot(adapter, error)) from None
    return config


def _cannot(adapter: str, error: ValueError) -> str:
    return str(error) if "cannot be gone on from" in str(error) else f"adapter.start_from: {adapter} cannot be gone on from: {error}"


def _plain(value: object) -> object:
    """Comparable, and fit for JSON: PEFT makes sets of lists."""
    if isinstance(value, dict):
        return {key: sorted(inner) for key, inner in sorted(value.items())}
    return sorted(value) if isinstance(value, set | list | tuple) else value or None


def _words(value: object) -> str:
    return str(_plain(value) if value is not None else "none")[:200]
