"""Text -> token ids, never a control token, as if the text stood at its place inside a longer one."""

from itertools import pairwise

from transformers import PreTrainedTokenizerBase

SHORT, MOST_KNOWN = 16, 1000
"""Characters of a text whose ids are kept, and how many are: what a format writes between all turns is encoded once."""


class TextEncoder:
    """Raises ValueError for a tokenizer that tells no character offsets, or makes a control token of a message."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} tells no character offsets; use a base with a tokenizer.json")
        self.tokenizer = tokenizer
        self._known: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        self.control_ids = frozenset(special - {tokenizer.unk_token_id} | ends - {None})  # a text may well be unknown
        # SentencePiece vocabularies put a space in front of every text, or only of the first. Where it must not be, the text is
        # encoded behind an anchor whose ids are cut off again: a character that joins with nothing.
        self._anchor = "\0"
        self._anchor_ids = self._encode(self._anchor)[0]
        alone = self._encode("a")[0]
        self._adds_space = self._encode(self._anchor + "a")[0] != [*self._anchor_ids, *alone]
        behind_control = tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False, split_special_tokens=False)[1:]
        self._adds_space_behind_control = self._adds_space and behind_control == alone

    def __call__(self, text: str, before: int | None) -> tuple[list[int], list[int]]:
        """The ids of `text` behind the token `before` (None: at the very start), and for each the number of characters complete."""
        alone = before is None or not self._adds_space or (before in self.control_ids and self._adds_space_behind_control)
        prefix, num_cut = ("", 0) if alone else (self._anchor, len(self._anchor_ids))
        ids, offsets = self._encode(prefix + text)
        if ids[:num_cut] != self._anchor_ids[:num_cut]:
            raise ValueError(f"the tokenizer joins {text[:40]!r} with the text before it; use a base with another tokenizer")
        control = self.control_ids.intersection(ids)
        if control:
            names = self.tokenizer.convert_ids_to_tokens(sorted(control))
            raise ValueError(f"the tokenizer makes {', '.join(names)} of the message text {text[:40]!r}; use a base with another tokenizer")
        ids, offsets, prefix_length = ids[num_cut:], offsets[num_cut:], len(prefix)
        # Bytes of one character may be spread over several tokens, all with this character's offsets: only the last completes it.
        ends = [min(end, start) - prefix_length for (_, end), (start, _) in pairwise(offsets)]
        return ids, [*ends, len(text)] if ids else []

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if (known := self._known.get(text)) is not None:
            return known
        rust = self.tokenizer.backend_tokenizer
        if rust.truncation is None and rust.padding is None:
            rust.encode_special_tokens = True  # every call of the tokenizer sets it anew, and each costs twice what a short text does
            encoding = rust.encode(text, add_special_tokens=False)
            found = encoding.ids, encoding.offsets
        else:
            encoded = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, truncation=False, verbose=False
            )
            found = encoded["input_ids"], encoded["offset_mapping"]
        if len(text) <= SHORT and len(self._known) < MOST_KNOWN:
            self._known[text] = found
        return found
