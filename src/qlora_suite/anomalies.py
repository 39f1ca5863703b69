"""Steps that must not pass unnoticed, and what is done about them.

    not finite    the loss or the gradient holds NaN or infinity: never applied. An overflow of fp16 is a step of its search for a scale
                  and is only counted, unless the search does not end
    a spike       the gradient's norm is far above the last ones': clipped or left out, as optim.on_spike says

Either is said, noted in metrics.jsonl, and leaves a black box (black_box.py; not under GRPO, whose samples.jsonl says more). All ranks
see the same loss and norm and decide alike.
"""

import math
import statistics
from collections.abc import Sequence

import torch

from qlora_suite.checkpoint import State
from qlora_suite.recipe import Optim

NOT_FINITE, SPIKE = "not finite", "spike"
HISTORY, LEAST = 200, 20
"""Norms that are remembered, and how many there must be before one can be called unusual."""
SCALE_SEARCH_STEPS = 16
"""fp16's scale starts at 65,536 = 2^16 and halves at each overflow."""


def anomaly(loss: float, grad_norm: float, norms: Sequence[float], spike_ratio: float) -> str:
    """NOT_FINITE, SPIKE or nothing: a step's loss and gradient norm, beside the norms of the last steps."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):  # a loss of infinity can have finite gradients
        return NOT_FINITE
    if len(norms) >= LEAST and grad_norm > spike_ratio * statistics.median(norms):
        return SPIKE
    return ""


def is_applied(found: str, optim: Optim) -> bool:
    return not found or (found == SPIKE and optim.on_spike == "clip")


def is_scale_search(found: str, loss: float, dtype: torch.dtype, scale: float, in_a_row: int) -> bool:
    """Is it an overflow of fp16 that a smaller scale will mend?"""
    return found == NOT_FINITE and math.isfinite(loss) and dtype == torch.float16 and scale >= 1 and in_a_row < SCALE_SEARCH_STEPS


def count(state: State, grad_norm: float, applied: bool) -> None:
    """Keep in the state what later steps are judged by."""
    state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
    state.skipped_steps += not applied
    if applied and grad_norm:  # GRPO's is 0 where no answer is better than another, which says nothing of what is usual
        state.norms = [*state.norms, grad_norm][-HISTORY:]


def check_skipped(
    in_a_row: int, limit: int, dtype: torch.dtype, scale: float, found: str, step_rows: Sequence[int], has_box: bool = True
) -> None:
    """Raises ValueError after `limit` steps in a row that could not be applied. fp16 gets a few more, to find its scale."""
    if dtype == torch.float16 and scale >= 1:
        limit += SCALE_SEARCH_STEPS
    if in_a_row < limit:
        return
    because = {
        NOT_FINITE: "the loss or the gradient was not finite",
        SPIKE: "the gradient was far above the last ones' (optim.on_spike: skip)",
    }
    look = "black_box/ names their conversations, and where it began" if has_box else "samples.jsonl has answers of each step"
    raise ValueError(
        f"{in_a_row} steps in a row were not applied, in the last of which, with rows {list(step_rows)}, {because[found]}; the last "
        f"checkpoint is good: lower optim.learning_rate, or look at these rows ({look})"
    )
