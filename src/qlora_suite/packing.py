"""Conversations -> rows of at most L tokens, none split, nothing lost.

Six conversations of 7, 5, 4, 3, 2 and 2 tokens in rows of L = 8:

    row 0   A A A A A A A .      positions 0 1 2 3 4 5 6
    row 1   B B B B B D D D      positions 0 1 2 3 4 0 1 2      D does not see B: its positions start again
    row 2   C C C C E E F F      positions 0 1 2 3 0 1 0 1
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from heapq import heappop, heappush


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room (of equally full ones the first).

    Returns rows of indices into `lengths`; every index stands in exactly one row. At most 11/9 of the best possible number of
    rows (Johnson, 1973). Raises ValueError for a length that no row can hold.
    """
    rows: list[list[int]] = []
    rows_with: defaultdict[int, list[int]] = defaultdict(list)  # tokens left -> rows, a heap
    lefts: list[int] = []  # the numbers of tokens left that some row has, rising: at most row_length of them
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= row_length:
            raise ValueError(f"example {index} has {length} tokens; a row holds 1 to {row_length}")
        place = bisect_left(lefts, length)
        if place == len(lefts):
            left, row = row_length, len(rows)
            rows.append([])
        else:
            left = lefts[place]
            row = heappop(rows_with[left])
            if not rows_with[left]:
                del lefts[place]
        rows[row].append(index)
        if left > length:
            if not rows_with[left - length]:
                insort(lefts, left - length)
            heappush(rows_with[left - length], row)
    return rows
