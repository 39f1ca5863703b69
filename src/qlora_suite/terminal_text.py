"""What a model says, fit for a terminal: control characters are shown instead of obeyed."""

import unicodedata


def printable(text: str) -> str:
    """Newlines and tabs stay; of the rest, escape sequences that would move the cursor, recolour or retitle a terminal are seen.

    A bell is shown as its picture in U+2400 and following, everything else as U+FFFD.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") or c in _JOINERS else _picture(c) for c in text)


_JOINERS = "\u200b\u200c\u200d\ufeff\u00ad"
"""Format characters that writing and emoji need, and that move nothing. Those that turn the direction of a line are not among them."""


def _picture(character: str) -> str:
    return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "\ufffd"
