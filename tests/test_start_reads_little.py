"""A start on prepared data reads as much of a large file as of a small one.

Read are the bytes that read() gave (rchar of /proc/self/io), and the pages of a memory-mapped file that were touched, each of which is a
page fault of this process; the kernel may map up to 16 pages of 4 KiB with one, when the file is in its cache. To touch all of the file
below takes 3,000 faults or more, whatever the cache holds.
"""

import os
import resource
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
AROUND = 16 * resource.getpagesize()


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


def start(recipe: Recipe, verify: bool = False) -> dict[str, Any]:
    """What scripts/train.py does with the data before its first step, and that step's rows. Returns what it read."""

    def now() -> tuple[int, int]:
        read = next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
        return read, resource.getrusage(resource.RUSAGE_SELF).ru_minflt + resource.getrusage(resource.RUSAGE_SELF).ru_majflt

    before = now()
    dataset.load_manifest(recipe, verify=verify)
    rows = dataset.Rows(Path(recipe.data.prepared) / "train.arrow")
    order = Order(0, rows.lengths, rows_per_step=8, epochs=1)
    read = [rows[number] for number in order.rows_for_step(0)]
    after = now()
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in read),
        "bytes": after[0] - before[0],
        "faults": after[1] - before[1],
    }


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the kernel does not count what a process reads")
def test_a_start_reads_the_index_and_the_rows_that_it_needs(large: Recipe, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    small = load(prepared(make_recipe(f"data.prepared={tmp_path / 'small'}")))
    size = (Path(large.data.prepared) / "train.arrow").stat().st_size
    touched = size // AROUND
    assert touched > 3000
    start(small)  # what is imported on the way is not what is looked at
    little, much = start(small), start(large)
    assert (much["rows"], much["tokens"]) == (BATCHES * TOKENS // 1000, 8000)
    assert much["bytes"] < little["bytes"] + 10**6, "of 215 MB"
    assert much["faults"] < little["faults"] + touched / 4
    everything = start(large, verify=True)
    assert everything["bytes"] > size, "the hash reads it"
    assert everything["faults"] > touched, "and so does the check of the rows: the two numbers above can tell"
