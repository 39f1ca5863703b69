"""Answers from a model, in training or finished, and what can be measured of them: the preview timeline."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_suite.chat import Renderer
from qlora_suite.conversations import Turn
from qlora_suite.engine import Engine, autocast
from qlora_suite.files import write_text
from qlora_suite.recipe import Previews


@dataclass(frozen=True)
class Answer:
    prompt: str
    text: str
    num_tokens: int
    """Without the end token."""
    stopped: bool
    """Did the model end the answer itself?"""
    repetition: float
    """Share of 4-token windows that stood in the answer before; 0 for none, near 1 for a loop."""


def repetition(ids: Sequence[int], window: int = 4) -> float:
    """Share of windows that repeat an earlier one. 0 for answers shorter than two windows."""
    windows = [tuple(ids[i : i + window]) for i in range(len(ids) - window + 1)]
    return 1 - len(set(windows)) / len(windows) if len(windows) > 1 else 0.0


def preview(engine: Engine, renderer: Renderer, previews: Previews, stop: Callable[[], bool] = lambda: False) -> list[Answer] | None:
    """Answers to the recipe's preview prompts, each a chat of one turn (with `format: text`, the beginning of a text).

    Every rank answers all of them, in step with the others: engines that shard weights gather them for each token. None, on every
    rank, if `stop` says so on the way.
    """
    if not previews.prompts:
        return []
    chats = [[Turn("user", text)] for text in previews.prompts]
    several = engine.accelerator.num_processes > 1
    with autocast(engine.accelerator.device, engine.dtype):
        answers = answer(engine.unwrapped, renderer, chats, previews.max_new_tokens, stop, in_step=several)
    return None if engine.any_rank(answers is None) else answers


class _Asked(StoppingCriteria):
    """Ends the generation when there is a request to stop. It asks this rank alone: generating in step is what keeps ranks together."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop, self.stopped = stop, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.stopped = self.stopped or self.stop()
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)


class _Limits(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return (input_ids.shape[1] >= self.lengths).to(input_ids.device)


class _Hearing(BaseStreamer):
    def __init__(self, hear: Callable[[int], None]) -> None:
        self.hear, self.prompt_came = hear, False

    def put(self, value: Tensor) -> None:
        if self.prompt_came:
            self.hear(int(value))
        self.prompt_came = True

    def end(self) -> None:
        pass


NEUTRAL = {
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "sequence_bias", "min_new_tokens", "max_time", "stop_strings", "guidance_scale")),
    **{"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "renormalize_logits": False},
}
"""generate() would take them from the base's generation_config (Qwen2.5: a repetition penalty), for which nothing was trained."""


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int | Sequence[int],
    stop: Callable[[], bool] = lambda: False,
    draw: LogitsProcessor | None = None,
    hear: Callable[[int], None] | None = None,
    in_step: bool = False,
) -> list[list[int]] | None:
    """What the model says behind each prompt's ids, in one batch padded on the left: the likeliest tokens, or those that `draw` leaves.

    Each row goes to its first stop token and holds it, or to its limit; one limit for all, or one each. The model keeps the mode it was in.
    `stop` is asked after every token, and None is returned once it says so. `hear` (with one prompt) is told each token as it comes.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    device, longest, pad = next(model.parameters()).device, max(map(len, prompts)), stop_ids[0]
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    was_training = model.training
    model.eval()
    asked = _Asked(stop)
    criteria = [asked] if len(set(limits)) == 1 else [asked, _Limits([longest + limit for limit in limits])]
    try:
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            do_sample=False,
            max_new_tokens=max(limits),
            eos_token_id=list(stop_ids),
            pad_token_id=pad,
            use_cache=True,
            logits_processor=LogitsProcessorList([draw] if draw else []),
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=_Hearing(hear) if hear else None,
            synced_gpus=in_step,
            **NEUTRAL,
        )
    finally:
        model.train(was_training)
    if asked.stopped:
        return None
    return [_until(row[:limit], stop_ids) for row, limit in zip(output[:, longest:].tolist(), limits, strict=True)]


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Up to the first stop token, with it; the batch pads what comes behind."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return ids if end is None else ids[: end + 1]


def answer(
    model: nn.Module,
    renderer: Renderer,
    chats: Sequence[Sequence[Turn]],
    max_new_tokens: int,
    stop: Callable[[], bool] = lambda: False,
    in_step: bool = False,
) -> list[Answer] | None:
    """Greedy answers to chats that end on a user turn, in one batch.

    `in_step`: no rank stops before all have (they generate the same, but for rounding). None if `stop` says so on the way.
    """
    prompts = [renderer.prompt(turns) for turns in chats]
    found = decode(model, prompts, renderer.stop_token_ids, max_new_tokens, stop, in_step=in_step)
    return None if found is None else [answer_of(turns[-1].content, ids, renderer) for turns, ids in zip(chats, found, strict=True)]


def answer_of(prompt: str, ids: Sequence[int], renderer: Renderer) -> Answer:
    """What generated ids say and how they ended."""
    end = next((i for i, token in enumerate(ids) if token in renderer.stop_token_ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(prompt, renderer.answer_text(kept), len(kept), end is not None, repetition(kept))


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over the answers: share that stopped, tokens, repetition."""
    count = len(answers)
    return {
        "stopped": sum(a.stopped for a in answers) / count,
        "tokens": sum(a.num_tokens for a in answers) / count,
        "repetition": sum(a.repetition for a in answers) / count,
    }


def record(step: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """One line of previews.jsonl."""
    return {"step": step, **summary(answers), "answers": [asdict(a) for a in answers]}


def write_timeline(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """previews.md: a table of the means, then every prompt with its answers, newest first."""
    lines = ["# Previews", "", "Greedy answers to the recipe's prompts while the model learns.", ""]
    lines += ["| step | stop by themselves | tokens | repetition |", "|---:|---:|---:|---:|"]
    lines += [f"| {r['step']} | {r['stopped']:.0%} | {r['tokens']:.0f} | {r['repetition']:.0%} |" for r in records]
    for r in reversed(records):
        lines += ["", f"## Step {r['step']}", ""]
        for a in r["answers"]:
            end = "stopped by itself" if a["stopped"] else "ran into the limit"
            lines += [f"**{_inline(a['prompt'])}**", "", *(f"> {line}" for line in (a["text"] or "(nothing)").splitlines())]
            lines += ["", f"*{a['num_tokens']} tokens, {end}, repetition {a['repetition']:.0%}*", ""]
    write_text(path, "\n".join(lines) + "\n")


def _inline(text: str) -> str:
    return " ".join(text.split())
