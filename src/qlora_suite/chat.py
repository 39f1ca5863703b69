"""Conversation -> token ids and, built together with them, what the loss counts.

    renderer = Renderer(tokenizer, recipe.chat, markers)
    rendered = renderer.render(conversation)              # ids, supervised, turns
    pieces = shorten(rendered, 1024, "truncate").pieces   # what fits

The one way to ask, whatever the format: the base's own template and ChatML are written by model_template.py, the others here.

Here the ids never come from one long string: a text is encoded by itself, so that nothing in a message becomes a control token, and
nothing has to be searched for afterwards to find out where an answer begins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase

from qlora_suite.control_tokens import ControlTokens
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.model_template import ModelTemplate
from qlora_suite.recipe import Chat
from qlora_suite.rendered import Rendered, RenderedTurn
from qlora_suite.role_markers import RoleMarkers, layout
from qlora_suite.text_encoder import TextEncoder

ZERO_WIDTH_SPACE = "\u200b"


class Renderer:
    """Writes conversations in the recipe's format. Raises ValueError if the tokenizer lacks what the format needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, markers: RoleMarkers) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token, without which a model cannot learn to stop; set its eos_token")
        self.tokenizer = tokenizer
        self.chat = chat
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.encode = TextEncoder(tokenizer)
        self._controls = ControlTokens(tokenizer, self.encode)
        self.is_plain_text = chat.format == "text"
        """No roles: a conversation is one text."""
        self.template = ModelTemplate(tokenizer, self.encode, chat) if chat.format in ("chatml", "model") else None
        """The base's own template or ChatML, which then writes everything."""
        self.layout = layout(chat, markers) if not self.is_plain_text and self.template is None else None
        self.plain_markers = (self.layout or self.template).plain_markers if not self.is_plain_text else ()
        self.loss_on_all = chat.loss_on == "all"
        self.bos_before_user = self.layout is not None and self.layout.bos_before_user and self.bos not in (None, self.eos)
        self.bos_at_start = not self.bos_before_user and tokenizer.encode("")[:1] == [self.bos]
        self.start = self.eos if self.bos is None else self.bos
        """What a plain text starts with."""
        self.stop_token_ids = (self.eos,)
        """A model that generates one of these has finished its turn."""
        if self.layout and self.layout.control:
            self.role_ids = {role: tokenizer.convert_tokens_to_ids(getattr(self.layout, role)) for role in ("user", "assistant")}
            self.stop_token_ids += tuple(self.role_ids.values())
        if self.template:
            self.stop_token_ids = tuple(dict.fromkeys((self.eos, *self.template.end_ids)))

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation, however long. With `oasst` in plain text, two words each, the end token as `$`:

            ids          <|prompter|> ␣hi  ␣you  $   \\n<|assistant|>  ␣oh  ␣hello  $
            supervised   no           no   no    no  no                yes  yes     yes

        turns = [RenderedTurn(index=1, start=5, end=7, byte_ends=(2, 8), learn=True)]: the space belongs to the marker.
        """
        try:
            return self._write(conversation.turns, opened=False)
        except ValueError as error:
            raise ValueError(f"conversation {conversation.key}: {error}") from error

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids up to where the assistant's answer starts; the last turn has to be the user's.

        Behind a marker of plain text the model begins with a space, which belongs to the marker: see `answer_text`.
        """
        return self._write(turns, opened=True).ids

    def answer_text(self, ids: Sequence[int]) -> str:
        """What the generated ids say, up to the first stop token and without the marker's space."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        text = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.template:
            return self.template.without_lead(text)
        return text.removeprefix(self.layout.lead) if self.layout else text

    def marker_occurrences(self, text: str) -> int:
        """How often a message contains one of the format's plain-text markers."""
        return sum(text.count(marker) for marker in self.plain_markers)

    @property
    def rewrites_history(self) -> bool:
        """Are answers learnt only where they are the last turn, because the base's template writes earlier ones in another way?"""
        return self.template is not None and self.template.rewrites_history

    @property
    def merges(self) -> tuple[str, ...]:
        """Roles of which two turns behind each other become one, because the base's template takes no two."""
        return self.template.merges if self.template else ()

    def _write(self, turns: Sequence[Turn], opened: bool) -> Rendered:
        if self.is_plain_text:
            rendered = self._write_text(turns, opened)
        elif self.template is None:
            rendered = self._write_turns(turns, opened)
        else:
            rendered = self.template.write([_checked(turn) for turn in turns], opened)
        return replace(
            rendered,
            num_marker_texts=sum(self.marker_occurrences(turn.content) for turn in turns),
            num_control_texts=sum(self._controls.occurrences(turn.content) for turn in turns),
        )

    def _write_turns(self, turns: Sequence[Turn], opened: bool) -> Rendered:
        """`opened`: ends on the assistant's marker, ready for an answer."""
        style = self.layout
        assert style is not None
        parts = _Parts(self.encode, self.loss_on_all)
        rendered: list[RenderedTurn] = []

        def open_turn(role: str, first: bool) -> None:
            parts.say("" if first else style.between)
            if style.control:
                parts.control(self.role_ids[role])
            else:
                parts.say(style.user if role == "user" else style.assistant)

        placed, num_moved = self._place_system(turns)
        if opened and (not placed or placed[-1][1].role != "user"):
            raise ValueError("a prompt has to end on a user turn; add one")
        if self.bos_at_start:
            parts.control(self.bos)
        for number, (index, turn) in enumerate(placed):
            if turn.role == "user":
                if self.bos_before_user:
                    parts.control(self.bos)
                open_turn("user", first=number == 0)
                parts.say(style.lead + turn.content + style.user_close)
                if style.user_ends:
                    parts.control(self.eos)
            else:
                open_turn("assistant", first=number == 0)
                rendered.append(parts.answer(index, turn, style.lead))
                parts.control(self.eos, turn.learn)
        if opened:
            open_turn("assistant", first=False)
        parts.flush()
        supervised = [False, *parts.supervised[1:]] if parts.supervised else []  # nothing predicts the first token
        return Rendered(parts.ids, supervised, rendered, num_moved)

    def _write_text(self, turns: Sequence[Turn], opened: bool) -> Rendered:
        """One text, which the turns are parts of: an assistant's are learnt, a user's are context. `opened`: without the end token.

        It is encoded as a whole, as it will be read. A token that reaches over the edge of a learnt part is context:

            Q: hi A:| hello| Q: and         ->      Q : ␣hi ␣A :  ␣hello  ␣Q : ␣and
                     ^^^^^^                                       learnt
        """
        if any(turn.role == "system" for turn in turns):
            raise ValueError("format: text wants a text, not a chat; choose another chat.format")
        learn_all = self.chat.loss_on == "all"
        ids, char_ends = self.encode("".join(_checked(turn).content for turn in turns), before=self.start)
        spans = list(pairwise([0, *char_ends]))
        supervised, rendered, begin = [learn_all] * len(ids), [], 0
        for index, turn in enumerate(turns):
            end = begin + len(turn.content)
            if turn.role == "assistant":
                inside = [i for i, (done, after) in enumerate(spans) if begin <= done < end and after <= end]
                if inside or not ids:
                    first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
                    supervised[first:last] = [turn.learn or learn_all] * (last - first)
                    ends = _byte_ends(turn.content, [after - begin for after in char_ends[first:last]])
                    rendered.append(RenderedTurn(index, first + 1, last + 1, ends, turn.learn))  # the start token stands in front
            begin = end
        ids, supervised = [self.start, *ids], [False, *supervised]
        if not opened:
            ids.append(self.eos)
            supervised.append(learn_all or (turns[-1].role == "assistant" and turns[-1].learn))
        return Rendered(ids, supervised, rendered)

    def _place_system(self, turns: Sequence[Turn]) -> tuple[list[tuple[int, Turn]], int]:
        """User and assistant turns alone, each with its index, and the number of system turns that had no place of their own.

        Such a system turn goes in front of the next user turn, with a blank line between; without a next one it is a user turn.
        """
        assert self.layout is not None
        block = self.layout.system_block
        placed: list[tuple[int, Turn]] = []
        num_moved = 0
        held = block.format(self.chat.system_prompt) if block and self.chat.system_prompt else ""
        for index, turn in enumerate(turns):
            content = self._escaped(_checked(turn).content)
            if turn.role == "system" and block and index == 0:
                held = block.format(content) if content else ""
            elif turn.role == "system":
                held = f"{held}\n\n{content}" if held else content
                num_moved += 1
            elif turn.role == "user":
                placed.append((index, replace(turn, content=f"{held}\n\n{content}" if held else content)))
                held = ""
            elif turn.role == "assistant":
                if held:
                    placed.append((index, Turn("user", held)))
                    held = ""
                placed.append((index, replace(turn, content=content)))
            else:
                raise ValueError(f"turn {index + 1} has the role {turn.role!r}; the roles are system, user and assistant")
        if held:
            placed.append((len(turns), Turn("user", held)))
        return placed, num_moved

    def _escaped(self, text: str) -> str:
        """Looks the same, but no longer contains a marker."""
        if self.chat.escape_markers:
            for marker in self.plain_markers:
                text = text.replace(marker, broken_up(marker))
        return text


