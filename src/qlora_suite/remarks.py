"""What a run may do, and what its owner probably did not mean: said once, most of it at the start, and never refused."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qlora_suite.recipe import Recipe
from qlora_suite.wording import counted

FORGETS = "the model forgets how to speak"
FAR_BELOW = -1.0
"""Nats a token of `log_ratio` (dpo.MEASURES): 10 tokens, chosen or rejected, have become e^10 times less likely than at the start."""


def remarks(recipe: Recipe, num_rows: int, num_steps: int, adapted: Collection[str] | None = None) -> list[str]:
    """Sentences for the console, about a run of so many steps on so many rows. `adapted`: the target names that match something."""
    found = []
    if recipe.adapter != "none" and recipe.adapter.targets != "all-linear" and adapted is not None:
        nothing = [target for target in recipe.adapter.targets if target not in adapted]
        if nothing:
            found.append(f"adapter.targets {', '.join(nothing)} match nothing in this base; only {', '.join(sorted(adapted))} are adapted")
    warmup, rows_per_step, steps = recipe.optim.warmup_steps, recipe.train.rows_per_step, counted(num_steps, "step")
    if warmup > num_steps:
        all_steps = "the only step is" if num_steps == 1 else f"all {steps} are"
        found.append(f"{all_steps} warm-up (optim.warmup_steps: {warmup}), so the rate never reaches optim.learning_rate")
    if num_rows < rows_per_step:
        one = "prompt" if recipe.grpo else "pair" if recipe.dpo else "row"
        fewer = f"the data has {counted(num_rows, one)}, fewer than a step"
        found.append(f"{fewer} (train.rows_per_step: {rows_per_step}): every step holds all of them")
    every = recipe.evaluation.every_steps
    if every is not None and every > num_steps:
        found.append(f"the run ends before its first evaluation (evaluation.every_steps: {every}, {steps}); one is made at the end")
    return found


def forgetting(of_pairs: Mapping[str, float], journal: Iterable[Mapping[str, Any]]) -> str:
    """A sentence about a step of DPO, for which an answer's likelihood may fall without end if only the other one's falls further: the
    loss does not show it. Nothing where all is well, or where the run's journal has it.
    """
    log_ratio = of_pairs.get("log_ratio", 0.0)
    if not log_ratio < FAR_BELOW or any(record.get("event") == FORGETS for record in journal):
        return ""
    return (
        f"chosen and rejected answers are both far less likely than at the start ({log_ratio:.1f} nats a token): {FORGETS}; end the run, "
        "and take a lower optim.learning_rate or a larger dpo.beta"
    )
