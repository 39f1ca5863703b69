"""Rows of people's own data -> conversations. What a row is, is seen from its keys, or named by data.form:

    messages    {"messages": [{"role": "user", "content": "..."}, ...]}                    roles as at OpenAI; content text or text parts
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...]}
    alpaca      {"instruction": "...", "input": "...", "output": "...", "history": [[question, answer], ...]}
    prompt      {"prompt": "...", "completion": "..."}  or "response"                      a text each, or messages each
                {"prompt": "..."}                                                          for GRPO
    pairs       {"prompt": "...", "chosen": "...", "rejected": "..."}                      for DPO; a text each, or messages each
    text        {"text": "..."}                                                            no roles: all is learnt, or what markers say
    oasst       {"message_id", "parent_id", "message_tree_id", "text", "role", ...}        -> oasst1.py

Of `pairs` the chosen and the rejected messages may repeat the prompt, which then may be missing: two conversations that differ in their
last turn alone. All but `text` may have a "system" beside. data.fields and data.roles give other names to keys and roles. A message with
`"train": false` or `"weight": 0` is context and is not learnt.

GRPO (`prompts` below) needs no answers: where a row ends on a turn of the user or of a tool, an empty answer stands for the place where the
model is asked. Of a pair the chosen answer is kept.

A row that is no chat becomes a `BadRow` that names the key and the value; nothing is repaired in silence.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_suite.conversations import LONGEST, Conversation, Turn
from qlora_suite.recipe import FIELDS, Form, Source
from qlora_suite.sources import BadRow, Row, shown

CALL = "call"
"""What an assistant says to a tool, where the data has a role of its own for it."""
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
LOOK_AT = 100
"""Rows from whose keys the form is seen."""


class _Bad(Exception):
    """A row that is no chat: (reason, key, value)."""

    def __init__(self, reason: str, key: str = "", value: Any = None) -> None:
        self.reason, self.key, self.value = reason, key, value


def form_of(row: dict[str, Any], fields: dict[str, str], prompts: bool = False) -> Form | None:
    """What a row is by its keys, or None. OASST messages have a `text` too, so the richer forms are asked for first.

    `prompts`: a prompt needs no answer.
    """

    def has(*names: str) -> bool:
        return all(fields.get(name, name) in row for name in names)

    if has("message_id", "parent_id"):
        return "oasst"
    if has("chosen", "rejected"):  # preference data often has the chosen conversation as its messages too
        return "pairs"
    if has("messages"):
        return "messages"
    if has("conversations"):
        return "sharegpt"
    if has("instruction", "output"):
        return "alpaca"
    if has("prompt") and (prompts or has("completion") or has("response")):
        return "prompt"
    return "text" if has("text") else None


def recognise(rows: Sequence[Row | BadRow], source: Source, prompts: bool = False) -> Form:
    """The form of a data set, from its first rows. Raises ValueError if they are of none, or of several."""
    if source.policy is not None or source.form is not None:
        return source.form or "oasst"
    fields, good = dict(source.fields), [row for row in rows if isinstance(row, Row)]
    if not good:
        raise ValueError(f"{source.source}: none of the first {len(rows)} rows can be read; {rows[0]}")
    found = Counter(form_of(row.values, fields, prompts) for row in good)
    known = [form for form in found if form is not None]
    if not known:
        seen = ", ".join(list(good[0].values)[:8]) or "none"
        wanted = "; ".join(f"{form}: {', '.join(names[:3])}" for form, names in FIELDS.items() if names)
        raise ValueError(
            f"{source.source}: the rows have the keys {seen}, which are no form that is known here ({wanted}, or OASST messages); "
            "name the form in data.form and the keys in data.fields, for example "
            "data.form=prompt data.fields='{prompt: question, completion: answer}'"
        )
    if len(known) > 1:
        counts = " and ".join(f"{found[form]} of form {form}" for form in known)
        raise ValueError(f"{source.source}: the first rows are {counts}; set data.form to one of them, or make two files and data.sets")
    return known[0]


def conversation_of(row: Row, form: Form, source: Source, prompts: bool = False) -> Conversation | BadRow:
    """What a row says, in turns, or why it cannot be used. `prompts`: it may end on a turn of the user or of a tool,
    behind which an empty answer is put.

    The key is the row's place, so that it leads back to it. The group is a hash of the first question (of a plain text: of what stands
    in front of the first thing learnt; without any, of everything), so that several answers to one prompt, or one chat written out
    turn by turn, stay on one side of a split.
    """
    rejected = None
    try:
        get = _Values(row.values, dict(source.fields))
        if form == "text":
            turns = _text_turns(get.needed("text"), source)
        elif form == "pairs":
            turns, rejected = _pair(get, _Reading(source, prompts))
            rejected = None if prompts else rejected
        else:
            turns = _READERS[form](get, _Reading(source, prompts))
            turns = (*turns, Turn("assistant", "")) if prompts and turns[-1].role in ("user", "tool") else turns
    except _Bad as bad:
        return BadRow(row.place, bad.reason, bad.key, shown(bad.value) if bad.key else "")
    if sum(len(t.content) for t in turns) + len(rejected or "") > LONGEST:
        return BadRow(row.place, f"more than {LONGEST:,} characters; cut it into rows", turns[0].role, shown(turns[0].content[:100]))
    first = next((t.content for t in turns if t.role == "user"), None) if form != "text" else _text_question(turns, source)
    key = f"{row.place.file}:{row.place.number}"
    return Conversation(key=key, ids=(key,), group=_group(first or "".join(t.content for t in turns)), turns=turns, rejected=rejected)


def _group(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Values:
    """A row, by the names of its form."""

    values: dict[str, Any]
    fields: dict[str, str]

    def __call__(self, name: str) -> Any:
        return self.values.get(self.fields.get(name, name))

    def needed(self, name: str) -> Any:
        key = self.fields.get(name, name)
        if key not in self.values:
            raise _Bad(f"the key {name} is missing", "keys", list(self.values))
        return self.values[key]


# --- chats


@dataclass(frozen=True)
class _Reading:
    """How messages are read: one data set's names and rules."""

    source: Source
    prompts: bool = False
    """May a row be a prompt without an answer?"""

    def turns(self, messages: Any, key: str, names: tuple[str, str], context: bool = False, may_be_text: bool = False) -> list[Turn]:
        """Messages as turns; `names` are the keys of role and content. `context`: nothing of it is learnt. `may_be_text`: so says the
        error, to whom a text would have been as good.
        """
        fields, roles = dict(self.source.fields), ROLES | dict(self.source.roles)
        role_key, content_key = (fields.get(name, name) for name in names)
        if not isinstance(messages, list):
            raise _Bad("no text and no list of messages" if may_be_text else "no list of messages", key, messages)
        turns = []
        for message in messages:
            if not isinstance(message, dict):
                raise _Bad("a message is no object", key, message)
            if role_key not in message and "role" in message:  # both spellings are common under both names
                role_key, content_key = "role", "content"
            elif role_key not in message and "from" in message:
                role_key, content_key = "from", "value"
            said = message.get(role_key)
            role = roles.get(said if said in self.source_roles else said.lower()) if isinstance(said, str) else None
            if role is None:
                raise _Bad("unknown role (see data.roles)", role_key, said)
            content = self.content(message.get(content_key), content_key, optional=bool(message.get("tool_calls")))
            if role in ("tool", CALL) or message.get("tool_calls"):
                if self.source.tool_turns == "skip":
                    raise _Bad("tools are called (data.tool_turns: skip)", role_key, said)
                if self.source.tool_turns == "drop":
                    if role in ("tool", CALL) or not content.strip():
                        continue
                elif message.get("tool_calls"):
                    raise _Bad("structured tool calls; write them as text", "tool_calls", message["tool_calls"])
                role = "assistant" if role == CALL else role
            learn = role == "assistant" and not context and self.learnt(message)
            turns.append(Turn(role, content, learn=learn or role != "assistant"))
        return turns

    @property
    def source_roles(self) -> set[str]:
        return {name for name, _ in self.source.roles}

    def content(self, content: Any, key: str, optional: bool = False) -> str:
        """Text, or a list of text parts. `optional`: nothing is as good as an empty text."""
        if isinstance(content, str):
            return content
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                    raise _Bad("a content part is not text", key, part.get("type", part) if isinstance(part, dict) else part)
            return "".join(part["text"] for part in content)
        if content is None and optional:
            return ""
        raise _Bad("content is not text", key, content)

    def is_no_answer(self, value: Any) -> bool:
        """Nothing, where nothing is needed."""
        return self.prompts and (value is None or value == [] or (isinstance(value, str) and not value.strip()))

    def learnt(self, message: dict[str, Any]) -> bool:
        fields = dict(self.source.fields)
        for name in ("weight", "train"):
            key = fields.get(name, name)
            if (value := message.get(key)) is not None:  # a table gives every message every key
                if value not in (0, 1):  # true and false are 1 and 0
                    raise _Bad(f"{name} is neither 0 nor 1", key, value)
                return bool(value)
        return True

    def finished(self, turns: Iterable[Turn], system: Any) -> tuple[Turn, ...]:
        """Without empty system turns, with the system column in front, and with turns of one role joined by the rule."""
        if system is not None:
            turns = [Turn("system", self.content(system, "system")), *turns]
        turns = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
        for turn in turns:
            if not turn.content.strip():
                raise _Bad("empty", turn.role, turn.content)
        if not turns:
            raise _Bad("empty")
        return tuple(self.joined(turns))

    def joined(self, turns: Sequence[Turn]) -> list[Turn]:
        kept: list[Turn] = []
        for turn in turns:
            if not kept or kept[-1].role != turn.role or turn.role == "tool" or self.source.same_role == "keep":
                kept.append(turn)
            elif self.source.same_role == "skip":
                raise _Bad("two turns of one role (data.same_role: skip)", turn.role, turn.content)
            elif kept[-1].learn != turn.learn:
                raise _Bad("two answers behind each other, one of them not to be learnt", turn.role, turn.content)
            else:
                kept[-1] = replace(turn, content=f"{kept[-1].content}\n\n{turn.content}")
        return kept


