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

from qlora_suite.loss import Batch, forward, token_losses

NEAR_ZERO = 1e-4
"""Added to a group's standard deviation, as TRL does: answers that are as good as equal are not taken apart by their rounding."""


def advantages(rewards: Sequence[float]) -> list[float]:
    """How much better each answer to one prompt is than their mean, in (sample) standard deviations. Zero if all are equal."""
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + NEAR_ZERO) for reward in rewards]


def log_probabilities(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Of each supervised token, in row-major order, where logits are divided by the temperature. [supervised] float32

    At temperature 1 the head may compute them a tile at a time; at others the logits of all tokens exist at once.
    """
    if temperature == 1:
        return -token_losses(model, batch)
    logits = forward(model, batch, batch.columns).flatten(0, 1).index_select(0, batch.predicting)
    return -nn.functional.cross_entropy(logits.float() / temperature, batch.targets, reduction="none")


class Measured(NamedTuple):
    """Sums over answers or tokens, device scalars."""

    loss: Tensor
    """Over answers, with a graph."""
    kl: Tensor
    """Over tokens, r KL as above: also an estimate for the model as it is, where others were sampled from."""
    clipped: Tensor
    """Tokens that gain nothing any more: the ratio has left the range in the direction of the advantage."""


def summed_loss(now: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, lengths: Tensor, beta: float, clip: float) -> Measured:
    """`now`, `old`, `reference` [tokens]: log-probabilities, answers end to end; `advantage`, `lengths` [answers]: of each answer."""
    of_token, share = advantage.repeat_interleave(lengths), (1 / lengths).repeat_interleave(lengths)
    ratio, distance = torch.exp(now - old), reference - now
    gain = torch.minimum(ratio * of_token, ratio.clamp(1 - clip, 1 + clip) * of_token)
    kl = ratio * (torch.exp(distance) - distance - 1)
    clipped = torch.where(of_token > 0, ratio > 1 + clip, (ratio < 1 - clip) & (of_token < 0))
    return Measured(((beta * kl - gain) * share).sum(), kl.detach().sum(), clipped.sum())
