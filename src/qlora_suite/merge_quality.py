"""A merged model against the live one, 4-bit base and adapter, over the same words: how far apart, and which merge is the nearer.

rows = measured_rows(assistant, num_tokens=4096)
difference = compare(live, merged, rows, renderer, device, dtype)
recommended(live_perplexity, {"16bit": ..., "dequantised": ...})
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_suite import dataset
from qlora_suite.assistant import Assistant
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.engine import autocast
from qlora_suite.evaluation import excerpts, perplexity
from qlora_suite.loss import collate, forward
from qlora_suite.rendered import Rendered, shorten
from qlora_suite.stored_answers import stored_answers

RULE = "the one whose perplexity on these rows is nearer to the live model's; of two equal ones, the smaller KL divergence"


@dataclass(frozen=True)
class Rows:
    kind: str
    """What they are, in words."""
    parts: list[Rendered]


def measured_rows(assistant: Assistant, num_tokens: int) -> Rows:
    """Held-out conversations up to so many tokens, drawn once and for all, else the answers to the preview prompts.

    Raises ValueError if there are neither.
    """
    try:
        dataset.load_manifest(assistant.recipe)  # another preparation may hold out what this run has learnt
        held_out = dataset.read_conversations(Path(assistant.recipe.data.prepared) / "validation.arrow")
        kind, why = "held-out conversations of the validation split", "the prepared data has no validation split"
    except (ValueError, OSError) as error:
        held_out, why = [], str(error)
    if not held_out:
        held_out, kind = _previews(assistant), f"the run's own answers to its preview prompts ({why})"
    rendered = _rendered(held_out, assistant.renderer, assistant.window)
    rendered = [rendered[i] for i in np.random.Generator(np.random.Philox(0)).permutation(len(rendered))]
    kept, used = [], 0
    for part in rendered:
        if kept and used + len(part.ids) > num_tokens:
            continue
        kept.append(part)
        used += len(part.ids)
        if used >= num_tokens:
            break
    if not kept:
        raise ValueError(f"there is nothing to measure the merged model on: {why}, and the run has no previews; prepare the data again")
    return Rows(kind, kept)


def _previews(assistant: Assistant) -> list[Conversation]:
    answers = stored_answers(assistant.subject.folder) or []
    turns = [(Turn("user", a.prompt, learn=False), Turn("assistant", a.text)) for a in answers if a.text]
    return [Conversation(f"preview {i}", (), f"preview {i}", two) for i, two in enumerate(turns)]


def _rendered(found: Sequence[Conversation], renderer: Renderer, window: int) -> list[Rendered]:
    if renderer.is_plain_text:
        return [part for one in found for part in shorten(renderer.render(one), window, "split").pieces if any(part.supervised)]
    return [renderer.render(excerpt.conversation) for excerpt in excerpts(found, [renderer], window)[0]]


@torch.no_grad()
def compare(
    live: nn.Module,
    merged: nn.Module,
    rows: Rows,
    renderer: Renderer,
    device: torch.device,
    dtype: torch.dtype,
    bar: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Differences of the logits before each supervised token, KL(live || merged) in nats, and both models' perplexity.

    Both compute in `dtype`, so that the differences are of the weights. Perplexity and bits per byte are of the answers without
    their end tokens, as in the report.
    """
    largest = absolute = kl = 0.0
    agree = places = numbers = 0
    nats = {"live": 0.0, "merged": 0.0}
    tokens = num_bytes = 0
    for part in bar(rows.parts):
        batch = collate([{"input_ids": part.ids, "supervised": part.supervised, "lengths": [len(part.ids)]}], renderer.eos).to(device)
        columns = batch.columns
        with autocast(device, dtype):
            ours, theirs = (forward(net, batch, columns)[0].float() for net in (live, merged))
        difference = (ours - theirs).abs()
        largest, absolute = max(largest, difference.max().item()), absolute + difference.double().sum().item()
        of_live, of_merged = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl += (of_live.exp() * (of_live - of_merged)).double().sum().item()
        agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        places, numbers = places + len(columns), numbers + difference.numel()
        wanted = batch.input_ids[0, columns + 1]
        inside = _of_answers(part, columns)
        for name, logs in (("live", of_live), ("merged", of_merged)):
            nats[name] -= logs.gather(1, wanted[:, None])[:, 0].double()[inside].sum().item()
        tokens += int(inside.sum())
        num_bytes += sum(turn.num_bytes for turn in part.turns if turn.learn)
    return {
        "largest_logit_difference": largest,
        "mean_logit_difference": absolute / numbers,
        "kl_divergence": max(0.0, kl / places),
        "same_top_token": agree / places,
        "tokens": places,
        **{name: perplexity(nats[name], tokens, num_bytes) for name in nats},
    }


def _of_answers(part: Rendered, columns: Tensor) -> Tensor:
    """Which of the places predict a token of an answer, and not its end. [columns] bool"""
    inside = torch.zeros(len(part.ids), dtype=torch.bool)
    for turn in part.turns:
        if turn.learn:
            inside[turn.start : turn.end] = True
    return inside[(columns + 1).cpu()]


def recommended(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """By RULE."""

    def distance(name: str) -> tuple[float, float]:
        found = measured[name]
        away = abs(found["merged"]["perplexity"] - found["live"]["perplexity"])
        return (away if math.isfinite(away) else math.inf, found["kl_divergence"])

    return min(measured, key=distance)