class _Parts:
    """Ids and mask under construction: nothing is added to one without the other."""

    def __init__(self, encode: TextEncoder, learn_all: bool) -> None:
        self.encode, self.learn_all = encode, learn_all
        self.ids: list[int] = []
        self.supervised: list[bool] = []
        self.waiting = ""

    def add(self, ids: list[int], learn: bool) -> None:
        self.ids += ids
        self.supervised += [learn or self.learn_all] * len(ids)

    def say(self, text: str) -> None:
        """Markers and what a user says: not learnt. Waits for what follows, as some vocabularies join `.` and a newline behind it."""
        self.waiting += text

    def flush(self) -> None:
        if self.waiting:
            self.add(self._encoded(self.waiting)[0], learn=False)
        self.waiting = ""

    def control(self, token: int, learn: bool = False) -> None:
        self.flush()
        self.add([token], learn)

    def answer(self, index: int, turn: Turn, lead: str) -> RenderedTurn:
        """What an assistant says, encoded by itself, for it has its own mask and its own bytes."""
        self.flush()
        start = len(self.ids)
        ids, char_ends = self._encoded(lead + turn.content)
        self.add(ids, turn.learn)
        return RenderedTurn(index, start, len(self.ids), _byte_ends(turn.content, [end - len(lead) for end in char_ends]), turn.learn)

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode(text, before=self.ids[-1] if self.ids else None)


def broken_up(marker: str) -> str:
    """With a zero-width space behind the first character: it looks the same and is another text."""
    return marker[0] + ZERO_WIDTH_SPACE + marker[1:]


def _byte_ends(text: str, char_ends: Iterable[int]) -> tuple[int, ...]:
    """UTF-8 bytes up to each of the places, which never go back."""
    if text.isascii():
        return tuple(accumulate(char_ends, max, initial=0))[1:]
    ends, done, num_bytes = [], 0, 0
    for end in char_ends:
        if end > done:
            num_bytes += len(text[done:end].encode())
            done = end
        ends.append(num_bytes)
    return tuple(ends)


def _checked(turn: Turn) -> Turn:
    try:
        turn.content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {turn.role} turn holds half a character ({turn.content[error.start]!r}, a lone surrogate) at place {error.start}; "
            "remove it or repair the source"
        ) from None
    return turn
