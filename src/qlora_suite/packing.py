"""Conversations -> rows of at most L tokens, none split, nothing lost.

Six conversations of 7, 5, 4, 3, 2 and 2 tokens in rows of L = 8:

    row 0   A A A A A A A .      positions 0 1 2 3 4 5 6
    row 1   B B B B B D D D      positions 0 1 2 3 4 0 1 2      D does not see B: its positions start again
    row 2   C C C C E E F F      positions 0 1 2 3 0 1 0 1
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    members: np.ndarray
    """Indices into the lengths, row by row, each once. [conversations] int64"""
    ends: np.ndarray
    """Where each row ends in `members`. [rows] int64"""

    def rows(self) -> list[list[int]]:
        return [row.tolist() for row in np.split(self.members, self.ends[:-1])] if len(self.ends) else []


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """`packed`, as lists of indices into `lengths`."""
    return packed(lengths, row_length).rows()


def packed(lengths: Sequence[int] | np.ndarray, row_length: int) -> Packing:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room (of equally full ones the first).

    Every index stands in exactly one row. At most 11/9 of the best possible number of rows, and 4 (Johnson, 1973). Raises ValueError for a
    length that no row can hold.

    Conversations of one length are placed together, in arrays, for where one goes the next ones go, too: into the same row while it has
    room (having just become the fullest that has), then into the next row that was as full. So the loop below is over pairs of a length
    and a number of places left, of which there are at most row_length^2 / 2, however many conversations there are.
    """
    sizes = np.asarray(lengths, dtype=None if isinstance(lengths, np.ndarray) else np.int64)
    if len(wrong := np.flatnonzero((sizes < 1) | (sizes > row_length))):
        # the longest first, as they are packed, for it is the one to look at
        index = wrong[np.argmax(sizes[wrong])]
        raise ValueError(f"example {index} has {sizes[index]} tokens; a row holds 1 to {row_length}")
    longest_first = np.argsort(-sizes, kind="stable")
    row_of = np.empty(len(sizes), dtype=np.int32)  # of each, longest first
    rows_with: dict[int, list[np.ndarray]] = {}  # places left -> numbers of the rows that have them
    lefts: list[int] = []  # its keys, rising
    num_rows = done = 0
    histogram = np.bincount(sizes, minlength=1)
    for length in np.flatnonzero(histogram)[::-1].tolist():
        waiting = int(histogram[length])
        while waiting:
            place = bisect_left(lefts, length)
            if place == len(lefts):
                left, of_each = row_length, row_length // length
                rows = np.arange(num_rows, num_rows - (-waiting // of_each))
                num_rows += len(rows)
            else:
                left = lefts.pop(place)
                of_each = left // length
                rows = np.sort(np.concatenate(rows_with.pop(left)), kind="stable")
                needed = -(-waiting // of_each)
                if needed < len(rows):
                    _put(rows[needed:], left, rows_with, lefts)
                    rows = rows[:needed]
            taken = min(waiting, len(rows) * of_each)
            row_of[done : done + taken] = np.repeat(rows, of_each)[:taken]
            full = taken // of_each  # the last row may be given fewer
            _put(rows[:full], left - of_each * length, rows_with, lefts)
            _put(rows[full:], left - (taken - full * of_each) * length, rows_with, lefts)
            waiting, done = waiting - taken, done + taken
    members = longest_first[np.argsort(row_of, kind="stable")]
    return Packing(members, np.cumsum(np.bincount(row_of, minlength=num_rows)))


def _put(rows: np.ndarray, left: int, rows_with: dict[int, list[np.ndarray]], lefts: list[int]) -> None:
    if left and len(rows):
        if left not in rows_with:
            rows_with[left] = []
            insort(lefts, left)
        rows_with[left].append(rows)
