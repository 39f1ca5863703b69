"""Group relative policy optimisation (Shao et al., 2024, DeepSeekMath): what makes an answer likelier that is better than its group's.

With r the ratio of a token's probability to what it was when the answer was sampled, A the answer's advantage, and KL against the
reference, the loss of an answer of n tokens is

    1/n  sum over its tokens of  -min(r A, clip(r, 1 - e, 1 + e) A) + beta r KL,      KL = exp(d) - d - 1,  d = log reference - log now

and that of a step the mean over all answers of all ranks. KL is Schulman's estimator k3: never negative, and right in the mean. The
paper has it without r, whose gradient is that of another divergence (reference to model); with r it is the one that is meant, also where
r is 1 (DeepSeek-V3.2, 2025). This is what TRL 1.16 computes with loss_type="grpo", rewards scaled by group, and else its defaults.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlora_suite.batches import check_division
from qlora_suite.loss import Batch, token_losses
from qlora_suite.recipe import Recipe

MEASURES = ("clipped", "kl")
"""What `Measured` holds beside the loss: sums over tokens. `kl` is there with a reference alone."""
NEAR_ZERO = 1e-4
"""Added to a group's standard deviation, as TRL does: answers that are as good as equal are not taken apart by their rounding."""

SAME = 1e-9
"""Rewards that differ by less are the same: weighted sums of the same numbers may differ in their last bit."""


def answers_of_a_process(recipe: Recipe, world: int) -> int:
    """How many of a step's answers are sampled, and learnt from, by one of `world` processes: what a micro-batch is a part of.

    Raises ValueError, with the arithmetic, if the prompts of a step cannot be shared out, or train.micro_batch is more than that.
    """
    prompts, group, micro_batch = recipe.train.rows_per_step, recipe.grpo.group_size, recipe.train.micro_batch
    check_division(prompts, world, "auto")
    answers = prompts // world * group
    if micro_batch != "auto" and micro_batch > answers:
        of_world = f" / {world} processes" if world > 1 else ""
        raise ValueError(
            f"train.micro_batch is {micro_batch}, of answers with grpo, and a process has {answers} of them in a step ({prompts} prompts"
            f"{of_world} x {group} answers); use {answers} or less, or auto"
        )
    return answers


def are_alike(rewards: Sequence[float]) -> bool:
    """Did all answers to one prompt earn the same, but for the rounding of their sums?"""
    return max(rewards) - min(rewards) < SAME


def advantages(rewards: Sequence[float]) -> list[float]:
    """How much better each answer to one prompt is than their mean, in (sample) standard deviations. Zero if all are alike."""
    if are_alike(rewards):
        return [0.0] * len(rewards)
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + NEAR_ZERO) for reward in rewards]


def log_probabilities(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Of each supervised token, in row-major order, where logits are divided by the temperature. [supervised] float32"""
    return -token_losses(model, batch, temperature)


class Measured(NamedTuple):
    """Sums over answers or tokens, device scalars."""

    loss: Tensor
    """Over answers, with a graph."""
    clipped: Tensor
    """Tokens that gain nothing any more: the ratio has left the range in the direction of the advantage."""
    kl: Tensor | None
    """Over tokens, r KL as above: also an estimate for the model as it is, where others were sampled from. None without a reference."""


def summed_loss(
    now: Tensor, old: Tensor, reference: Tensor | None, advantage: Tensor, lengths: Tensor, beta: float, clip: float
) -> Measured:
    """`now`, `old`, `reference` [tokens]: log-probabilities, answers end to end; `advantage`, `lengths` [answers]: of each answer.
    With a beta of 0 no reference is needed.
    """
    of_token, share = advantage.repeat_interleave(lengths), (1 / lengths).repeat_interleave(lengths)
    ratio = torch.exp(now - old)
    gain = torch.minimum(ratio * of_token, ratio.clamp(1 - clip, 1 + clip) * of_token)
    clipped = torch.where(of_token > 0, ratio > 1 + clip, (ratio < 1 - clip) & (of_token < 0)).sum()
    if reference is None:
        assert beta == 0, "there is nothing to measure the distance from"
        return Measured(-(gain * share).sum(), clipped, None)
    distance = reference - now
    kl = ratio * (torch.exp(distance) - distance - 1)
    return Measured(((beta * kl - gain) * share).sum(), clipped, kl.detach().sum())
