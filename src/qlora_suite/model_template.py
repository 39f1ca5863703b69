"""The base's own Jinja chat template, or ChatML: a conversation -> exactly its ids, and which of them the model has to say.

    template = ModelTemplate(tokenizer, encode, chat)      # looks at the template by writing small conversations with it
    rendered = template.write(turns, opened=False)         # ids, supervised, turns

A template makes one long string and says nothing of where an answer begins. It begins behind what the same template writes as a
prompt, for the turns before it and the generation prompt; that is all a model is given when it has to answer:

    the conversation   <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n oh!<|im_end|> \\n
    as a prompt        <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n
    learnt             -                                                        +++++++++++++  -

The answer ends with the first control token behind its text. What stands between the prompt and the text (`<think>` of Qwen3) is
learnt too, for the model has to say it itself.

Where an earlier answer does not stand in the conversation as the model said it, the template rewrites history: a model that
learnt such an answer would learn what it never has to say. These answers are context, and the last one alone is learnt.

No message becomes a control token: see control_tokens.py.
"""

import contextlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_suite.control_tokens import ControlTokens
from qlora_suite.conversations import Turn
from qlora_suite.recipe import Chat
from qlora_suite.rendered import Rendered, RenderedTurn
from qlora_suite.template_source import BOUNDARY, arguments, chatml, fixed_date, is_chatml, placing
from qlora_suite.template_trial import trial
from qlora_suite.text_encoder import TextEncoder

