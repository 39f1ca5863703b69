"""Answers to read beside the scores: base, adapter and what it began as, greedy, on held-out first questions and a few fixed prompts.

    prompts = chosen_prompts(conversations, renderer, count=6, room=864)
    for _ in answer_all(subject, start, renderer, files, prompts, 160, device, dtype): ...     batch by batch, into files
    measures(read_answers(files["adapter"]), 100)                             share that ends by itself, words, repetition

The held-out questions are drawn by a hash of their text, so nobody picks the ones that look well.
"""

import contextlib
import hashlib
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_suite import dequantized, fast_paths
from qlora_suite.assistant import Assistant, load
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.engine import autocast
from qlora_suite.evaluation import release_memory
from qlora_suite.files import read_json, write_json
from qlora_suite.generation import Answer, answer
from qlora_suite.recipe import Recipe
from qlora_suite.subject import Subject

FIXED = (
    "Rewrite this note as a short professional e-mail of at most 100 words: own up to the missed deadline, offer Friday instead, list "
    'three next steps as bullet points, close politely. Note: "Sorry, the report is not finished. Is Friday possible?"',
    "What is the capital of France?",
    "Explain to a beginner in two sentences what a hash function does.",
)
"""The same for every model, so that reports can be read beside each other. The first is the task of the seed system 004."""
CONCISE_WORDS = 100
"""Unless the recipe rewards another number."""
BATCH = 10
OPENING_WORDS = 24
"""Of a held-out plain text, as a prompt."""


@dataclass(frozen=True)
class Prompt:
    turns: tuple[Turn, ...]
    """They end on the user's turn."""
    held_out: bool
    """From the validation split, or one of FIXED."""
    reference: str | None = None
    """What a person answered."""

    def record(self) -> dict[str, Any]:
        """As it stands in report.json."""
        system = next((turn.content for turn in self.turns if turn.role == "system"), None)
        return {"prompt": self.text, "system": system, "held_out": self.held_out, "reference": self.reference}

    @property
    def text(self) -> str:
        return self.turns[-1].content


def chosen_prompts(conversations: Sequence[Conversation], renderer: Renderer, count: int, room: int) -> list[Prompt]:
    """Up to `count` held-out first questions, one of a tree, in the order of their hashes, then FIXED; of at most `room` tokens each."""

    def fits(prompt: Prompt) -> bool:
        try:
            return 0 < len(renderer.prompt(prompt.turns)) <= room
        except ValueError:  # this format has no place for it
            return False

    first_of_trees: dict[str, Prompt] = {}
    for conversation in conversations:
        if prompt := _opening(conversation, renderer.is_plain_text):
            first_of_trees.setdefault(conversation.group, prompt)
    by_hash = {hashlib.sha256(p.text.encode("utf-8", "surrogatepass")).hexdigest(): p for p in first_of_trees.values()}
    held_out = (prompt for _, prompt in sorted(by_hash.items()) if fits(prompt))
    fixed = (Prompt((Turn("user", text),), held_out=False) for text in FIXED)
    return [*(prompt for prompt, _ in zip(held_out, range(count), strict=False)), *filter(fits, fixed)]


def _opening(conversation: Conversation, is_plain_text: bool) -> Prompt | None:
    """The turns before the first answer, with this answer if it is there; None if there are none."""
    turns = conversation.turns
    place = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
    reference = turns[place].content if place < len(turns) else ""
    if is_plain_text:
        words = reference.split(" ")
        opening, rest = " ".join(words[:OPENING_WORDS]), " ".join(words[OPENING_WORDS:])
        return Prompt((Turn("user", opening),), held_out=True, reference=rest) if rest else None
    before = turns[:place]  # data of prompts alone has no answer, or an empty one
    return Prompt(before, held_out=True, reference=reference or None) if before and before[-1].role == "user" else None


def concise_words(recipe: Recipe) -> int | None:
    """How many words make an answer concise: what the run was rewarded for, or the task's 100; None if it was rewarded for other things."""
    if recipe.grpo is None:
        return CONCISE_WORDS
    return min((reward.words for reward in recipe.grpo.rewards if reward.name == "within_words"), default=None)


def answer_all(
    subject: Subject,
    start: str | None,
    renderer: Renderer,
    files: Mapping[str, Path],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    on_token: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Write those of the files (`base`, `start`, `adapter`) that are not there, and stop after each batch; `on_token` hears of every token.

    `start` is the adapter of the file of that name, which is answered last: it has to be loaded in the other one's place.
    When a GPU's memory is short it first gives up the copies of weights, then half as many prompts at once. Raises OutOfMemoryError if one
    is too much.
    """
    missing = [name for name, file in files.items() if not file.is_file()]
    for adapter, names in ((subject.adapter, [n for n in missing if n != "start"]), (start, [n for n in missing if n == "start"])):
        if not names:
            continue
        assistant = load(replace(subject, adapter=adapter), device, dtype)
        fast_paths.take_to_answer(assistant.net, subject.recipe.speed, dtype, subject.recipe.data.max_length)
        yield
        for name in names:
            with assistant.as_base() if name == "base" and assistant.has_adapter else contextlib.nullcontext():
                answers = yield from _all_answers(assistant, renderer, prompts, max_new_tokens, on_token)
            write_json(files[name], [asdict(one) for one in answers])
        del assistant  # two models may not fit
        release_memory()


def _all_answers(
    assistant: Assistant, renderer: Renderer, prompts: Sequence[Prompt], max_new_tokens: int, on_token: Callable[[], None]
) -> Generator[None, None, list[Answer]]:
    answers: list[Answer] = []
    size = BATCH
    while len(answers) < len(prompts):
        chats = [prompt.turns for prompt in prompts[len(answers) : len(answers) + size]]
        made = _answers_of(assistant, renderer, chats, max_new_tokens, on_token)
        if made is None:
            if dequantized.drop_copies(assistant.net):
                size = len(chats)
            elif len(chats) > 1:
                size = len(chats) // 2
            else:
                raise torch.OutOfMemoryError("one prompt at a time is too much")
            release_memory()
        answers += made or []
        yield
    return answers


def _answers_of(
    assistant: Assistant, renderer: Renderer, chats: Sequence[Sequence[Turn]], max_new_tokens: int, on_token: Callable[[], None]
) -> list[Answer] | None:
    """None if memory is short."""

    def heard() -> bool:
        on_token()
        return False

    with contextlib.suppress(torch.OutOfMemoryError), autocast(assistant.device, assistant.dtype):
        return answer(assistant.net, renderer, chats, max_new_tokens, heard)
    return None


def read_answers(file: Path) -> list[Answer]:
    return [Answer(**values) for values in read_json(file)]


def as_column(answers: Sequence[Answer], limit: int | None) -> dict[str, Any]:
    """As they stand in report.json: what was counted, and the answers."""
    return {**measures(answers, limit), "answers": [asdict(one) for one in answers]}


def words(text: str) -> int:
    return len(text.split())


def measures(answers: Sequence[Answer], limit: int | None = CONCISE_WORDS) -> dict[str, Any]:
    """What can be counted of answers without judging them; `concise` is one that ends by itself within so many words (None: no limit)."""
    return {
        "stopped": sum(one.stopped for one in answers) / len(answers),
        "concise": None if limit is None else sum(one.stopped and words(one.text) <= limit for one in answers) / len(answers),
        "mean_words": statistics.fmean(words(one.text) for one in answers),
        "median_words": statistics.median(words(one.text) for one in answers),
        "repetition": statistics.fmean(one.repetition for one in answers),
    }