def _messages(get: _Values, reading: _Reading) -> tuple[Turn, ...]:
    return reading.finished(reading.turns(get.needed("messages"), "messages", ("role", "content")), get("system"))


def _sharegpt(get: _Values, reading: _Reading) -> tuple[Turn, ...]:
    return reading.finished(reading.turns(get.needed("conversations"), "conversations", ("from", "value")), get("system"))


def _alpaca(get: _Values, reading: _Reading) -> tuple[Turn, ...]:
    """The input stands below the instruction, behind a blank line."""
    turns, history = [], get("history") or []
    if not isinstance(history, list | tuple):
        raise _Bad("history is no list of pairs", "history", history)
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Bad("history holds something else than a pair", "history", pair)
        turns += [Turn("user", reading.content(pair[0], "history")), Turn("assistant", reading.content(pair[1], "history"))]
    instruction, extra = reading.content(get.needed("instruction"), "instruction"), get("input")
    if extra is not None and (text := reading.content(extra, "input")).strip():
        instruction = f"{instruction}\n\n{text}" if instruction.strip() else text
    turns.append(Turn("user", instruction))
    if not reading.is_no_answer(output := get.needed("output")):
        turns.append(Turn("assistant", reading.content(output, "output")))
    return reading.finished(turns, get("system"))