WAYS_TO_FAIL = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""What a template raises, or what it does to the messages raises."""


def merged(turns: Iterable[tuple[int, Turn]], roles: Collection[str]) -> list[tuple[int, Turn]]:
    """Turns of one of these roles that follow each other as one, with a blank line between and the last one's index.

    Raises ValueError where one answer is to be learnt and the other is not.
    """
    kept: list[tuple[int, Turn]] = []
    for index, turn in turns:
        last = kept[-1][1] if kept else None
        if last is None or turn.role != last.role or turn.role not in roles:
            kept.append((index, turn))
            continue
        if turn.role == "assistant" and turn.learn != last.learn:
            raise ValueError(
                f"turns {kept[-1][0] + 1} and {index + 1} are answers behind each other, only one of them is to be learnt, and the base's "
                "chat template does not take them apart; set data.same_role: merge or skip"
            )
        kept[-1] = index, replace(turn, content=f"{last.content}\n\n{turn.content}")
    return kept


@dataclass(frozen=True)
class _Answer:
    """Places in the string that the template made; `content` <= `end` < `end_token`."""

    place: int
    """Of the turn among those that were given to the template."""
    begin: int | None
    """Where the prompt ends. None: it does not stand here as the model would have said it."""
    content: int
    end: int
    """Where the control token begins that ends the answer."""


class ModelTemplate:
    """Raises ValueError for a template that cannot be learnt from, with the reason."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encode: TextEncoder, chat: Chat) -> None:
        self.tokenizer, self.encode, self.chat = tokenizer, encode, chat
        self.chatml = is_chatml(tokenizer, chat)
        self.name = "ChatML" if self.chatml else "the base's chat template"
        self._controls = ControlTokens(tokenizer, encode)

        if chat.format == "chatml" or not tokenizer.chat_template:
            self._look_at(chatml(tokenizer))
            return
        text = tokenizer.get_chat_template()
        if complaint := trial(text):
            raise ValueError(f"{self.name} {complaint}; use another chat.format, or a base with another template")
        if BOUNDARY in text:  # saved by us: with the words of this very recipe in front, or of another one, which then belong to it
            with contextlib.suppress(ValueError):
                self._look_at(text.partition(BOUNDARY)[2])
                if self.source == text:
                    return
        self._look_at(text)

    def _look_at(self, own: str) -> None:
        head = fixed_date(own) + arguments(self.chat)
        self._source = head + BOUNDARY + own if head else own
        self._leads: list[str] = []
        """What the template writes between the prompt and an answer's text, as seen in a trial; the longest first."""
        self._header = ""
        """What it writes between a question and an earlier answer's text."""
        self.merges: tuple[str, ...] = ()
        """Roles of which it does not take two turns behind each other."""
        self.user_first = False
        """Does it not take a conversation that begins with an answer?"""
        self.system: Literal["anywhere", "first", "none"] = "anywhere"
        """Where it takes a system turn."""
        self.takes_tools = True
        self.rewrites_history = False
        """Is an earlier answer written in another way than a last one?"""
        self.end_ids: tuple[int, ...] = ()
        """What ends an answer."""
        self.plain_markers: tuple[str, ...] = ()
        """Texts in which the template changes roles without a control token, so that a message can imitate them."""
        self._try_out()
        if self.system == "none" or self.chat.system_prompt:
            # A served model needs it: the base's own template refuses a system turn, or does not know the recipe's. Otherwise it is
            # saved as it is.
            head += placing(self.system, self.merges, self.user_first, self.chat.system_prompt or "")
        self.source = head + BOUNDARY + own if head else own
        """For the tokenizer that is saved: applied by any program to a conversation as it is, it gives what `write` encodes."""

    # --- what the template can do

    def _try_out(self) -> None:
        u1, a1, u2, a2, s = ("\uf8f0" + name + "\uf8f0" for name in ("u", "a", "v", "b", "s"))  # neither letters alone nor likely
        self._find_leads(u1, a1, u2, a2)

        def holds(*turns: tuple[str, str]) -> bool:
            """Does it write all of this, and then the prompt in front of the last answer in the same way?"""
            given = [Turn(role, text) for role, text in turns]
            try:
                messages = self._messages(given)
                whole, prompt = self._apply(messages, False), self._apply(messages[:-1], True)
            except ValueError:
                return False
            places = [whole.find(turn.content) for turn in given]
            return -1 not in places and places == sorted(places) and whole.startswith(prompt)

        user, answer, user2, answer2 = ("user", u1), ("assistant", a1), ("user", u2), ("assistant", a2)
        pairs = {"user": (user, user2, answer), "assistant": (user, answer, answer2)}
        self.merges = tuple(role for role, pair in pairs.items() if not holds(*pair))
        self.takes_tools = holds(user, answer, ("tool", s), answer2)
        if not holds(("system", s), user, answer):
            self.system = "none"
        elif not holds(user, answer, ("system", s), user2, answer2):
            self.system = "first"
        self.user_first = not (holds(answer) and holds(answer, user, answer2) and (self.system == "none" or holds(("system", s), answer)))

    def _find_leads(self, u1: str, a1: str, u2: str, a2: str) -> None:
        """Two questions and two answers: are they all there, where do the answers begin and end, and is the first one rewritten?"""
        messages = self._messages([Turn("user", u1), Turn("assistant", a1), Turn("user", u2), Turn("assistant", a2)])
        text = self._apply(messages, False)
        places = [text.find(content) for content in (u1, a1, u2, a2)]
        if -1 in places or places != sorted(places):
            raise ValueError(f"{self.name} does not write every turn of a conversation in its order; {self._instead()}")
        ends = [self._controls.search(text, place) for place in places]
        if ends[3] is None or ends[1] is None or ends[1].start() > places[2]:
            raise ValueError(f"{self.name} writes no control token behind an answer, so a model could not learn to stop; {self._instead()}")
        self.end_ids = tuple(dict.fromkeys(self._controls.by_text[ends[i].group()].id for i in (3, 1)))
        leads = {}
        for place in (1, 3):
            prompt = self._apply(messages[:place], True)
            if text.startswith(prompt) and len(prompt) <= places[place]:
                leads[place] = text[len(prompt) : places[place]]
        if 3 not in leads:
            raise ValueError(
                f"{self.name} writes a last answer in another way than its own generation prompt begins; "
                f"{'set chat.template_arguments so that they agree, or ' if not self.chatml else ''}{self._instead()}"
            )
        self._leads = sorted({*leads.values()}, key=len, reverse=True)
        self._header = text[places[0] + len(u1) : places[1]]
        self.rewrites_history = 1 not in leads or not self._apply(messages[:2], False).startswith(text[: ends[1].end()])
        if self.rewrites_history and self.chat.rewritten_history == "refuse":
            raise ValueError(
                f"{self.name} writes an earlier answer in another way than the last one, and chat.rewritten_history is refuse; set "
                f"last_turn to learn each conversation's last answer, set chat.template_arguments, or {self._instead()}"
            )
        if not self._controls.search(self._header):
            opening = self._controls.split(text[: places[0]])[-1]
            self.plain_markers = tuple(dict.fromkeys(marker.strip() for marker in (opening, self._header) if marker.strip()))

    def _instead(self) -> str:
        return "use chat.format: oasst or human_assistant" + ("" if self.chatml else ", or chatml")

    # --- writing

    def placed(self, turns: Sequence[Turn]) -> tuple[list[tuple[int, Turn]], int]:
        """What is given to the template, each with its index, and the number of system turns that had no place of their own.

        Such a turn goes in front of the next user turn, with a blank line between; without a next one it is a user turn. Where the
        template takes no two turns of a role behind each other, they become one, and where it cannot begin with an answer, an empty
        user turn stands in front. Raises ValueError for turns that it has no place for.
        """
        prompt = self.chat.system_prompt
        given = list(enumerate(turns))
        if prompt and not any(turn.role == "system" for turn in turns):
            given.insert(0, (-1, Turn("system", prompt)))
        found: list[tuple[int, Turn]] = []
        num_moved, held = 0, ""
        for place, (index, turn) in enumerate(given):
            if turn.role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"turn {index + 1} has the role {turn.role!r}; the roles are system, user, assistant and tool")
            if turn.role == "tool" and not self.takes_tools:
                raise ValueError(f"{self.name} has no place for turn {index + 1}, a tool's; set data.tool_turns: skip or drop")
            if turn.role == "system" and not (self.system == "anywhere" or (self.system == "first" and place == 0)):
                held = f"{held}\n\n{turn.content}" if held else turn.content
                num_moved += 1
                continue
            if held and turn.role == "user":
                found.append((index, replace(turn, content=f"{held}\n\n{turn.content}")))
            else:
                found += [(index, Turn("user", held)), (index, turn)] if held else [(index, turn)]
            held = ""
        if held:
            found.append((len(turns), Turn("user", held)))
        first = next((place for place, (_, turn) in enumerate(found) if turn.role != "system"), None)
        if self.user_first and first is not None and found[first][1].role == "assistant":
            found.insert(first, (-1, Turn("user", "")))
        return merged(found, self.merges), num_moved

    def write(self, turns: Sequence[Turn], opened: bool) -> Rendered:
        """The whole conversation. `opened`: with the generation prompt behind it, ready for an answer.

        What is encoded apart is cut where an answer begins, so that a prompt's ids are the first ids of the conversation that goes on
        from it, as they are when the model is used. Raises ValueError if the template refuses the conversation.
        """
        given, num_moved = self.placed(turns)
        if opened and (not given or given[-1][1].role not in ("user", "tool")):
            raise ValueError("a prompt has to end on a user turn; add one")
        kept = self._controls.protected([turn.content for _, turn in given], beside=self._source)
        messages = self._messages([replace(turn, content=content) for (_, turn), content in zip(given, kept.texts, strict=True)])
        text = self._apply(messages, opened)
        answers = self._answers(text, messages, [turn.learn for _, turn in given])
        written = self._controls.encoded(text, [a.begin for a in answers if a.begin is not None], [a.end for a in answers], kept.restore)

        learn_all = self.chat.loss_on == "all"
        supervised = [learn_all] * len(written.ids)
        rendered = []
        for answer in answers:
            index, turn = given[answer.place]
            learn = turn.learn and answer.begin is not None
            end = written.tokens_before[answer.end]
            begin = 0 if answer.begin is None else written.tokens_before[answer.begin]
            start = _first_token(written.ends, begin, end, answer)
            if learn:
                supervised[begin : end + 1] = [True] * (end + 1 - begin)
            ends = _byte_ends(turn.content, text[answer.content : answer.end], [e - answer.content for e in written.ends[start:end]])
            rendered.append(RenderedTurn(index, start, end, ends, learn))
        rewritten = sum(answer.begin is None and given[answer.place][1].learn for answer in answers)
        return Rendered(written.ids, [False, *supervised[1:]] if supervised else [], rendered, num_moved, num_rewritten=rewritten)

    def without_lead(self, text: str) -> str:
        """A generated answer without what the template writes in front of one."""
        lead = next((lead for lead in self._leads if lead and text.startswith(lead)), "")
        return text.removeprefix(lead)

    def may_become_lead(self, text: str) -> bool:
        """Is this, the beginning of a generated answer, also the beginning of what the template writes in front of one?"""
        return any(lead != text and lead.startswith(text) for lead in self._leads)

    def _answers(self, text: str, messages: list[dict[str, str]], learn: list[bool]) -> list[_Answer]:
        """Where each answer stands. Raises ValueError if the last one does not stand behind its prompt, where it is to be learnt."""
        answers = []
        done = 0
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            is_last = place == len(messages) - 1
            prompt = self._apply(messages[:place], True)
            begin: int | None = len(prompt) if text.startswith(prompt) and len(prompt) >= done else None
            content = self._content(text, message["content"], done if begin is None else begin, exact=begin is not None)
            found = self._controls.search(text, content)
            if found is None:
                raise ValueError(f"{self.name} writes no control token behind turn {place + 1}, an answer; {self._instead()}")
            if begin is not None and not is_last and not self._apply(messages[: place + 1], False).startswith(text[: found.end()]):
                begin = None
            if begin is None and learn[place] and (is_last or self.chat.rewritten_history == "refuse"):
                raise ValueError(
                    f"{self.name} writes turn {place + 1}, {'the last' if is_last else 'an earlier'} answer, in another way than the model "
                    f"would have said it; {'drop this conversation, or ' if is_last else 'set chat.rewritten_history: last_turn, or '}"
                    f"{self._instead()}"
                )
            done = found.start()
            answers.append(_Answer(place, begin, content, done))
        return answers

    def _content(self, text: str, content: str, begin: int, exact: bool) -> int:
        """Where an answer's own text begins, which stands behind `begin`."""
        core = content.strip()
        if exact:
            for lead in self._leads:
                if text.startswith(lead, begin) and text.startswith((content, core), begin + len(lead)):
                    return begin + len(lead)
            return begin  # the template made something else of it, or it has a lead that the trial had not: all of it is the answer
        header = text.find(self._header, begin)
        begin = begin if header < 0 else header + len(self._header)
        return max(text.find(core, begin), begin)

    def _messages(self, turns: Iterable[Turn]) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.content} for turn in turns]

    def _apply(self, messages: list[dict[str, str]], prompt: bool) -> str:
        apply = self.tokenizer.apply_chat_template
        try:
            # As a batch of one, for a prompt of no message at all is none to apply_chat_template, but a start to some templates.
            return apply([messages], chat_template=self._source, tokenize=False, add_generation_prompt=prompt)[0]
        except WAYS_TO_FAIL as error:
            raise ValueError(f"{self.name} refuses the conversation: {(str(error) or repr(error)).splitlines()[0]}") from error


def _first_token(ends: list[int], begin: int, end: int, answer: _Answer) -> int:
    """The first token with a part of the answer's own text in it, in tokens begin:end."""
    if answer.content == answer.begin:
        return begin
    start = next((i for i in range(begin, end) if ends[i] >= answer.content), end)
    return start + 1 if start < end and ends[start] == answer.content else start


def _byte_ends(content: str, written: str, char_ends: list[int]) -> tuple[int, ...]:
    """UTF-8 bytes of the content up to each of the places in what the template wrote for it, which never go back.

    All of the content is behind the last: what the template trimmed is counted too, so that formats compare by the same bytes.
    """
    if not char_ends:
        return ()
    trimmed = 0 if written.startswith(content) else len(content) - len(content.lstrip())
    found, done, num_bytes = [], 0, 0
    for end in [*(trimmed + max(end, 0) for end in char_ends[:-1]), len(content)]:
        if end > done:
            num_bytes += len(content[done:end].encode())
            done = end
        found.append(num_bytes)
    return tuple(found)
