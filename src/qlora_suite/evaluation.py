"""Negative log-likelihoods -> perplexity, bits per byte, slices and a paired interval.

Sums travel and means are made once, at the end: (nats, tokens, bytes) of every answer, each token exactly once, in float64.
Bits per byte divide by the UTF-8 bytes of what was said, so they compare formats, tokenizers and models; the end token, which
formats write differently, is reported apart.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from qlora_suite import recipe
from qlora_suite.batches import EMPTY, Limit, micro_batches
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation
from qlora_suite.dataset import Rows
from qlora_suite.dpo import MEASURES
from qlora_suite.engine import Engine
from qlora_suite.loss import collate, summed_loss, token_losses
from qlora_suite.model_template import merged
from qlora_suite.ranks import gathered, together
from qlora_suite.rendered import Rendered, shorten

LN2 = math.log(2)
MIN_TREES = 10
"""For a verdict."""


@dataclass(frozen=True)
class AnswerScore:
    """One answer under one model. Nats are natural logarithms; `end_` is its end token."""

    key: str
    """Of the conversation."""
    group: str
    """Of the tree."""
    language: str | None
    number: int
    """First, second, ... answer of its conversation."""
    bytes: int
    nats: float
    tokens: int
    end_nats: float
    end_tokens: int


@dataclass(frozen=True)
class Cut:
    """What could not be scored, because it does not fit into the window in every format compared."""

    answers: int = 0
    tokens: int = 0
    bytes: int = 0


def perplexity(nats: float, tokens: int, num_bytes: int) -> dict[str, float]:
    """The one place where means are made. Raises ValueError if there is nothing to divide by."""
    if tokens <= 0 or num_bytes <= 0:
        raise ValueError(f"there is nothing to evaluate: {tokens} tokens, {num_bytes} bytes")
    return {
        "nll_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / LN2 / num_bytes,
        "num_tokens": tokens,
        "num_bytes": num_bytes,
    }


# --- scoring


@dataclass(frozen=True)
class Excerpt:
    """As much of a conversation as fits into the window. Its learnt answers are to be scored."""

    conversation: Conversation
    answers_before: int = 0
    """Answers of the whole conversation that were left out in front."""


def excerpts(conversations: Sequence[Conversation], renderers: Sequence[Renderer], window: int) -> tuple[list[Excerpt], Cut]:
    """Each learnt answer once, behind as much of its conversation as fits into the window in every format.

    With room for three turns of U1 A1 U2 A2 U3 A3 (A3 being too long for any context but its own question):

        U1 A1     |  U2 A2  |  U3 A3

    so that all formats score the same answers behind the same words. An answer that does not fit even behind its own question is
    cut, and counted. Where one of the formats rewrites earlier answers, each answer is the end of an excerpt of its own.
    """
    roles = {role for renderer in renderers for role in renderer.merges}
    conversations = [_merged(conversation, roles) for conversation in conversations] if roles else conversations
    if any(renderer.rewrites_history for renderer in renderers):
        conversations = [one for conversation in conversations for one in conversation.ending_at_each_answer()]
    kept: list[Excerpt] = []
    answers, tokens, num_bytes = 0, 0, 0
    for conversation in conversations:
        waiting = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.learn]
        start = 0
        while waiting:
            until = _turns_that_fit(conversation, start, renderers, window)
            fitting = [i for i in waiting if i < until]
            if fitting:
                turns = [replace(t, learn=t.learn and start + i in fitting) for i, t in enumerate(conversation.turns[start:until], 0)]
                before = sum(t.role == "assistant" for t in conversation.turns[:start])
                kept.append(Excerpt(replace(conversation, turns=tuple(turns)), before))
                waiting = waiting[len(fitting) :]
                start = 0
                continue
            later = [i for i in range(start + 1, waiting[0]) if conversation.turns[i].role == "user"]
            if later:
                start = later[0]
                continue
            lost = renderers[0].render(replace(conversation, turns=conversation.turns[: waiting[0] + 1])).turns[-1]
            answers, tokens, num_bytes = answers + 1, tokens + lost.end - lost.start, num_bytes + lost.num_bytes
            waiting, start = waiting[1:], 0
    return kept, Cut(answers, tokens, num_bytes)


def scorable(conversation: Conversation) -> Conversation | None:
    """Up to its last answer that says something; None if there is none: GRPO's data may be prompts alone."""
    turns = conversation.turns
    while turns and turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns = turns[:-1]
    kept = conversation if turns == conversation.turns else replace(conversation, turns=turns).without_open_end()
    return kept if kept and any(t.role == "assistant" and t.learn for t in kept.turns) else None


