"""One answer, piece by piece while it is made, that can be stopped.

    for piece in stream(assistant, ids, Limits(max_new_tokens=256), sampling):
        show(piece.text)                    # all that can be shown so far

The model runs in a thread of its own. Leaving the loop, or setting `stop`, ends that thread after the token in hand.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_suite.assistant import Assistant
from qlora_suite.chat import Renderer
from qlora_suite.engine import autocast
from qlora_suite.generation import decode
from qlora_suite.prompts import room_for
from qlora_suite.sampling import Draw, Sampling

Ended = Literal["by itself", "tokens", "window", "seconds", "stopped"]
REPLACEMENT = "\ufffd"
"""What the first bytes of a character decode to while the rest is missing."""


@dataclass(frozen=True)
class Limits:
    max_new_tokens: int
    seconds: float | None = None
    """From when the model begins with the answer: whoever waits for others loses none."""


@dataclass(frozen=True)
class Piece:
    text: str
    """Of the answer, from its beginning: what can be shown."""
    num_tokens: int
    """Without the end token."""
    seconds: float
    ended: Ended | None = None
    """None while it goes on."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0


def in_words(ended: Ended) -> str:
    """How an answer ended."""
    if ended == "by itself":
        return "stopped by itself"
    limit = {"tokens": "the limit of new tokens", "window": "the end of the window", "seconds": "the limit of seconds"}.get(ended)
    return f"ran into {limit}" if limit else "was stopped"


def text_so_far(renderer: Renderer, ids: Sequence[int], done: bool = False) -> str:
    """What can be shown of an unfinished answer: neither half a character nor a part of what the template writes in front of one."""
    text = renderer.answer_text(ids)
    if done:
        return text
    if renderer.template and renderer.template.may_become_lead(text):
        return ""
    return text.rstrip(REPLACEMENT)


def stream(
    assistant: Assistant,
    ids: Sequence[int],
    limits: Limits,
    sampling: Sampling | None = None,
    base: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[Piece]:
    """The answer to a prompt, greedy without `sampling`. The last piece alone has `ended`.

    Raises ValueError if the prompt leaves no room, or `base` is asked of what has no adapter.
    """
    room = room_for(assistant, ids, limits.max_new_tokens)
    if base:
        assistant.check_base()
    return _pieces(assistant, list(ids), room, limits, sampling, base, stop or threading.Event())


def _pieces(
    assistant: Assistant, ids: list[int], room: int, limits: Limits, sampling: Sampling | None, base: bool, stop: threading.Event
) -> Iterator[Piece]:
    renderer, left = assistant.renderer, threading.Event()
    heard: queue.Queue[tuple[int, float] | BaseException | None] = queue.Queue()
    why: list[Ended] = []

    def enough(began: float) -> bool:
        if stop.is_set() or left.is_set():
            why.append("stopped")
        elif limits.seconds is not None and time.monotonic() - began > limits.seconds:
            why.append("seconds")
        return bool(why)

    def run() -> None:
        try:
            with assistant.answering(base), autocast(assistant.device, assistant.dtype):  # both belong to the thread that computes
                began = time.monotonic()
                if not enough(began):
                    draw = Draw(sampling, sampling.generators([ids])) if sampling else None

                    def hear(token: int) -> None:
                        heard.put((token, time.monotonic() - began))

                    decode(assistant.net, [ids], renderer.stop_token_ids, room, lambda: enough(began), draw, hear)
            heard.put(None)
        except BaseException as error:  # told to whoever waits for the answer
            heard.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    said: list[int] = []
    shown, seconds = "", 0.0
    try:
        while (news := heard.get()) is not None:
            if isinstance(news, BaseException):
                raise news
            token, seconds = news
            if token in renderer.stop_token_ids:
                why.insert(0, "by itself")
                continue
            said.append(token)
            shown = max(shown, text_so_far(renderer, said), key=len)
            if heard.empty():  # whoever shows it may be slower than the model
                yield Piece(shown, len(said), seconds)
        ended: Ended = why[0] if why else "tokens" if room == limits.max_new_tokens else "window"
        yield Piece(text_so_far(renderer, said, done=True), len(said), seconds, ended)
    finally:
        left.set()
        thread.join()
