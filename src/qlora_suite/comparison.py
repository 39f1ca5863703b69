"""Scores of several models in several formats -> report.json: the base at its best against the adapter, over the same answers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qlora_suite.evaluation import AnswerScore, Cut, Excerpt, by_conversation, paired_interval, slices
from qlora_suite.metric import corpus_perplexity
from qlora_suite.recipe import Recipe

REPORT_VERSION = 1
"""Of report.json."""
Scores = dict[str, dict[str, list[AnswerScore]]]
"""By format and column."""


def compare(scores: Scores, labels: dict[str, str], trained: str, samples: int) -> dict[str, Any]:
    """Sums to means, the base's best score, the paired differences (to it, and to the start), slices and every conversation."""
    formats = {name: {column: summary(found) for column, found in cells.items()} for name, cells in scores.items()}
    ours, start = (scores.get(trained, {}).get(column) for column in ("adapter", "start"))
    candidates = [
        (s["bits_per_byte"], name, column) for name, cells in formats.items() for column, s in cells.items() if column.startswith("base")
    ]
    base = difference = theirs = None
    if candidates:
        _, name, column = min(candidates)
        base, theirs = {"format": name, "column": column, **formats[name][column]}, scores[name][column]
        if ours:
            difference = paired_interval(theirs, ours, samples)
    return {
        "format_version": REPORT_VERSION,
        "base": base,
        "adapter": {"format": trained, **formats[trained]["adapter"]} if ours else None,
        "difference": difference,
        "start": {"format": trained, **formats[trained]["start"]} if start else None,
        "difference_from_start": paired_interval(start, ours, samples) if start and ours else None,
        "formats": formats,
        "labels": labels,
        "slices": slices(theirs, ours, start) if ours else [],
        "conversations": by_conversation(theirs, ours, start),
    }


def summary(found: list[AnswerScore]) -> dict[str, float]:
    """The metric of the content, and the end tokens apart."""
    means = corpus_perplexity([a.nats for a in found], [a.tokens for a in found], [a.bytes for a in found])
    end_nats, end_tokens = math.fsum(a.end_nats for a in found), sum(a.end_tokens for a in found)
    end_nll = end_nats / end_tokens if end_tokens else 0.0
    with_end = means["bits_per_byte"] + end_nats / math.log(2) / means["num_bytes"]
    ends = {"end_tokens": end_tokens, "end_nll": end_nll, "end_probability": math.exp(-end_nll), "bits_per_byte_with_end": with_end}
    return {**means, **ends}


def describe_data(recipe: Recipe, manifest: dict[str, Any], found: Sequence[Excerpt], cut: Cut) -> dict[str, Any]:
    """What was scored, and what was not because it does not fit."""
    names, kinds, policies = set(), set(), set()
    for one in recipe.data.each:
        source = one.validation_source or one.source
        names |= {source} if isinstance(source, str) else set(source)
        kinds.add({"published": "validation split", "by_hash": "held out by a hash, no published split", "all": "all"}[one.split])
        policies |= {f"policy {one.policy}"} if one.policy else set()
    answers = sum(t.role == "assistant" and t.learn for e in found for t in e.conversation.turns)
    return {
        "data": {
            "name": "; ".join(", ".join(sorted(part)) for part in (names, kinds, policies) if part),
            "conversations": len({(e.conversation.key, e.conversation.ids) for e in found}),
            "answers": answers,
            "trees": len({e.conversation.group for e in found}),
            "validation_sha256": manifest["files"]["validation.arrow"]["sha256"],
        },
        "window": recipe.data.max_length,
        "cut": asdict(cut),
    }