def _merged(conversation: Conversation, roles: Collection[str]) -> Conversation:
    """With the turns of these roles as one that follow each other: what one format merges, the others score merged."""
    try:
        return replace(conversation, turns=tuple(turn for _, turn in merged(enumerate(conversation.turns), roles)))
    except ValueError as error:
        raise ValueError(f"conversation {conversation.key}: {error}") from error


def _turns_that_fit(conversation: Conversation, start: int, renderers: Sequence[Renderer], window: int) -> int:
    """How many turns fit into the window in every format, when those before `start` are left out."""
    rest = replace(conversation, turns=conversation.turns[start:])
    fitting = []
    for renderer in renderers:
        rendered = renderer.render(rest)
        fitting.append(max((start + t.index + 1 for t in rendered.turns if t.end < min(window, len(rendered.ids))), default=0))
    return min(fitting)


@torch.no_grad()
def score(
    model: nn.Module,
    renderer: Renderer,
    found: Sequence[Excerpt],
    window: int,
    limit: Limit,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    accelerator: Accelerator | None = None,
) -> list[AnswerScore]:
    """Every learnt answer of the excerpts, in their order. They must fit into the window; a plain text may be longer.

    An excerpt is a row of its own, so that the result depends on neither packing nor batch size. With an `accelerator` of several
    processes each scores a share, on a whole model of its own, and all return everything. Raises what `ranks.together` raises.
    """
    device = next(model.parameters()).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    answers: dict[int, list[AnswerScore]] = {}
    with together(accelerator):
        pieces = _pieces(renderer, found, window)
        lengths = [len(part.ids) for _, part in pieces]
        mine = sorted(range(len(pieces)), key=lambda p: (-lengths[p], p))[rank::world]  # like lengths, so like work, for every rank
        was_training = model.training
        model.eval()
        for batch in progress(limit.cut(mine, lengths)):
            rows = [{"input_ids": pieces[p][1].ids, "supervised": pieces[p][1].supervised, "lengths": [lengths[p]]} for p in batch]
            losses = token_losses(model, collate(rows, renderer.eos).to(device)).double().cpu().numpy()
            ends = np.cumsum([sum(row["supervised"]) for row in rows])
            for p, of_row in zip(batch, np.split(losses, ends[:-1]), strict=True):
                i, part = pieces[p]
                answers[p] = _answers(found[i], part, of_row)
        model.train(was_training)
    of_pieces = {p: scored for share in gathered(accelerator, answers) for p, scored in share.items()}
    return _joined([answer for p in range(len(pieces)) for answer in of_pieces[p]])


def _pieces(renderer: Renderer, found: Sequence[Excerpt], window: int) -> list[tuple[int, Rendered]]:
    """(number of the excerpt, what goes through the model as one row), in order."""
    pieces = []
    for i, excerpt in enumerate(found):
        rendered = renderer.render(excerpt.conversation)
        if renderer.is_plain_text:
            parts = shorten(rendered, window, "split").pieces
        else:  # without what a template writes behind the last end token, a newline: nothing of it is scored, and it may not fit
            parts = [rendered.first(rendered.turns[-1].end + 1)]
        assert all(len(part.ids) <= window for part in parts), f"{excerpt.conversation.key} does not fit into {window} tokens"
        pieces += [(i, part) for part in parts]
    return pieces


