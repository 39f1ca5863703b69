"""Prompts from the command line, a file or a pipe, in the format that the model was trained in.

rows = rows_in(Path("prompts.jsonl"))                   what was given, each with its place for a complaint
prompts = prompts_of(assistant, rows, system=None)      turns and ids
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_suite.assistant import Assistant
from qlora_suite.conversations import Turn

ROLES = ("system", "user", "assistant", "tool")
ROOM = 256
"""Tokens for an answer, in the window that a refusal suggests."""


@dataclass(frozen=True)
class Prompt:
    given: dict[str, Any]
    """As it came: {"prompt": ...} or {"messages": [...]}."""
    turns: list[Turn]
    ids: list[int]

    @property
    def question(self) -> str:
        return self.turns[-1].content


Row = tuple[str, dict[str, Any]]
"""Its place ("prompts.jsonl, line 3") and what it says."""


def rows_in(path: Path) -> list[Row]:
    """A prompt a line; of a .jsonl file an object a line. Raises ValueError for a line that is none."""
    if not path.is_file():
        raise ValueError(f"there is no file {path} with prompts; give one with --file, or a prompt on the command line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return [(place, _row(place, line)) for place, line in lines] if path.suffix == ".jsonl" else rows_of(lines)


def rows_of(lines: Sequence[tuple[str, str]]) -> list[Row]:
    """Lines as they are, each with its place."""
    return [(place, {"prompt": line.rstrip("\r")}) for place, line in lines]


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error})") from None
    found = {key: row[key] for key in ("prompt", "messages") if key in row} if isinstance(row, dict) else {}
    if len(found) != 1:
        raise ValueError(f'{place} has to be an object with either "prompt" or "messages", not {line[:80]}')
    return found


def prompts_of(assistant: Assistant, rows: Sequence[Row], system: str | None) -> list[Prompt]:
    """Raises ValueError, with the place, for what cannot be asked: empty, of another shape, or longer than the window."""
    if system is not None:
        check_system(assistant)
    prompts = []
    for place, row in rows:
        try:
            turns = _turns(row)
            if system is not None:
                if turns[0].role == "system":
                    raise ValueError("it has a system message already, and there is a --system beside it; leave one out")
                turns = [Turn("system", system), *turns]
            ids = assistant.renderer.prompt(turns)
            room_for(assistant, ids, 1)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        prompts.append(Prompt(row, turns, ids))
    return prompts


def check_system(assistant: Assistant) -> None:
    """Raises ValueError if the format has no place for a system prompt."""
    if not assistant.takes_system:
        raise ValueError(f"chat format {assistant.subject.format} has no place for a system prompt; write it into the prompt")


def room_for(assistant: Assistant, ids: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens the answer may have. Raises ValueError if the window has no place for one behind the prompt."""
    room = assistant.window - len(ids)
    if room < 1:
        wanted = min(filter(None, [len(ids) + max(ROOM, max_new_tokens), assistant.context]))
        wider = f", or add data.max_length={wanted} to the command, beyond what it was trained on" if wanted > len(ids) else ""
        raise ValueError(
            f"the prompt has {len(ids):,} tokens, and prompt and answer share a window of {assistant.window:,}; shorten the prompt{wider}"
        )
    return min(room, max_new_tokens)


def _turns(row: dict[str, Any]) -> list[Turn]:
    if "prompt" in row:
        text = row["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError("a prompt has to be a text that is not empty")
        return [Turn("user", text)]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages have to be a list that is not empty")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(f'message {number} has to be {{"role": one of {", ".join(ROLES)}, "content": a text}}')
    return [Turn(message["role"], message["content"]) for message in messages]
