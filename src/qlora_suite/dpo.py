"""Direct preference optimisation (Rafailov et al., 2023): of two answers to one prompt, make the chosen one likelier than the rejected one.

    log-ratio of an answer = log p(answer) - log p_ref(answer)        sums over its tokens; p: the model, p_ref: as it was at the start
    loss of a pair         = -log sigmoid(beta x (log-ratio of the chosen - log-ratio of the rejected))

A prepared row is a pair: the conversation with the chosen answer, then that with the rejected one, as two conversations packed in a row.
So micro-batches, their order and what resumes them are those of every other training; here is what becomes of a batch's token losses.

    token losses   + + + | + + | + + + + | + +        cut by `counts`: chosen, rejected, chosen, rejected
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_suite.recipe import Dpo

MEASURES = ("accuracy", "margin", "reward_chosen", "reward_rejected", "log_ratio", "chosen_tokens", "rejected_tokens")
"""Beside the loss, each a mean over pairs:

accuracy            is the chosen answer's reward above the rejected one's? (equal: 1/2)
margin              by how much
reward_*            beta x log-ratio
log_ratio           nats a token by which both answers have become likelier than at the start; far below 0, the model forgets how to speak
*_tokens            length of the answers
"""


def in_short(measured: Mapping[str, float]) -> str:
    """For a line about a step; nothing where no pairs are learnt."""
    words = {"accuracy": "accuracy", "margin": "margin", "log_ratio": "log-ratio"}
    return "".join(f"  {word} {measured[name]:.2f}" for name, word in words.items() if name in measured)


@dataclass(frozen=True)
class Pairs:
    """What a batch has to know of its pairs."""

    counts: tuple[int, ...]
    """Supervised tokens of each answer: chosen, rejected, chosen, ..., in the order of the rows"""
    reference: Tensor
    """[pairs, 2] float64: log p_ref of the chosen and of the rejected answer, in nats"""
    dpo: Dpo

    def to(self, device: torch.device) -> "Pairs":
        reference = self.reference if device.type == "cpu" else self.reference.pin_memory()
        return replace(self, reference=reference.to(device, non_blocking=True))


def pairs_of(rows: Sequence[Mapping[str, Any] | None], dpo: Dpo, all_supervised: bool = False) -> Pairs:
    """Of prepared rows that also have a `reference` (0, 0 without one); None is an empty row. `all_supervised`: see loss.collate."""
    counts, reference = [], []
    for row in rows:
        if row is None:
            continue
        chosen, rejected = row["lengths"]
        flags = torch.as_tensor(row["supervised"])
        of_row = [chosen - 1, rejected - 1] if all_supervised else [int(flags[:chosen].sum()), int(flags[chosen:].sum())]
        assert all(of_row), "an answer of a pair has no supervised token"
        counts += of_row
        reference.append(row.get("reference", (0.0, 0.0)))
    return Pairs(tuple(counts), torch.tensor(reference, dtype=torch.float64).reshape(-1, 2), dpo)


def log_probs(token_losses: Tensor, pairs: Pairs) -> Tensor:
    """Of each answer, in nats. [pairs, 2] float64, with the losses' graph: a reward is a small difference of large sums"""
    return torch.stack([-losses.sum(dtype=torch.float64) for losses in token_losses.split(pairs.counts)]).view(-1, 2)


def sums_of_pairs(token_losses: Tensor, pairs: Pairs) -> Tensor:
    """The sums over a batch's pairs of the loss, which has a graph, and of MEASURES. [1 + measures] float32

    With `length_normalized`, log-ratios are means over an answer's tokens, so that a long answer counts no more than a short one.
    """
    if not pairs.counts:  # a micro-batch of empty rows: an engine that exchanges gradients waits for its backward pass, too
        return torch.cat([token_losses.sum()[None], token_losses.new_zeros(len(MEASURES))])
    lengths = torch.tensor(pairs.counts, dtype=torch.float64).view(-1, 2).to(token_losses.device, non_blocking=True)
    ratios = log_probs(token_losses, pairs) - pairs.reference
    rewards = pairs.dpo.beta * (ratios / lengths if pairs.dpo.length_normalized else ratios)
    margins = rewards[:, 0] - rewards[:, 1]
    loss = -torch.nn.functional.logsigmoid(margins).sum()
    with torch.no_grad():
        accuracy = (margins.sign() + 1) / 2
        log_ratio = ratios.sum(dim=1) / lengths.sum(dim=1)
        measured = torch.stack([accuracy, margins, *rewards.unbind(1), log_ratio, *lengths.unbind(1)]).sum(dim=1)
    return torch.cat([loss[None], measured]).float()
