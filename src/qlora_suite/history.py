"""What of a conversation a model is given with the next message: as many of the last exchanges as its window has room for."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_suite.assistant import Assistant
from qlora_suite.conversations import Turn
from qlora_suite.prompts import room_for


@dataclass(frozen=True)
class Exchange:
    """A message and its answer: kept or left out together, as a question without its answer says the wrong thing."""

    question: str
    answer: str


@dataclass(frozen=True)
class Asked:
    ids: list[int]
    left_out: int
    """Exchanges before the first that was kept."""


def asked(
    assistant: Assistant, exchanges: Sequence[Exchange], question: str, system: str | None, most: int | None, max_new_tokens: int
) -> Asked:
    """The prompt for the next message, behind at most `most` exchanges (None: all), less those that would leave too little room.

    The room for the answer is `max_new_tokens`, or a quarter of the window where that is less. Raises ValueError if the message alone
    does not fit into the window, with the numbers.
    """
    room = min(max_new_tokens, assistant.window // 4)
    most = 0 if assistant.renderer.is_plain_text else len(exchanges) if most is None else min(most, len(exchanges))
    for kept in range(most, -1, -1):
        turns = [] if system is None else [Turn("system", system)]
        for exchange in exchanges[len(exchanges) - kept :]:
            turns += [Turn("user", exchange.question), Turn("assistant", exchange.answer)]
        ids = assistant.renderer.prompt([*turns, Turn("user", question)])
        if kept == 0:
            room_for(assistant, ids, 1)
        elif len(ids) + room > assistant.window:
            continue
        return Asked(ids, len(exchanges) - kept)
    raise AssertionError("unreachable: kept == 0 returns or raises")
