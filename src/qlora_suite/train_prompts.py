"""Prompts to sample answers to: the prepared rows, each cut before its last learnt answer.

    ids          <|prompter|> hi  $  <|assistant|> oh  $  <|prompter|> and  $  <|assistant|> well  $
    supervised   -            -   -  -             -   -  -            -    -  -             +     +
    prompt       ++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++

A row holds what `Renderer.prompt` gives for the turns before the answer, so that nothing has to be rendered again. Several rows with
one prompt (the replies of one OASST message) are one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_suite.dataset import Rows


@dataclass(frozen=True)
class Prompts(Sequence[list[int]]):
    """Distinct prompts, in the order of the rows; read from the disk when they are asked for."""

    rows: Rows
    places: list[tuple[int, int]]
    """(row, tokens of its prompt)"""
    num_asked_before: int
    """Rows whose prompt another row had."""
    num_too_long: int

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> list[int]:
        row, length = self.places[number]
        return self.rows[row]["input_ids"][:length].tolist()

    @property
    def lengths(self) -> list[int]:
        return [length for _, length in self.places]

    def __str__(self) -> str:
        left_out = {"the same as another": self.num_asked_before, "too long": self.num_too_long}
        return f"{len(self):,} of {len(self.rows):,} rows" + "".join(f", {count:,} {why}" for why, count in left_out.items() if count)


def prompt_length(row: dict[str, Any]) -> int:
    """Where the last learnt answer of an unpacked row begins. The first token is never learnt."""
    supervised = row["supervised"]
    last = np.flatnonzero(supervised)[-1]
    return int(np.flatnonzero(~supervised[:last])[-1]) + 1


def read_prompts(rows: Rows, longest: int) -> Prompts:
    """Those of at most `longest` tokens. Reads every row, 10,000 in 2 s. Raises ValueError if none is left."""
    places, known, too_long = [], set(), 0
    for number in range(len(rows)):
        row = rows[number]
        length = prompt_length(row)
        ids = row["input_ids"][:length].tobytes()
        if length > longest:
            too_long += 1
        elif ids not in known:
            known.add(ids)
            places.append((number, length))
    if not places:
        raise ValueError(
            f"every prompt of {rows.path} has more than {longest} tokens, and prompt and answer share data.max_length; lower "
            "grpo.max_new_tokens, or raise data.max_length and prepare the data again"
        )
    return Prompts(rows, places, len(rows) - too_long - len(places), too_long)
