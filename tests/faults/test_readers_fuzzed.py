"""Mutated files of every kind: read, refused in a sentence that names the file, or left out row by row. No traceback, no hang, no abort.

fuzzed.py says how; as a program it goes on for as long as one likes.
"""

import json
from pathlib import Path

import pytest
from conftest import write_recipe
from fuzzed import CHAT, trials
from in_process import prepared
from processes import server

from qlora_suite.tracking import Journal, read_journal

SEED, PER_KIND = 6, 170


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Of twenty chats, prepared."""
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "chats.jsonl").write_text("".join(json.dumps(CHAT) + "\n" for _ in range(20)))
    small = ("data.policy=null", "data.split=all", "data.dev_share=0.3", "data.max_length=64")
    return prepared(write_recipe(folder, tiny_base, folder / "chats.jsonl", *small))


def test_no_mutated_file_brings_a_traceback_a_hang_or_the_end_of_the_process(recipe: Path, tmp_path: Path) -> None:
    """Faults 16, 18, 22: some 3,600 mutations of 21 kinds of file, in a process of its own with little memory."""
    journal = tmp_path / "journal"
    (tmp_path / "files").mkdir()
    process = server().Process(target=trials, args=(str(tmp_path / "files"), str(recipe), [], PER_KIND, 600.0, SEED, str(journal)))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    said = journal.read_text(encoding="utf-8").splitlines()
    assert process.exitcode == 0, f"it ended with {process.exitcode} at: {said[-1]}"
    assert [line for line in said if line.startswith("WRONG")] == []
    ended = {line.split()[1].rstrip(":"): line for line in said if line.startswith("ended")}
    assert len(ended) == 21
    for name, line in ended.items():
        assert "read 0" not in line, f"nothing was read of {name}: the mutations are too coarse to test anything"
        assert "refused 0" not in line or name in ("metrics", "previews"), f"nothing was refused of {name}"


def test_a_damaged_line_of_a_journal_costs_no_other(tmp_path: Path) -> None:
    """Fault 5: a bit that flipped in metrics.jsonl must not take the steps after it when the run goes on."""
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": n, "loss": 1.0}).encode() for n in range(1, 7)]
    damaged = [
        whole[0],
        b'{"step": 2, "lo\xffs": 1.0}',
        b'{"step": 3, "loss',
        b'{"step": 4, "loss": NaN}',
        b'"text"',
        b'{"step": "5"}',
        whole[5],
        b'{"step": 7, "lo',
    ]
    path.write_bytes(b"\n".join(damaged))
    assert [record["step"] for record in read_journal(path)] == [1, "5", 6]
    journal = Journal(path, step=6)
    journal.add({"step": 7})
    assert [record["step"] for record in journal.records] == [record["step"] for record in read_journal(path)] == [1, 6, 7]
