"""The learning rate as a plain function of the step: nothing to save, nothing that a launcher can step twice."""

import math

from qlora_suite.recipe import Optim


def lr_at(step: int, optim: Optim, num_steps: int) -> float:
    """Learning rate of step `step` (counted from 0) in a run of `num_steps`.

    It climbs in `warmup_steps` equal parts (step 0 already moves), then stays, falls in a line, or falls along half a
    cosine, to `min_learning_rate_ratio` of the peak at the last step.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    progress = (step - optim.warmup_steps) / max(1, num_steps - 1 - optim.warmup_steps)
    remaining = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    floor = optim.min_learning_rate_ratio
    return optim.learning_rate * (floor + (1 - floor) * remaining)
