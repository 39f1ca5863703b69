"""Tokenised pieces of conversations on their way into rows: written one after another, then read in any order, many at once.

Three flat files, in which piece i stands behind piece i - 1; what is in memory is where each one begins:

    pieces.ids      int32, the tokens
    pieces.flags    one byte for each of them, 1 where it is supervised
    pieces.keys     UTF-8, the conversations' keys
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from qlora_suite import dataset

TOKENS_AT_ONCE = 2**24
"""Of a record batch, if its rows are so long: what lies in memory while it is written, at some 20 bytes a token."""


class Pieces:
    """A context manager, at whose end the files are gone."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"pieces.{name}" for name in ("ids", "flags", "keys")]
        self._ids, self._flags, self._keys = self._files = [path.open("wb") for path in self._paths]
        self._lengths, self._key_lengths = array("i"), array("i")

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink()

    def add(self, key: str, input_ids: Sequence[int], supervised: Sequence[bool]) -> None:
        name = key.encode()
        self._ids.write(array("i", input_ids))
        self._flags.write(bytes(supervised))
        self._keys.write(name)
        self._lengths.append(len(input_ids))
        self._key_lengths.append(len(name))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each. [pieces] int32"""
        return np.array(self._lengths, dtype=np.int32)

    def batches(self, members: np.ndarray, ends: np.ndarray, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """Rows of pieces, in the schema of `dataset.ROWS`. members: numbers of pieces, row by row; ends: where each row ends among them.

        After the last `add`.
        """
        for file in self._files:
            file.flush()
        lengths, key_lengths = self.lengths, np.array(self._key_lengths, dtype=np.int32)
        begins, key_begins = (np.cumsum(sizes, dtype=np.int64) - sizes for sizes in (lengths, key_lengths))
        ids, flags, keys = (
            np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
            for path, kind in zip(self._paths, (np.int32, np.uint8, np.uint8), strict=True)
        )
        tokens_before = np.append(0, np.cumsum(lengths[members], dtype=np.int64))
        first_row = 0
        while first_row < len(ends):
            first = int(ends[first_row - 1]) if first_row else 0
            fit = int(np.searchsorted(tokens_before[ends[first_row : first_row + rows_at_once]], tokens_before[first] + TOKENS_AT_ONCE))
            last_row = min(first_row + max(1, fit), len(ends))
            these = members[first : ends[last_row - 1]]
            row_ends = np.append(0, ends[first_row:last_row] - first)
            places = _places(begins[these], lengths[these])
            token_ends = tokens_before[first + row_ends] - tokens_before[first]
            texts = keys[_places(key_begins[these], key_lengths[these])].tobytes()
            text_ends = np.append(0, np.cumsum(key_lengths[these])).astype(np.int32)
            names = pa.StringArray.from_buffers(len(these), pa.py_buffer(text_ends), pa.py_buffer(texts))
            columns = [
                _lists(token_ends, pa.array(ids[places])),
                _lists(token_ends, pa.array(flags[places].astype(bool))),
                _lists(row_ends, pa.array(lengths[these])),
                _lists(row_ends, names),
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=dataset.ROWS)
            first_row = last_row


def _places(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... for lengths[0] places, then the same for the next. [sum of lengths] int64"""
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.repeat(begins - before, lengths) + np.arange(lengths.sum(dtype=np.int64))


def _lists(ends: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
