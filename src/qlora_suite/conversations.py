"""What every source of data becomes before it is tokenised: a conversation of turns."""

from dataclasses import dataclass, replace

LONGEST = 4_000_000
"""Characters of a conversation, some million tokens (a long novel has three million): tokenising takes 250 bytes of memory for each."""


@dataclass(frozen=True)
class Turn:
    role: str
    """`system`, `user` or `assistant`."""
    content: str
    learn: bool = True
    """Assistant turns: does the loss count this one? False where another conversation teaches it already."""


@dataclass(frozen=True)
class Conversation:
    key: str
    """Names the conversation in `--ids` files and reports."""
    ids: tuple[str, ...]
    """The source's message ids that it was made of."""
    group: str
    """The tree it comes from: splits are cut, and intervals resampled, by this."""
    turns: tuple[Turn, ...]
    language: str | None = None
    rejected: str | None = None
    """Of a pair: the other answer to the same turns, worse than the last turn, which alone is learnt."""
    rejected_outranks: bool = False
    """Of a pair: did people rank the rejected answer higher? (conciseness_pairs)"""

    @property
    def is_prompt(self) -> bool:
        """Has it no last answer, but the place for one, as an empty turn? (GRPO)"""
        return self.turns[-1].role == "assistant" and not self.turns[-1].content

    def without_open_end(self) -> "Conversation | None":
        """Ends on an assistant turn: user turns after the last one have no answer to learn. None if nothing is left."""
        last = max((i for i, turn in enumerate(self.turns) if turn.role == "assistant"), default=-1)
        return replace(self, turns=self.turns[: last + 1]) if last >= 0 else None

    def chosen_and_rejected(self) -> "tuple[Conversation, Conversation]":
        """A pair as two conversations that differ in their last turn."""
        assert self.rejected is not None, "no pair"
        *context, answer = self.turns
        chosen = replace(self, rejected=None)
        return chosen, replace(chosen, turns=(*context, replace(answer, content=self.rejected)))

    def ending_at_each_answer(self) -> "list[Conversation]":
        """The conversation up to each learnt answer, with this answer alone learnt: all of them in the words of a last turn."""
        found = []
        for place, turn in enumerate(self.turns):
            if turn.role == "assistant" and turn.learn:
                before = tuple(replace(t, learn=t.learn and t.role != "assistant") for t in self.turns[:place])
                found.append(replace(self, turns=(*before, turn)))
        return found
