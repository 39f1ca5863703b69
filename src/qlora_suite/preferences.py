"""Held-out pairs: which of two answers does a model find likelier, and has training moved it towards the chosen one?

    prefers the chosen one     log p(chosen) > log p(rejected), of the sums over an answer's tokens and of their means
    margin of a pair           beta x (log-ratio of the chosen answer - log-ratio of the rejected one), of the run against its start
    reward accuracy            share of the pairs whose margin is above 0 (Rafailov et al., 2023); 1/2 is what chance gives.
                               Over few trees it has neither interval nor verdict

An answer that is chosen over one and rejected for another, or chosen over several, is scored once:

    pairs                   A2 > A1    A2 > A3    A1 > A3
    scored, chosen first    A2 A1 | A3                        the perplexity is of those before the bar
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation
from qlora_suite.evaluation import MIN_TREES, AnswerScore, Cut, Excerpt, excerpts, over_trees
from qlora_suite.recipe import Dpo

Scores = Mapping[str, Mapping[str, Sequence[AnswerScore]]]
"""By format and column."""
SHORTER, LONGER = "much shorter (under 2/3 of the bytes)", "much longer (over 3/2)"


@dataclass(frozen=True)
class Pair:
    key: str
    group: str
    language: str | None
    chosen: int
    rejected: int
    """Numbers of the excerpts."""


@dataclass(frozen=True)
class HeldOutPairs:
    found: list[Excerpt]
    """Of each answer one, the chosen ones first."""
    num_chosen: int
    pairs: list[Pair]
    num_left_out: int
    """Pairs of which an answer does not fit into the window, or not behind as much of their conversation as the other one."""
    cut: Cut
    """Chosen answers that do not fit."""


def of_pairs(conversations: Sequence[Conversation]) -> bool:
    return any(conversation.rejected is not None for conversation in conversations)


def pairs_that_fit(conversations: Sequence[Conversation], renderers: Sequence[Renderer], window: int) -> HeldOutPairs:
    """What of the pairs can be compared in every format, as `evaluation.excerpts` says for conversations."""
    chosen: dict[Any, Excerpt | None] = {}
    rejected: dict[Any, Excerpt | None] = {}
    answers, tokens, num_bytes = 0, 0, 0
    halves = [conversation.chosen_and_rejected() for conversation in conversations]
    for better, _ in halves:
        if _name(better) not in chosen:
            chosen[_name(better)], cut = _excerpt(better, renderers, window)
            answers, tokens, num_bytes = answers + cut.answers, tokens + cut.tokens, num_bytes + cut.bytes
    pairs, left_out = [], 0
    for better, worse in halves:
        name = _name(worse)
        if name not in chosen and name not in rejected:
            rejected[name], _ = _excerpt(replace(worse, key=f"{worse.key}, rejected"), renderers, window)
        sides = chosen[_name(better)], chosen.get(name) or rejected.get(name)
        if None in sides or _context(sides[0]) != _context(sides[1]):
            left_out += 1
        else:
            pairs.append((better, *sides))
    used = {id(excerpt) for _, _, excerpt in pairs}
    of_chosen = [excerpt for excerpt in chosen.values() if excerpt]
    found = [*of_chosen, *(excerpt for excerpt in rejected.values() if excerpt and id(excerpt) in used)]
    number = {id(excerpt): i for i, excerpt in enumerate(found)}
    numbered = [Pair(c.key, c.group, c.language, number[id(a)], number[id(b)]) for c, a, b in pairs]
    return HeldOutPairs(found, len(of_chosen), numbered, left_out, Cut(answers, tokens, num_bytes))


def _name(answer: Conversation) -> tuple[Any, ...]:
    return answer.group, *((turn.role, turn.content) for turn in answer.turns)


def _excerpt(answer: Conversation, renderers: Sequence[Renderer], window: int) -> tuple[Excerpt | None, Cut]:
    if any(renderer.is_plain_text for renderer in renderers):  # scored in pieces
        return Excerpt(answer), Cut()
    found, cut = excerpts([answer], renderers, window)
    return (found[0] if found else None), cut


def _context(excerpt: Excerpt) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in excerpt.conversation.turns[:-1]]


def compare_pairs(
    held_out: HeldOutPairs, scores: Scores, labels: Mapping[str, str], trained: str, start: str | None, dpo: Dpo | None, samples: int
) -> dict[str, Any] | None:
    """As it stands in report.json under `preferences`; None if no pair fits. `start` is the column of the model that training began with.

    A base is asked in the format in which it needs the fewest nats for the chosen answers, everything else in the trained one.
    """
    if not held_out.pairs:
        return None
    pairs, columns = held_out.pairs, {}
    log_probs: dict[str, np.ndarray] = {}  # [pairs, 2] nats
    for name in dict.fromkeys(column for cells in scores.values() for column in cells):
        of_base = name.startswith("base")
        candidates = {
            f: _nats(cells[name][: held_out.num_chosen]) for f, cells in scores.items() if name in cells and (of_base or f == trained)
        }
        best = min(candidates, key=candidates.get)
        log_probs[name], tokens = _of_pairs(pairs, scores[best][name])
        columns[name] = {
            "label": labels[name],
            "format": best,
            "prefers_chosen": _share_above(log_probs[name][:, 0] - log_probs[name][:, 1]),
            "prefers_chosen_per_token": _share_above((log_probs[name] / tokens) @ [1, -1]),
        }
    rows = [{"key": p.key, "tree": p.group, "language": p.language} for p in pairs]
    of_trained = scores.get(trained, {})
    for row, pair in zip(rows, pairs, strict=True):
        some = next(iter(of_trained.values()))
        row["bytes"] = [some[pair.chosen].bytes, some[pair.rejected].bytes]
        row["tokens"] = [some[i].tokens + some[i].end_tokens for i in (pair.chosen, pair.rejected)]
    for name, values in log_probs.items():
        for row, of_pair in zip(rows, values.tolist(), strict=True):
            row[name] = of_pair
    rewards = sliced = None
    if dpo and start in of_trained and "adapter" in of_trained:
        rewards, margins = _rewards(pairs, of_trained["adapter"], of_trained[start], dpo, samples)
        rewards = {"start": labels[start], **rewards}
        for row, margin in zip(rows, margins.tolist(), strict=True):
            row["margin"] = margin
        sliced = _slices(rows)
    return {
        "pairs": len(pairs),
        "trees": len({p.group for p in pairs}),
        "left_out": held_out.num_left_out,
        "columns": columns,
        "rewards": rewards,
        "slices": sliced or [],
        "rows": rows,
    }


def _nats(answers: Sequence[AnswerScore]) -> float:
    return sum(a.nats for a in answers)


def _of_pairs(pairs: Sequence[Pair], answers: Sequence[AnswerScore]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities with the end token, as DPO has them, and their numbers of tokens. [pairs, 2] float64 each"""
    sides = [[answers[p.chosen], answers[p.rejected]] for p in pairs]
    log_probs = np.array([[-(a.nats + a.end_nats) for a in side] for side in sides])
    return log_probs, np.array([[a.tokens + a.end_tokens for a in side] for side in sides], dtype=float)