def score_within_memory(
    model: nn.Module,
    renderer: Renderer,
    found: Sequence[Excerpt],
    window: int,
    limit: Limit,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    accelerator: Accelerator | None = None,
) -> list[AnswerScore]:
    """`score`, with half as much at once on all ranks each time that a GPU's memory is short on one.

    Raises OutOfMemoryError if one row is too much.
    """
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return score(model, renderer, found, window, limit, progress, accelerator)
        release_memory()
        if limit.rows == 1:
            raise torch.OutOfMemoryError("one row at a time is too much")
        limit = Limit(limit.rows // 2, limit.tokens // 2)


def release_memory() -> None:
    """Give back what nothing refers to any more. Not while an OutOfMemoryError is handled: its traceback holds on to tensors."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def _answers(excerpt: Excerpt, rendered: Rendered, losses: np.ndarray) -> list[AnswerScore]:
    """The losses of one row's supervised tokens, by answer. [supervised] float64"""
    conversation = excerpt.conversation
    by_place = np.zeros(len(rendered.ids))
    by_place[np.asarray(rendered.supervised)] = losses
    scores = []
    for turn in rendered.turns:
        if turn.learn:
            # A part of a plain text ends without a token for it.
            end = by_place[turn.end : turn.end + 1] if any(rendered.supervised[turn.end : turn.end + 1]) else by_place[:0]
            number = excerpt.answers_before + sum(t.role == "assistant" for t in conversation.turns[: turn.index + 1])
            scores.append(
                AnswerScore(
                    key=conversation.key,
                    group=conversation.group,
                    language=conversation.language,
                    number=number,
                    bytes=turn.num_bytes,
                    nats=float(by_place[turn.start : turn.end].sum()),
                    tokens=turn.end - turn.start,
                    end_nats=float(end.sum()),
                    end_tokens=len(end),
                )
            )
    return scores


def _joined(answers: Sequence[AnswerScore]) -> list[AnswerScore]:
    """Pieces of one plain text as one answer again."""
    joined: list[AnswerScore] = []
    for a in answers:
        last = joined[-1] if joined else None
        if last and (last.key, last.group, last.number) == (a.key, a.group, a.number) and last.end_tokens == 0:
            sums = {name: getattr(last, name) + getattr(a, name) for name in ("bytes", "nats", "tokens", "end_nats", "end_tokens")}
            joined[-1] = replace(last, **sums)
        else:
            joined.append(a)
    return joined


def check_dev_rows(evaluation: recipe.Evaluation, num_rows: int) -> None:
    """Raises ValueError if the recipe wants to evaluate on a development split that is empty."""
    if evaluation.every_steps is not None and num_rows == 0:
        raise ValueError(
            "evaluation.every_steps needs a development split, but data.dev_share left it without a conversation; raise it and prepare "
            "the data again, or set evaluation.every_steps: null"
        )


def dev_rows(rows: Rows, budget_tokens: int | None) -> range:
    """Numbers of the development rows that `dev_loss` reads: the first ones, of so many tokens at most; one row at least."""
    within = rows.lengths.cumsum() <= (math.inf if budget_tokens is None else budget_tokens)
    return range(max(1, int(within.sum())))


@torch.no_grad()
def dev_loss(
    engine: Engine,
    rows: Rows,
    pad_id: int,
    limit: Limit,
    budget_tokens: int | None,
    stop: Callable[[], bool] = lambda: False,
    dpo: recipe.Dpo | None = None,
) -> list[float] | None:
    """[nats per supervised token] of the development rows (there must be some) within the budget, shared among the ranks; None if `stop`
    (which all ranks agree on) says so on the way. Of pairs, for `dpo`: [its loss per pair, and the means of dpo.MEASURES].

    Every rank runs the model equally often, on empty rows where it has no more: engines that shard weights gather them in each
    forward pass. The module itself is called, not its wrapper: DDP would send buffers around.
    """
    assert len(rows) > 0, "see check_dev_rows"
    chosen = sorted(dev_rows(rows, budget_tokens), key=lambda r: -rows.lengths[r])
    model, accelerator = engine.unwrapped, engine.accelerator
    was_training = model.training
    model.eval()
    size, sums = 0, torch.zeros(1 + len(MEASURES) if dpo else 1, dtype=torch.float64)
    try:
        for piece in micro_batches(chosen, rows.lengths, limit, accelerator.process_index, accelerator.num_processes):
            if stop():
                return None
            batch = collate([rows[r] if r != EMPTY else None for r in piece], pad_id, dpo=dpo).to(accelerator.device)
            sums += summed_loss(model, batch).double().cpu()
            size += batch.size
    finally:
        model.train(was_training)
    size, *sums = engine.sum_over_ranks(size, *sums.tolist())
    return [of_all / size for of_all in sums]


# --- comparing


def paired_interval(base: Sequence[AnswerScore], adapter: Sequence[AnswerScore], samples: int, seed: int = 0) -> dict[str, Any]:
    """Bits per byte, adapter minus base, with a 95 % percentile interval of a paired bootstrap over trees (None for a single tree).

    Answers of one tree share prompts and each other's context, so they are not independent: whole trees are drawn, with
    replacement, and base and adapter are scored on the same draw (Efron and Tibshirani, 1993, chapters 8 and 13). Over few trees
    such an interval is too narrow, so there is no `verdict` (better, worse or not clearly different) below MIN_TREES.
    """
    for b, a in zip(base, adapter, strict=True):
        assert (b.key, b.number, b.bytes) == (a.key, a.number, a.bytes), "the two models were not scored on the same answers"
    nats = [a.nats - b.nats for b, a in zip(base, adapter, strict=True)]
    return bootstrapped([b.group for b in base], nats, [b.bytes for b in base], samples, seed)


def bootstrapped(trees: Sequence[str], nats: Sequence[float], sizes: Sequence[int], samples: int, seed: int = 0) -> dict[str, Any]:
    """The difference of `paired_interval`, of parts that name their tree, their difference in nats and their bytes."""
    bits, interval = over_trees(trees, [difference / LN2 for difference in nats], sizes, samples, seed)
    groups: dict[str, float] = {}
    for tree, difference in zip(trees, nats, strict=True):
        groups[tree] = groups.get(tree, 0.0) + difference
    verdict = None
    if len(groups) >= MIN_TREES:
        verdict = "better" if interval[1] < 0 else "worse" if interval[0] > 0 else "not clearly different"
    return {
        "bits_per_byte": bits,
        "interval_95": interval,
        "verdict": verdict,
        "trees": len(groups),
        "samples": samples,
        "better_trees": sum(difference < 0 for difference in groups.values()),
    }


def over_trees(
    trees: Sequence[str], values: Sequence[float], sizes: Sequence[float], samples: int, seed: int = 0
) -> tuple[float, list[float] | None]:
    """Sum of the values over sum of the sizes, and its 95 % percentile interval when whole trees are drawn (None for a single tree)."""
    groups = sorted(set(trees))
    place = {group: i for i, group in enumerate(groups)}
    sums = np.zeros((len(groups), 2))  # per tree
    for tree, value, size in zip(trees, values, sizes, strict=True):
        sums[place[tree]] += (value, size)
    total = sums.sum(axis=0)
    if len(groups) < 2:
        return float(total[0] / total[1]), None
    draws = np.random.Generator(np.random.Philox(seed)).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), samples)
    drawn = draws @ sums
    return float(total[0] / total[1]), [float(edge) for edge in np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])]


