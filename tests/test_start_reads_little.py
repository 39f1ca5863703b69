"""A start on prepared data reads as much of a large file as of a small one.

Read are the bytes that read() gave (rchar of /proc/self/io), and the pages that a memory map of the file has brought in (Rss of
/proc/self/smaps). The kernel brings a page's neighbours with it, up to a folio of 2 MiB: rows next to each other cost nothing more, and
rows all over the file a few MiB each.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import MakeRecipe
from in_process import prepared

from qlora_suite import dataset
from qlora_suite.batches import Order
from qlora_suite.files import file_table, read_json, write_json
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load

BATCHES, TOKENS = 52, 10**6
"""Of 4 bytes and a bit each."""


@pytest.fixture
def large(make_recipe: MakeRecipe) -> Recipe:
    """A recipe whose train.arrow is some 215 MB, of rows of 1,000 tokens."""
    recipe = load(prepared(make_recipe()))
    folder = Path(recipe.data.prepared)
    of_row = np.arange(0, TOKENS + 1, 1000, dtype=np.int32)
    of_one = np.arange(len(of_row), dtype=np.int32)
    flags = np.ones(TOKENS, dtype=bool)
    flags[::1000] = False
    columns = [
        pa.ListArray.from_arrays(of_row, np.arange(TOKENS, dtype=np.int32) % 1000),
        pa.ListArray.from_arrays(of_row, flags),
        pa.ListArray.from_arrays(of_one, np.full(len(of_row) - 1, 1000, dtype=np.int32)),
        pa.ListArray.from_arrays(of_one, pa.array([f"row {n}" for n in range(len(of_row) - 1)])),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=dataset.ROWS)
    dataset.write_row_batches(folder / "train.arrow", [batch] * BATCHES)
    manifest = {**read_json(folder / dataset.MANIFEST), "files": file_table(folder, but=dataset.MANIFEST)}
    write_json(folder / dataset.MANIFEST, dataset.sealed(manifest))
    return recipe


def mapped(path: Path) -> int:
    """Bytes of the file that this process's memory maps have brought in."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):  # the head of a map: its addresses, and the file at the end
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def start(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, everything: bool = False) -> dict[str, Any]:
    """What scripts/train.py does with the data before its first step, and that step's rows; or all hashes and all rows.

    Returns what it read.
    """
    path, maps = Path(recipe.data.prepared) / "train.arrow", []

    def kept(*args: Any) -> pa.MemoryMappedFile:  # until its pages are counted
        maps.append((file := memory_map(*args)).read_buffer())
        file.seek(0)
        return file

    def read_until_now() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))

    memory_map = pa.memory_map
    with monkeypatch.context() as during:
        during.setattr(pa, "memory_map", kept)
        before = read_until_now()
        dataset.load_manifest(recipe, verify=everything)
        rows = dataset.Rows(path)
        order = Order(0, rows.lengths, rows_per_step=8, epochs=1)
        read = [rows[number] for number in (range(len(rows)) if everything else order.rows_for_step(0))]
        after = read_until_now()
        return {"rows": len(rows), "tokens": sum(len(row["input_ids"]) for row in read), "bytes": after - before, "mapped": mapped(path)}


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the kernel does not count what a process reads")
def test_a_start_reads_the_index_and_the_rows_that_it_needs(
    large: Recipe, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load(prepared(make_recipe(f"data.prepared={tmp_path / 'small'}")))
    size = (Path(large.data.prepared) / "train.arrow").stat().st_size
    start(small, monkeypatch)  # what is imported on the way is not what is looked at
    little, much = start(small, monkeypatch), start(large, monkeypatch)
    assert (much["rows"], much["tokens"]) == (BATCHES * TOKENS // 1000, 8000)
    assert much["bytes"] < little["bytes"] + 10**6, "of 215 MB"
    assert 0 < much["mapped"] < size / 4, "8 rows, and the head of the file"
    everything = start(large, monkeypatch, everything=True)
    assert everything["bytes"] > size, "the hash"
    assert everything["mapped"] > 0.9 * size, "the rows: the two numbers above can tell"
