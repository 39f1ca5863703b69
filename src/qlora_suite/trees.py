"""OASST messages of any number -> the trees that they make, one at a time, as `oasst1.forest` finds them in memory.

A message names its parent by an id, and parents, children and whole trees stand in no order in their file. So the messages go into two
files as they are read, what is needed of each and 32 bytes of numbers:

    messages     ["id", "parent", "tree", "text", ...]     one after another
    index        where it begins, hash of its id, hash of its parent's, hash of its tree's

Ids are looked up by sorting the hashes, and roots are found by following all parents at once, each round twice as far as the one before
(Wyllie's pointer jumping, 1979). In memory there are some 60 bytes for each message while this goes on, and 16 afterwards.
"""

import hashlib
import json
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qlora_suite import oasst1
from qlora_suite.conversations import Conversation
from qlora_suite.recipe import Filters, Pairs, Policy
from qlora_suite.sources import BadRow, Place, Row, shown

_INDEX = np.dtype([("begins", "<i8"), ("id", "<u8"), ("parent", "<u8"), ("tree", "<u8")])
_encoded = json.JSONEncoder(ensure_ascii=False).encode


class Trees:
    """The sound messages of some rows; all others go to `leave_out`, each for one reason. A context manager, at whose end the files in
    `folder` are gone.

    Of two messages with one id the first is kept. Two ids are taken for one if 64 bits of their hashes agree, which happens among 100
    million with a probability of 0.03 %.
    """

    def __init__(self, rows: Iterable[Row], folder: Path, leave_out: Callable[[BadRow], None]) -> None:
        self._paths = folder / "messages", folder / "index"
        lost: list[int] = []  # hashes of the ids in bad rows
        with self._paths[0].open("wb") as messages, self._paths[1].open("wb") as index:
            for row in rows:
                if complaint := oasst1.complaint(row.values):
                    reason, key = complaint
                    leave_out(BadRow(row.place, reason, key, shown(row.values.get(key))))
                    if isinstance(name := row.values.get("message_id"), str):
                        lost.append(int.from_bytes(_hash(name), "little"))
                else:
                    _write(row, messages, index)
        size = self._paths[1].stat().st_size
        self._index = np.memmap(self._paths[1], _INDEX, "r") if size else np.empty(0, _INDEX)
        self._begins = self._index["begins"]
        self._file = self._paths[0].open("rb")
        self._messages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self._order, self._tops, self._ends, self._parent_lost = self._sort(np.array(lost, dtype=np.uint64), leave_out)

    def __enter__(self) -> "Trees":
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._messages, mmap.mmap):
            self._messages.close()
        self._file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Messages that have no parent here, each with all that hangs below it."""
        return len(self._ends)

    def __iter__(self) -> Iterator[tuple[list[oasst1.Message], set[str]]]:
        """(messages in file order, the parent's id where that message was left out), in the file order of their tops."""
        start = 0
        for top, end, parent_lost in zip(self._tops, self._ends, self._parent_lost, strict=True):
            left_out = {self._message(top)["parent_id"]} - {None} if parent_lost else set()
            yield [self._message(number) for number in self._order[start:end].tolist()], left_out
            start = end

    def conversations(
        self, policy: Policy, filters: Filters | None, dropped: Counter[str], pairs: Pairs | None = None
    ) -> Iterator[Conversation]:
        """As `oasst1.conversations`, of one tree after another; `dropped` counts on."""
        for messages, left_out in self:
            found, lost = oasst1.conversations(messages, policy, filters, left_out, pairs)
            dropped.update(lost)
            yield from found

    def _sort(self, lost: np.ndarray, leave_out: Callable[[BadRow], None]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(numbers of the sound messages, tree by tree; of each tree: its top, where it ends among them, was its top's parent left out?)"""
        parent, kept = self._parents()
        for number in np.flatnonzero(~kept).tolist():
            leave_out(self._bad(number, "message_id stands twice", "message_id"))
        tree = self._index["tree"]
        has = np.flatnonzero(parent >= 0)
        strays = has[tree[has] != tree[parent[has]]]
        for number in strays.tolist():
            leave_out(self._bad(number, "in another tree than its parent", "parent_id"))
        kept[strays] = False
        lost = np.concatenate([lost, self._index["id"][strays]])
        parent[has[~kept[parent[has]]]] = -1
        top = _tops(parent)
        circling = np.flatnonzero((parent[top] >= 0) & kept)
        for number in circling.tolist():
            leave_out(self._bad(number, "its own ancestor, or below one that is", "parent_id"))
        kept[circling] = False
        del parent

        order = np.flatnonzero(kept)
        top = top[order]
        by_top = np.argsort(top, kind="stable")
        order, top = order[by_top], top[by_top]
        starts = np.flatnonzero(np.diff(top, prepend=-1))
        tops = top[starts]
        return order, tops, np.append(starts[1:], len(order))[: len(starts)], np.isin(self._index["parent"][tops], lost)

    def _parents(self) -> tuple[np.ndarray, np.ndarray]:
        """(number of each message's parent, -1 without one; is it the first with its id?)"""
        ids = np.ascontiguousarray(self._index["id"])
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        first = np.diff(ids, prepend=ids[:1] - np.uint64(1)) != 0
        kept = np.ones(len(ids), dtype=bool)
        kept[order[~first]] = False
        ids, order = ids[first], order[first]
        parent = np.full(len(kept), -1)
        for start in range(0, len(kept), 2**20):  # else the places that are looked up are an array as large as the others
            wanted = self._index["parent"][start : start + 2**20]
            place = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
            parent[start : start + 2**20] = np.where(ids[place] == wanted, order[place], -1)
        parent[~kept] = -1
        return parent, kept

    def _message(self, number: int) -> oasst1.Message:
        return dict(zip(_KEYS, self._record(number), strict=False))

    def _bad(self, number: int, reason: str, key: str) -> BadRow:
        values = self._record(number)
        return BadRow(Place(*values[len(_KEYS) :]), reason, key, shown(values[_KEYS.index(key)]))

    def _record(self, number: int) -> list[Any]:
        start = int(self._begins[number])
        end = int(self._begins[number + 1]) if number + 1 < len(self._begins) else len(self._messages)
        return json.loads(self._messages[start:end].decode("utf-8", "surrogatepass"))


_KEYS = (
    *("message_id", "parent_id", "message_tree_id", "text", "role", "lang", "rank"),
    *("created_date", "deleted", "synthetic", "review_result"),
)


def _write(row: Row, messages: BinaryIO, index: BinaryIO) -> None:
    """What a conversation is made of, and where the row stood."""
    get, place = row.values.get, row.place
    name, parent, tree = get("message_id"), get("parent_id"), get("message_tree_id")
    # of a table a date may come as one, and a flag as anything; what oasst1 asks of them is their text, their truth, and `is False`
    about = (str(get("created_date")), bool(get("deleted")), bool(get("synthetic")), get("review_result") is not False)
    values = (name, parent, tree, get("text"), get("role"), get("lang"), get("rank"), *about)
    index.write(messages.tell().to_bytes(8, "little") + _hash(name) + _hash(parent or "") + _hash(tree))
    messages.write(_encoded((*values, place.file, place.number, place.unit, place.line)).encode("utf-8", "surrogatepass"))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _tops(parent: np.ndarray) -> np.ndarray:
    """The last of each message's ancestors, itself without any; of what circles or hangs below a circle, one that has a parent."""
    top = np.where(parent < 0, np.arange(len(parent)), parent)
    for _ in range(len(parent).bit_length()):
        further = top[top]
        if np.array_equal(further, top):
            break
        top = further
    return top
