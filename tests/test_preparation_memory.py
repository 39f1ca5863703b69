"""What preparation holds in memory does not grow with the messages by more than some bytes for each.

The promise is 1.5 GB for ten million, of which 0.45 GB are there before the first: 105 bytes a message. Between 100,000 and a million
benchmarks/preparation.json has 60. A million through the whole preparation is two minutes of a core, nearly all of it tokenising; so
120,000 go through it here. At so few, caches (the tokenizer's words) are still filling, and the limit is 300 bytes: 30 MB, where to hold
the messages themselves takes 1,500 bytes each, 150 MB. The million goes through the part that is quick: pieces into rows.
"""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, write_recipe
from processes import server

FEW, MANY = 20_000, 120_000
BYTES_A_MESSAGE = 300
SOME_PIECES, PIECES = 100_000, 1_000_000
BYTES_A_PIECE = 105


class Peak:
    """The most anonymous memory that this process holds while the block runs, in bytes; looked at from a thread."""

    def __enter__(self) -> "Peak":
        self.bytes, self.ends = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ends.wait(0.01):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = max(self.bytes, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))


def in_a_process_of_its_own(function: Any, *args: Any, journal: Path) -> list[Any]:
    """What `function` wrote into the journal."""
    process = server().Process(target=function, args=(*args, str(journal)))
    process.start()
    process.join(500)
    assert process.exitcode == 0
    return json.loads(journal.read_text())


def prepare_both(form: str, folder: str, base: str, journal: str) -> None:
    import importlib.util

    from in_process import prepared

    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "preparation.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    peaks = []
    for count in (FEW, MANY):
        rows, of_row = benchmark.FORMS[form]
        source = Path(folder) / f"{count}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
        policy = "all_paths" if of_row == 1 else "null"
        recipe = write_recipe(Path(folder), Path(base), source, f"data.policy={policy}", f"data.prepared={folder}/prepared{count}")
        with Peak() as peak:
            prepared(recipe)
        peaks.append(peak.bytes)
    Path(journal).write_text(json.dumps(peaks))


@pytest.mark.parametrize("form", ["trees", "chats"])
def test_a_hundred_thousand_more_messages_take_thirty_megabytes_more_at_most(tiny_base: Path, tmp_path: Path, form: str) -> None:
    before, after = in_a_process_of_its_own(prepare_both, form, str(tmp_path), str(tiny_base), journal=tmp_path / "peaks")
    assert after - before < (MANY - FEW) * BYTES_A_MESSAGE


def write_a_million(folder: str, journal: str) -> None:
    from types import SimpleNamespace

    from qlora_suite import dataset
    from qlora_suite.pieces import Pieces
    from qlora_suite.preparation import write_rows
    from qlora_suite.selection import Counts

    draw, data, counts = np.random.default_rng(0), SimpleNamespace(packing=True, max_length=1024), Counts()
    path, peaks = Path(folder) / "train.arrow", []
    for count in (SOME_PIECES, PIECES):
        lengths = draw.integers(5, 60, count).tolist()
        flags = {length: [False, *[True] * (length - 1)] for length in set(lengths)}
        ids = {length: list(range(length)) for length in set(lengths)}
        with Peak() as peak, Pieces(Path(folder)) as pieces:
            for number, length in enumerate(lengths):
                pieces.add(str(number), ids[length], flags[length])
            write_rows(path, pieces, data, counts)
        peaks.append(peak.bytes)
    rows = dataset.Rows(path)
    for _ in rows.check():
        pass
    keys = {key for row in range(0, len(rows), 1000) for key in rows.examples(row)}
    Path(journal).write_text(json.dumps([*peaks, int(rows.lengths.sum()), sum(lengths), len(keys)]))


def test_a_million_pieces_become_rows_in_a_hundred_megabytes(tmp_path: Path) -> None:
    before, after, in_rows, wanted, keys = in_a_process_of_its_own(write_a_million, str(tmp_path), journal=tmp_path / "peaks")
    assert in_rows == wanted
    assert keys > 500
    print(before, after)
    assert after - before < (PIECES - SOME_PIECES) * BYTES_A_PIECE
