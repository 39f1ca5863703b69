"""What a run may do, and what its owner probably did not mean: said once at the start, never refused."""

from collections.abc import Collection

from qlora_suite.recipe import Recipe


def remarks(recipe: Recipe, num_rows: int, num_steps: int, adapted: Collection[str] | None = None) -> list[str]:
    """Sentences for the console, about a run of so many steps on so many rows. `adapted`: the target names that match something."""
    found = []
    if recipe.adapter != "none" and recipe.adapter.targets != "all-linear" and adapted is not None:
        nothing = [target for target in recipe.adapter.targets if target not in adapted]
        if nothing:
            found.append(f"adapter.targets {', '.join(nothing)} match nothing in this base; only {', '.join(sorted(adapted))} are adapted")
    warmup, rows_per_step = recipe.optim.warmup_steps, recipe.train.rows_per_step
    if warmup > num_steps:
        found.append(f"all {num_steps} steps are warm-up (optim.warmup_steps: {warmup}), so the rate never reaches optim.learning_rate")
    if num_rows < rows_per_step:
        unit = "prompts" if recipe.grpo else "pairs" if recipe.dpo else "rows"
        found.append(
            f"the data has {num_rows} {unit}, fewer than a step (train.rows_per_step: {rows_per_step}): every step holds all of them"
        )
    every = recipe.evaluation.every_steps
    if every is not None and every > num_steps:
        found.append(
            f"the run ends before its first evaluation (evaluation.every_steps: {every}, {num_steps} steps); one is made at the end"
        )
    return found