def _share_above(differences: np.ndarray) -> float:
    """Of those above 0, a tie being half of one."""
    return float(_wins(differences).mean())


def _wins(differences: np.ndarray) -> np.ndarray:
    return (np.sign(differences) + 1) / 2


def _rewards(
    pairs: Sequence[Pair], ours: Sequence[AnswerScore], start: Sequence[AnswerScore], dpo: Dpo, samples: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Means over the pairs, with 95 % intervals over their trees where these are enough; and each pair's margin. [pairs] float64"""
    (now, tokens), (before, _) = _of_pairs(pairs, ours), _of_pairs(pairs, start)
    ratios = now - before
    rewards = dpo.beta * (ratios / tokens if dpo.length_normalized else ratios)
    margins = rewards[:, 0] - rewards[:, 1]
    trees, ones = [p.group for p in pairs], np.ones(len(pairs))
    accuracy, interval = over_trees(trees, _wins(margins), ones, samples)
    margin, margin_interval = over_trees(trees, margins, ones, samples)
    verdict, count = None, len(set(trees))
    if count < MIN_TREES:  # seven of seven would be 100 %, from 100 % to 100 %
        interval = margin_interval = None
    else:
        interval = at_the_edge(accuracy, count) or interval
        verdict = "better" if interval[0] > 0.5 else "worse" if interval[1] < 0.5 else "not clearly different"
    return {
        "beta": dpo.beta,
        "length_normalized": dpo.length_normalized,
        "accuracy": accuracy,
        "interval_95": interval,
        "verdict": verdict,
        "margin": margin,
        "margin_interval_95": margin_interval,
        "log_ratio_chosen": float(ratios[:, 0].sum() / tokens[:, 0].sum()),
        "log_ratio_rejected": float(ratios[:, 1].sum() / tokens[:, 1].sum()),
        "samples": samples,
    }, margins


def at_the_edge(share: float, trees: int) -> list[float] | None:
    """The 95 % interval of a share that is 0 or 1 in every tree, which a bootstrap takes for certain (Clopper and Pearson, 1934)."""
    unseen = 1 - 0.025 ** (1 / trees)
    return [0.0, unseen] if share == 0 else [1 - unseen, 1.0] if share == 1 else None


def _slices(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By how long the chosen answer is beside the rejected one: a model may have learnt nothing but a length."""

    def name_of(row: Mapping[str, Any]) -> str:
        chosen, rejected = row["bytes"]
        return SHORTER if 3 * chosen < 2 * rejected else LONGER if 2 * chosen > 3 * rejected else "of like length"

    found = []
    for name in (SHORTER, "of like length", LONGER):
        margins = np.array([row["margin"] for row in rows if name_of(row) == name])
        if len(margins):
            found.append({"slice": name, "pairs": len(margins), "accuracy": _share_above(margins), "margin": float(margins.mean())})
    return found