def _prompt(get: _Values, reading: _Reading) -> tuple[Turn, ...]:
    """A text each, or messages each; what the prompt holds is context."""
    prompt, completion = get.needed("prompt"), get("completion")
    if completion is None:
        completion = get("response")
    names = ("role", "content")
    before = [Turn("user", prompt)] if isinstance(prompt, str) else reading.turns(prompt, "prompt", names, context=True, may_be_text=True)
    if reading.is_no_answer(completion):
        after = []
    elif isinstance(completion, str):
        after = [Turn("assistant", completion)]
    else:
        after = reading.turns(completion, "completion", names, may_be_text=True)
    return reading.finished([*before, *after], get("system"))


_READERS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt": _prompt}


# --- pairs


def _pair(get: _Values, reading: _Reading) -> tuple[tuple[Turn, ...], str]:
    """The chosen conversation, of which the last turn alone is learnt, and the rejected answer."""
    chosen, rejected = (_answered(get, name, reading) for name in ("chosen", "rejected"))
    *context, answer = chosen
    *other_context, other = rejected
    if [(t.role, t.content) for t in context] != [(t.role, t.content) for t in other_context]:
        raise _Bad("chosen and rejected differ before their last turn", "rejected", get("rejected"))
    if not any(turn.role == "user" for turn in context):
        raise _Bad("no prompt in front of the answers", "prompt", get("prompt"))
    if answer.content.strip() == other.content.strip() and not reading.prompts:  # which of them is better is not asked there
        raise _Bad("chosen and rejected are the same answer", "chosen", answer.content)
    return (*(replace(turn, learn=turn.role != "assistant") for turn in context), answer), other.content


