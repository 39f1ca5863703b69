"""The runs behind a run whose training began with another one's adapter: SFT, then DPO, then GRPO.

    before = stages_before(recipe)          # the latest first; empty for a run that began with a new adapter
    longest(recipe, before)                 # tokens of the longest conversation that any of them has learnt from

A run notes them in its run.json as it begins, for the folders of earlier runs may be gone when it is asked or published.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from qlora_suite.files import read_json
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load, to_yaml

MOST = 20
"""Stages that are followed: a folder may have been replaced by a run that began with its own successor."""
METHODS = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}


@dataclass(frozen=True)
class Stage:
    """One earlier training."""

    adapter: str
    """As adapter.start_from of the next one names it."""
    method: str | None = None
    """`sft`, `dpo` or `grpo`; None for an adapter without its run, of which nothing more is known."""
    max_length: int | None = None
    recipe: str | None = None
    """Its recipe.yaml, with every default written out."""


def method_of(recipe: Recipe) -> str:
    return "dpo" if recipe.dpo else "grpo" if recipe.grpo else "sft"


def stages_before(recipe: Recipe) -> list[Stage]:
    """What adapter.start_from names, what that began with, and so on, as far as the folders are there."""
    found: list[Stage] = []
    start = recipe.adapter.start_from if recipe.adapter != "none" else None
    while start is not None and len(found) < MOST:
        run = run_of(start)
        if run is None:
            return [*found, Stage(start)]
        try:
            its = load(run / "recipe.yaml")
        except (OSError, ValueError):  # of an earlier version: what it was is not known any more
            return [*found, Stage(start)]
        found.append(Stage(start, method_of(its), its.data.max_length, to_yaml(its)))
        if (noted := noted_in(run)) is not None:
            return [*found, *noted][:MOST]
        start = its.adapter.start_from if its.adapter != "none" else None
    return found


def noted_in(run: Path) -> list[Stage] | None:
    """What the run noted as it began; None for a run of an earlier version, which noted nothing."""
    about = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    if "stages_before" not in about:
        return None
    return [Stage(**{field.name: stage.get(field.name) for field in fields(Stage)}) for stage in about["stages_before"]]


def run_of(adapter: str) -> Path | None:
    """The folder of the run that an adapter's folder is, or is a part of: runs/NAME, its final/ or one of its checkpoints."""
    folder = Path(adapter)
    if (folder / "recipe.yaml").is_file() and not (folder / CONFIG_NAME).is_file():
        return folder
    run = folder.parent if folder.name == "final" else folder.parent.parent if folder.parent.name == "checkpoints" else None
    return run if run is not None and (run / "recipe.yaml").is_file() else None


def longest(recipe: Recipe, before: Sequence[Stage]) -> int:
    """Tokens of the longest conversation that the adapter has learnt from, in whichever run. Preference tuning needs shorter ones."""
    return max(recipe.data.max_length, *(stage.max_length for stage in before if stage.max_length), 0)


def in_words(recipe: Recipe, before: Sequence[Stage]) -> str:
    """`SFT, then DPO, then GRPO`, the recipe's own method last."""
    names = [METHODS.get(stage.method or "", "an adapter that was there already") for stage in reversed(before)]
    return ", then ".join([*names, METHODS[method_of(recipe)]])


def record(before: Sequence[Stage]) -> list[Mapping[str, Any]]:
    """As it stands in run.json under `stages_before`."""
    return [vars(stage) for stage in before]
