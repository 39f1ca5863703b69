"""A rendered conversation, ids and mask side by side, and what is left of it when it has to fit."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class RenderedTurn:
    index: int
    """Of the turn in the conversation."""
    start: int
    end: int
    """ids[start:end] is the content; ids[end] is the end token, unless it was cut off (then end == len(ids))."""
    byte_ends: tuple[int, ...]
    """UTF-8 bytes of the content that are complete after each of its end - start tokens."""
    learn: bool

    @property
    def num_bytes(self) -> int:
        return self.byte_ends[-1] if self.byte_ends else 0

    def cut(self, start: int, end: int, shift: int) -> "RenderedTurn":
        """The part between two places of the ids, which then stands `shift` places further to the left."""
        start, end = max(self.start, start), min(self.end, end)
        done = self.byte_ends[start - self.start - 1] if start > self.start else 0
        ends = tuple(b - done for b in self.byte_ends[start - self.start : end - self.start])
        return replace(self, start=start - shift, end=end - shift, byte_ends=ends)


@dataclass(frozen=True)
class Rendered:
    ids: list[int]
    supervised: list[bool]
    """The same length: does the loss count the prediction of this token? Never true for the first, which nothing predicts."""
    turns: list[RenderedTurn]
    """The assistant's."""
    num_system_moved: int = 0
    """System turns that went into the next user turn, because the format has no place for them."""
    num_marker_texts: int = 0
    """Texts in the messages that look like one of the format's plain-text markers."""
    num_control_texts: int = 0
    """Texts in the messages that look like a control token, and were encoded as text."""
    num_rewritten: int = 0
    """Answers that were to be learnt and are context, because the base's template writes them in another way than a last one."""

    @cached_property
    def num_supervised(self) -> int:
        return sum(self.supervised)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the learnt content."""
        return sum(turn.num_bytes for turn in self.turns if turn.learn)

    def first(self, length: int) -> "Rendered":
        """The first tokens alone."""
        turns = [turn.cut(0, length, 0) for turn in self.turns if turn.start < length]
        return replace(self, ids=self.ids[:length], supervised=self.supervised[:length], turns=turns)


@dataclass(frozen=True)
class Shortened:
    pieces: list[Rendered]
    """None where the conversation was dropped, several where a text was split. Each has a supervised token."""
    num_tokens_cut: int
    """Supervised tokens that stand in no piece."""
    num_bytes_cut: int
    """UTF-8 bytes of learnt content that stand in no piece."""


def shorten(rendered: Rendered, max_length: int, too_long: Literal["truncate", "drop", "split"]) -> Shortened:
    """What is left of a conversation when no piece may have more than `max_length` tokens.

    It is cut behind the last whole assistant turn that fits, if at least one of those kept is learnt. Otherwise `truncate` cuts
    inside a turn, which then has no end token, and `drop` keeps nothing. `split` (plain text) loses nothing; with `max_length` 4,
    the start token as `^` and the end token as `$`:

        ^ a b c d e f $    ->    ^ a b c  |  ^ d e f  |  ^ $
    """
    if too_long == "split":
        pieces = _split(rendered, max_length)
    elif len(rendered.ids) <= max_length:
        pieces = [rendered]
    else:
        whole = [turn for turn in rendered.turns if turn.end < min(max_length, len(rendered.ids))]
        if any(turn.learn for turn in whole):
            pieces = [rendered.first(whole[-1].end + 1)]
        else:
            pieces = [rendered.first(max_length)] if too_long == "truncate" else []
    pieces = [piece for piece in pieces if piece.num_supervised]
    return Shortened(
        pieces,
        rendered.num_supervised - sum(piece.num_supervised for piece in pieces),
        rendered.num_bytes - sum(piece.num_bytes for piece in pieces),
    )


def _split(rendered: Rendered, max_length: int) -> list[Rendered]:
    if max_length < 2:
        raise ValueError(f"data.max_length is {max_length}; a piece of a text needs 2, the start token and one more")
    pieces = []
    for start in range(1, len(rendered.ids), max_length - 1):
        end = min(start + max_length - 1, len(rendered.ids))
        # a part that ended where this piece begins has its end token here
        turns = [turn.cut(start, end, start - 1) for turn in rendered.turns if turn.start < end and turn.end >= start]
        pieces.append(
            replace(
                rendered, ids=[rendered.ids[0], *rendered.ids[start:end]], supervised=[False, *rendered.supervised[start:end]], turns=turns
            )
        )
    return pieces
