"""Prompts to sample answers to: the prepared rows, each cut before its last learnt answer.

    ids          <|prompter|> hi  $  <|assistant|> oh  $  <|prompter|> and  $  <|assistant|> well  $
    supervised   -            -   -  -             -   -  -            -    -  -             +     +
    prompt       ++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++

A row holds what `Renderer.prompt` gives for the turns before the answer, so that nothing has to be rendered again. Several rows with
one prompt (the replies of one OASST message) are one prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute

from qlora_suite.chat import Renderer
from qlora_suite.conversations import Turn
from qlora_suite.dataset import Rows
from qlora_suite.tracking import StepBar

WORTH_A_BAR = 1_000_000
"""Rows that are read in 4 s."""


@dataclass(frozen=True, eq=False)
class Prompts(Sequence[list[int]]):
    """Distinct prompts, in the order of the rows; read from the disk when they are asked for."""

    rows: Rows
    row_numbers: np.ndarray
    """Which row has it. [prompts] int64"""
    lengths: np.ndarray
    """Tokens of each. [prompts] int64"""
    num_asked_before: int
    """Rows whose prompt another row had."""
    num_too_long: int

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> list[int]:
        return self.rows[int(self.row_numbers[number])]["input_ids"][: self.lengths[number]].tolist()

    def expected(self, number: int) -> list[int]:
        """The ids of the answer that the row has behind this prompt, with its end token where that fits."""
        row, length = self.rows[int(self.row_numbers[number])], self.lengths[number]
        return row["input_ids"][length:][np.asarray(row["supervised"][length:], dtype=bool)].tolist()

    def __str__(self) -> str:
        left_out = {"the same as another": self.num_asked_before, "too long": self.num_too_long}
        return f"{len(self):,} of {len(self.rows):,} rows" + "".join(f", {count:,} {why}" for why, count in left_out.items() if count)


def prompt_lengths(supervised: pa.ListArray) -> np.ndarray:
    """Where the last learnt answer of each row begins. A row has one, and its first token is never learnt. [rows] int64"""
    flags = supervised.flatten().to_numpy(zero_copy_only=False)
    begins = np.flatnonzero(flags & ~np.concatenate([[False], flags[:-1]]))  # of every answer, rows end to end
    ends = np.cumsum(pyarrow.compute.list_value_length(supervised).to_numpy().astype(np.int64))
    last = begins[np.searchsorted(begins, ends) - 1]
    return last - np.concatenate([[0], ends[:-1]])


def read_prompts(rows: Rows, longest: int, visible: bool = False) -> Prompts:
    """Those of at most `longest` tokens. Reads every row; `visible`: with a bar, where that takes its time.

    Raises ValueError if no prompt is left.
    """
    numbers, lengths, known, done, too_long = [], [], set(), 0, 0
    with StepBar("reading the prompts", len(rows), visible=visible and len(rows) >= WORTH_A_BAR) as bar:
        for batch in rows.batches():
            ids = batch["input_ids"].flatten().to_numpy()
            begins = np.cumsum(rows.lengths[done : done + len(batch)]) - rows.lengths[done : done + len(batch)]
            found = prompt_lengths(batch["supervised"])
            for place in np.flatnonzero(found <= longest).tolist():
                name = blake2b(ids[begins[place] : begins[place] + found[place]].tobytes(), digest_size=16).digest()
                if name not in known:
                    known.add(name)
                    numbers.append(done + place)
                    lengths.append(int(found[place]))
            too_long += int((found > longest).sum())
            done += len(batch)
            bar.advance(done, "rows")
    if not numbers:
        raise ValueError(
            f"every prompt of {rows.path} has more than {longest} tokens, and prompt and answer share data.max_length; lower "
            "grpo.max_new_tokens, or raise data.max_length and prepare the data again"
        )
    return Prompts(rows, np.array(numbers), np.array(lengths), len(rows) - too_long - len(numbers), too_long)


def question_finder(renderer: Renderer) -> Callable[[str], str]:
    """A function from the decoded text of a prompt to what the user said last in it.

    Told by trial: what stands in front of a question, behind it, and between an answer and the next question, is seen where the format
    writes known ones. A system message in front is told apart where the format writes a marker between the two (llama2, ChatML, most
    templates); where it is the beginning of the first user turn (oasst, human_assistant, instruct_output) it stays there.
    """

    def written(*turns: Turn) -> str:
        return renderer.tokenizer.decode(renderer.prompt(turns), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    system, question, answer = Turn("system", "Be brief."), Turn("user", "Where?"), Turn("assistant", "There!")
    front, _, behind = written(question).rpartition(question.content)
    between = written(question, answer, question).rpartition(question.content)[0].rpartition(answer.content)[2]
    try:
        system_front, _, asked = written(system, question).partition(system.content)
    except ValueError:  # a template that takes none
        system_front, asked = "", ""
    behind_system = asked.rpartition(question.content)[0]

    def question_of(text: str) -> str:
        if between and between in text:
            last = text.rpartition(between)[2]
        elif behind_system.strip() and text.startswith(system_front) and behind_system in text:
            last = text.partition(behind_system)[2]
        else:
            last = text.removeprefix(front)
        return last.partition(behind)[0] if behind else last

    return question_of
