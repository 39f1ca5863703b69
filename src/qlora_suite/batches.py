"""The order of the data as a pure function of the seed and the step.

    run position   0 1 2 3 4 | 5 6 7 8 9 |      N = 5 rows, rows_per_step = 4, 2 epochs
    row            3 0 4 1 2 | 1 4 2 0 3 |      perm(seed, i // N)[i % N]
    step           0 0 0 0 1   1 1 1 2 2 -1 -1  a step may cross an epoch; places past the end are empty

One integer resumes a run, and neither the number of processes nor the micro-batch changes which rows a step sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

EMPTY = -1
"""A place past the end of the run: a row without a supervised token."""

POOL, GROUP = 512, 8
"""Length grouping sorts within pools of POOL shuffled rows and shuffles the sorted groups of GROUP."""


@dataclass(frozen=True)
class Order:
    seed: int
    lengths: Sequence[int] = field(repr=False)
    """Tokens of each row."""
    rows_per_step: int
    epochs: float
    max_steps: int | None = None
    group_by_length: bool = False
    """For unpacked rows: neighbours of like length, so that little is padded. Depends on (seed, lengths) alone."""
    _permutations: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Of the epochs in use: computed once, not once a row."""

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def num_positions(self) -> int:
        return max(1, round(self.epochs * self.num_rows))

    @property
    def num_steps(self) -> int:
        steps = math.ceil(self.num_positions / self.rows_per_step)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows_for_step(self, step: int) -> list[int]:
        """The `rows_per_step` row numbers of a step, longest first; EMPTY past the end of the run.

        A rank takes [rank::world], so that all ranks get like lengths. The loss is a sum: the order within a step does not
        matter to it.
        """
        start = step * self.rows_per_step
        rows = [self._row(i) if i < self.num_positions else EMPTY for i in range(start, start + self.rows_per_step)]
        return sorted(rows, key=lambda row: (0 if row == EMPTY else -self.lengths[row], row))

    def _row(self, position: int) -> int:
        epoch, i = divmod(position, self.num_rows)
        return int(self._permutation(epoch)[i])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            for old in [e for e in self._permutations if e < epoch - 1]:
                del self._permutations[old]
            lengths = self.lengths if self.group_by_length else None
            self._permutations[epoch] = permutation(self.seed, epoch, self.num_rows, lengths)
        return self._permutations[epoch]


def permutation(seed: int, epoch: int, num_rows: int, lengths: Sequence[int] | None = None) -> np.ndarray:
    """A permutation of range(num_rows) that is a function of its arguments alone. [num_rows] int64.

    Sorting by Philox's raw output keeps it the same under every version of numpy: only bit generators' raw streams are
    promised to be stable, `Generator.permutation` is not.
    """
    order = np.argsort(_random(seed, epoch, num_rows), kind="stable")
    if lengths is None:
        return order
    pool = np.arange(num_rows) // POOL
    order = order[np.lexsort((-np.asarray(lengths, dtype=np.int64)[order], pool))]  # lexsort is stable, and its last key comes first
    groups = np.full(math.ceil(num_rows / GROUP) * GROUP, EMPTY)
    groups[:num_rows] = order  # a pool is a whole number of groups, so that only the last group may be shorter
    groups = groups.reshape(-1, GROUP)
    shuffled = groups[np.argsort(_random(seed, epoch, len(groups), stream=1), kind="stable")].reshape(-1)
    return shuffled[shuffled != EMPTY]


def _random(seed: int, epoch: int, count: int, stream: int = 0) -> np.ndarray:
    return np.random.Philox(key=[seed, 2 * epoch + stream]).random_raw(count)


@dataclass(frozen=True)
class Limit:
    """How much goes through the model at once. It changes speed and memory, never the curve."""

    rows: int
    tokens: int
    """Places, padding included; a single longer row still goes through by itself."""

    def cut(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Cut rows, longest first, into pieces within the limit."""
        pieces: list[list[int]] = []
        for row in rows:
            longest = self._length(pieces[-1][0], lengths) if pieces else 0
            if pieces and len(pieces[-1]) < self.rows and longest * (len(pieces[-1]) + 1) <= self.tokens:
                pieces[-1].append(row)
            else:
                pieces.append([row])
        return pieces

    @staticmethod
    def _length(row: int, lengths: Sequence[int]) -> int:
        return 1 if row == EMPTY else int(lengths[row])


def micro_batches(rows: Sequence[int], lengths: Sequence[int], limit: Limit, rank: int, world: int) -> list[list[int]]:
    """This rank's share of a step, cut into micro-batches: as many on every rank, the missing ones being one empty row."""
    shares = [limit.cut(rows[r::world], lengths) for r in range(world)]
    most = max(map(len, shares))
    return shares[rank] + [[EMPTY]] * (most - len(shares[rank]))


def check_division(rows_per_step: int, world: int, micro_batch: int | str) -> None:
    """Raises ValueError, with the arithmetic, if a step does not divide into equal micro-batches on all processes."""
    if rows_per_step < world:
        raise ValueError(
            f"train.rows_per_step is {rows_per_step} but there are {world} processes, so some would have nothing to do; "
            f"use at most {rows_per_step} processes (accelerate launch --num_processes {rows_per_step}) or raise train.rows_per_step"
        )
    unit = world * (micro_batch if isinstance(micro_batch, int) else 1)
    if rows_per_step % unit:
        below, above = rows_per_step // unit * unit, (rows_per_step // unit + 1) * unit
        near = " or ".join(str(n) for n in (below, above) if n)
        raise ValueError(
            f"train.rows_per_step = {rows_per_step} cannot be shared out: {world} processes x micro-batch "
            f"{unit // world} = {unit} rows at a time, and {rows_per_step} / {unit} leaves {rows_per_step % unit}; use {near}"
        )
