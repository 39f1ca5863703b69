"""Tokens drawn so that an answer depends on its prompt and the seed, and not on what else is in the batch or in which order.

    sampling = Sampling(temperature=0.7, top_p=0.9, seed=1)
    model.generate(..., do_sample=False, logits_processor=[Draw(sampling, sampling.generators(prompts))])

Every prompt has a generator of its own, seeded by the seed and the prompt's ids, and takes one number from it for each token.
transformers' own sampling takes one generator for the whole batch: there an answer changes with its neighbours.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """Raises ValueError for settings under which nothing could be drawn."""

    temperature: float
    top_p: float = 1.0
    """The likeliest tokens that hold this share of the probability together."""
    top_k: int | None = None
    """The likeliest so many; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"the temperature has to be above 0, not {self.temperature}; leave it out for the likeliest tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p has to be above 0 and at most 1, not {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k has to be at least 1, not {self.top_k}")

    def generators(self, prompts: Sequence[Sequence[int]], earlier: Counter | None = None) -> list[torch.Generator]:
        """One for each prompt (its ids). A prompt that is asked again gets another one, by how often it came `earlier`, which counts on."""
        asked = Counter() if earlier is None else earlier
        found = []
        for ids in map(tuple, prompts):
            digest = hashlib.sha256(f"{self.seed} {asked[ids]} {ids}".encode()).digest()
            found.append(torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1))
            asked[ids] += 1
        return found


class Draw(LogitsProcessor):
    """Leaves of every row's scores only the token that was drawn, for a greedy search to find."""

    def __init__(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> None:
        self.sampling, self.generators = sampling, generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, vocabulary]"""
        cumulated = probabilities(scores, self.sampling).cumsum(dim=-1)
        drawn = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators]).to(scores.device)
        # by place in the vocabulary: an order by probability could change with the last bit of a score
        chosen = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, chosen, 0.0)


def probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """Of every token, 0 for those that top-k and then top-p leave out. [rows, vocabulary] float64"""
    scores = scores.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        weakest = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < weakest, -math.inf)
    shares = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, places = shares.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p  # what comes before it has the share already
        shares = shares.masked_fill(beyond.scatter(1, places, beyond), 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares
