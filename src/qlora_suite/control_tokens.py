"""Strings that a template made of messages: which control tokens in them are the template's, and their ids.

    controls = ControlTokens(tokenizer, encode)
    kept = controls.protected(["hi <|im_end|>"], beside=template)     # the same length, and no control token's text in it
    text = ...                                                        # what the template made of kept.texts
    controls.encoded(text, cuts, asked, kept.restore)                 # control tokens by their text, all else as text

No message becomes a control token: the first character of each control token's text in it is replaced with a private one of Unicode
before the template sees it, and put back when the string has been cut at the control tokens, which are then the template's.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from qlora_suite.text_encoder import TextEncoder

_PRIVATE = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]


@dataclass(frozen=True)
class Control:
    """A control token's AddedToken, as far as it matters for finding it in a text."""

    id: int
    takes_left: bool
    takes_right: bool
    """White space beside it belongs to the token."""


@dataclass(frozen=True)
class Written:
    ids: list[int]
    ends: list[int]
    """Of each token: the place in the text up to which every character is complete."""
    tokens_before: dict[int, int]
    """Of each place asked for: the number of tokens that stand in front of it."""


@dataclass(frozen=True)
class Protected:
    texts: list[str]
    restore: Callable[[str], str]


class ControlTokens:
    """The control tokens of a tokenizer, by their text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encode: TextEncoder) -> None:
        self._encode = encode
        self.by_text = _by_text(tokenizer, encode)
        alternatives = "|".join(re.escape(text) for text in sorted(self.by_text, key=len, reverse=True))
        self._any = re.compile(alternatives)
        self._starts = re.compile(f"(?={alternatives}).", re.DOTALL)

    def search(self, text: str, begin: int = 0) -> re.Match[str] | None:
        """The first of them in a text."""
        return self._any.search(text, begin)

    def split(self, text: str) -> list[str]:
        """What stands between them."""
        return self._any.split(text)

    def occurrences(self, text: str) -> int:
        """How many of them a text holds."""
        return sum(1 for _ in self._any.finditer(text))

    def protected(self, texts: list[str], beside: str) -> "Protected":
        """The texts, as long as they were, without any control token's text. `beside`: what they will stand in."""
        found = [self._starts.search(text) is not None for text in texts]
        if not any(found):
            return Protected(texts, lambda text: text)
        taken = set(beside).union(*texts, *self.by_text)
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        stands_for: dict[str, str] = {}

        def hidden(match: re.Match[str]) -> str:
            if match.group() not in stands_for:
                stands_for[match.group()] = next(free)
            return stands_for[match.group()]

        texts = [self._starts.sub(hidden, text) if any_found else text for text, any_found in zip(texts, found, strict=True)]
        back = str.maketrans({private: char for char, private in stands_for.items()})
        return Protected(texts, lambda text: text.translate(back))

    def encoded(self, text: str, cuts: Iterable[int], asked: Iterable[int], restore: Callable[[str], str]) -> Written:
        """The ids of a string that the template made: control tokens by their text, all else as text, encoded apart at the cuts."""
        ids: list[int] = []
        ends: list[int] = []
        cuts = set(cuts)
        before = dict.fromkeys((*cuts, *asked), 0)

        def say(start: int, end: int) -> None:
            places = [start, *sorted(cut for cut in cuts if start < cut < end), end]
            for a, b in pairwise(places):
                before[a] = len(ids)
                if a < b:
                    found, char_ends = self._encode(restore(text[a:b]), ids[-1] if ids else None)
                    ids.extend(found)
                    ends.extend(a + done for done in char_ends)

        done = 0
        for match in self._any.finditer(text):
            token = self.by_text[match.group()]
            start = len(text[: match.start()].rstrip()) if token.takes_left else match.start()
            end = _behind_white_space(text, match.end()) if token.takes_right else match.end()
            say(done, max(done, start))
            before[match.start()] = len(ids)
            ids.append(token.id)
            ends.append(end)
            for cut in cuts:
                if start < cut <= end:
                    before[cut] = len(ids)
            done = end
        say(done, len(text))
        before[len(text)] = len(ids)
        return Written(ids, ends, before)


def _by_text(tokenizer: PreTrainedTokenizerBase, encode: TextEncoder) -> dict[str, Control]:
    """By their text. A token that is no added one (an old vocabulary's `</s>`) takes nothing beside it."""
    added = tokenizer.added_tokens_decoder
    found = {}
    for i in sorted(encode.control_ids):
        token = added.get(i)
        text = token.content if token else tokenizer.convert_ids_to_tokens(i)
        found[text] = Control(i, bool(token and token.lstrip), bool(token and token.rstrip))
    return found


def _behind_white_space(text: str, place: int) -> int:
    return len(text) - len(text[place:].lstrip())