def _answered(get: _Values, name: str, reading: _Reading) -> tuple[Turn, ...]:
    """The prompt and one of the two answers: a text, its message alone, or a conversation that repeats the prompt."""
    prompt, answer, names = get("prompt"), get.needed(name), ("role", "content")
    before = [Turn("user", prompt)] if isinstance(prompt, str) else []
    if prompt is not None and not before:
        before = reading.turns(prompt, "prompt", names, context=True, may_be_text=True)
    after = [Turn("assistant", answer)] if isinstance(answer, str) else reading.turns(answer, name, names, may_be_text=True)
    for key, value in (("prompt", prompt), (name, after[-1].content if after else None)):
        if isinstance(value, str) and not value.strip():
            raise _Bad("empty", key, value)
    if len(after) > 1:
        said, asked = ([(t.role, t.content.strip()) for t in turns] for turns in (after[:-1], before))
        if not any(said[i : i + len(asked)] == asked for i in range(len(said) - len(asked) + 1)):
            raise _Bad(f"{name} is a conversation that does not repeat the prompt", name, answer)
        before = []
    turns = reading.finished([*before, *after], get("system"))
    if turns[-1].role != "assistant" or not after:
        raise _Bad(f"{name} does not end on an answer", name, answer)
    if not turns[-1].learn:
        raise _Bad(f"{name} is an answer that is not to be learnt", name, answer)
    return turns


# --- plain text


def _text_question(turns: Sequence[Turn], source: Source) -> str | None:
    """What stands in front of the first learnt part, without the marker. None if that is nothing."""
    first = turns[0].content if turns[0].role == "user" else ""
    marker = max((m for m in source.learn_after if first.endswith(m)), key=len, default="")
    return first.removesuffix(marker).strip() or None


def _text_turns(text: Any, source: Source) -> tuple[Turn, ...]:
    """The text in pieces: `assistant` is learnt, `user` is context, and together they are the text. With learn_after [A:], learn_until [Q:]

    Q: hi A: hello Q: and you? A: fine      ->      user "Q: hi A:"   assistant " hello "   user "Q: and you? A:"   assistant " fine"
    """
    if not isinstance(text, str):
        raise _Bad("no text", "text", text)
    if not text.strip():
        raise _Bad("empty", "text", text)
    if not source.learn_after:
        return (Turn("assistant", text),)
    longest_first = sorted((*source.learn_after, *source.learn_until), key=len, reverse=True)
    turns: list[Turn] = []
    start, learn = 0, False

    def take(end: int) -> None:
        nonlocal start
        if end > start:
            if turns and not learn and turns[-1].role == "user":
                turns[-1] = Turn("user", turns[-1].content + text[start:end])
            else:
                turns.append(Turn("assistant" if learn else "user", text[start:end]))
        start = end

    for match in re.finditer("|".join(map(re.escape, longest_first)), text):
        take(match.start())
        learn = False  # the marker itself is context
        take(match.end())
        learn = match[0] in source.learn_after
    take(len(text))
    if not any(turn.role == "assistant" for turn in turns):
        raise _Bad("nothing stands behind a marker of data.learn_after", "text", text)
    return tuple(turns)