def by_conversation(
    base: Sequence[AnswerScore] | None, adapter: Sequence[AnswerScore] | None, start: Sequence[AnswerScore] | None = None
) -> list[dict[str, Any]]:
    """Bytes and nats of each conversation's answers, of whichever models there are: what the interval was made from."""
    rows: list[dict[str, Any]] = []
    last_number = 0
    for i, answer in enumerate(adapter or base or []):
        if not rows or (rows[-1]["key"], rows[-1]["tree"]) != (answer.key, answer.group) or answer.number <= last_number:
            rows.append({"key": answer.key, "tree": answer.group, "language": answer.language, "answers": 0, "bytes": 0})
        row = rows[-1]
        row["answers"] += 1
        row["bytes"] += answer.bytes
        for name, scores in (("base_nats", base), ("start_nats", start), ("adapter_nats", adapter)):
            if scores:
                row[name] = row.get(name, 0.0) + scores[i].nats
        last_number = answer.number
    return rows


LENGTHS = ((200, "under 200 bytes"), (600, "200 to 599"), (1500, "600 to 1,499"), (math.inf, "1,500 and more"))


def slices(
    base: Sequence[AnswerScore] | None, adapter: Sequence[AnswerScore], start: Sequence[AnswerScore] | None = None
) -> list[dict[str, Any]]:
    """Bits per byte by place in the conversation, length of the answer and language, of whichever models there are."""
    cuts: list[tuple[str, Callable[[AnswerScore], str]]] = [
        ("answer", lambda a: str(a.number) if a.number < 3 else "3 and later"),
        ("length", lambda a: next(name for bound, name in LENGTHS if a.bytes < bound)),
        ("language", lambda a: a.language or "unknown"),
    ]
    found = []
    for by, name_of in cuts:
        members: dict[str, list[int]] = {}
        for i, answer in enumerate(adapter):
            members.setdefault(name_of(answer), []).append(i)
        order = [name for _, name in LENGTHS] if by == "length" else sorted(members)
        for name in order:
            if name in members:
                row: Mapping[str, Any] = {"by": by, "slice": name, "answers": len(members[name])}
                sides = (("adapter", adapter), ("base", base), ("start", start))
                found.append({**row, **{side: _bits([of[i] for i in members[name]]) for side, of in sides if of is not None}})
    return found


def _bits(answers: Sequence[AnswerScore]) -> float | None:
    num_bytes = sum(a.bytes for a in answers)
    return math.fsum(a.nats for a in answers) / LN2 / num_bytes if num_bytes else None
