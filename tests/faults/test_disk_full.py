"""A disk that is full: no checkpoint is lost, nothing half stays, the run goes on if it can, and the same command when there is room."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from in_process import lines, metrics, prepared, train
from processes import run
from small_disk import Disk, enter, fill, fills, small_disk

from qlora_suite import checkpoint
from qlora_suite.files import read_json

STEPS = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("disk_full")
    return prepared(
        write_recipe(folder, tiny_base, oasst_file, f"train.max_steps={STEPS}", "train.epochs=4.0", "checkpoints.every_steps=4")
    )


@pytest.fixture(scope="module")
def whole(recipe: Path) -> bytes:
    """The adapter of a run that met nothing."""
    return adapter(train(recipe, f"output.dir={recipe.parent}/whole"))


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    with small_disk(tmp_path / "disk", "48m") as found:
        yield found


def adapter(folder: Path) -> bytes:
    return (folder / "final" / checkpoint.ADAPTER).read_bytes()


def events(folder: Path) -> list[dict[str, Any]]:
    return [record for record in lines(folder / "metrics.jsonl") if "event" in record]


def nothing_half(folder: Path) -> bool:
    """Every checkpoint verifies, and no temporary file is left."""
    found = checkpoint.steps(folder / "checkpoints")
    good = [checkpoint.complaint_about_checkpoint(folder / "checkpoints" / f"step-{step:06d}") is None for step in found]
    return all(good) and not [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_a_periodic_save_is_tried_again_after_growing_pauses_and_no_line_of_the_log_is_lost(
    recipe: Path, whole: bytes, disk: Disk, tmp_path: Path
) -> None:
    """Fault 7: full while a run saves and logs, and even what it prints goes to that disk."""
    at = {5: True, 20: False}
    done = run(
        "train.py", recipe, f"output.dir={disk.folder}/run", log=tmp_path / "log", prelude=(fills, disk.holder, disk.folder, at, True)
    )
    folder, said = disk.seen_from_here / "run", (disk.seen_from_here / "log.out").read_text()
    assert done.wait() == 0, said
    failed = [e for e in events(folder) if e["event"] == "checkpoint failed"]
    assert [(e["step"], e["next_try"], e["failed_saves"]) for e in failed] == [(8, 9, 1), (9, 11, 2), (11, 15, 3), (15, 23, 4)]
    assert all("No space left" in e["error"] for e in failed)
    assert [r["step"] for r in metrics(folder)] == list(range(1, STEPS + 1))
    (late,) = [e for e in events(folder) if e["event"] == "log could not be written"]
    assert late["lines"] > 5
    assert said.count("metrics.jsonl CANNOT BE WRITTEN") == 1
    assert "checkpoint at step 15 FAILED" in said
    assert "failed so far: 4" in said
    assert adapter(folder) == whole
    assert nothing_half(folder)
    assert checkpoint.steps(folder / "checkpoints") == [28, 30]


def test_what_need_not_stay_makes_room_for_the_next_checkpoint(recipe: Path, whole: bytes, disk: Disk, tmp_path: Path) -> None:
    """Fault 7: the disk stays full, and yet no later step is lost: the older of two checkpoints goes."""
    done = run(
        "train.py",
        recipe,
        f"output.dir={disk.folder}/run",
        log=tmp_path / "log",
        prelude=(fills, disk.holder, disk.folder, {9: True}, False, 128 * 1024),
    )
    folder = disk.seen_from_here / "run"
    assert done.wait() == 0, done.output
    full = [e for e in events(folder) if e["event"] == "disk full"]
    assert [(e["step"], *e["deleted"]) for e in full] == [(step, f"step-{step - 8:06d}") for step in (12, 16, 20, 24, 28)] + [
        (30, "step-000024")
    ]
    assert not [e for e in events(folder) if e["event"] == "checkpoint failed"]
    assert adapter(folder) == whole
    assert nothing_half(folder)


def test_a_final_save_that_fails_is_an_error_and_the_same_command_goes_on(recipe: Path, whole: bytes, disk: Disk, tmp_path: Path) -> None:
    """Fault 7: nothing more can be deleted: a sentence, exit code 2, the older checkpoint whole, nothing half."""
    words = ("train.py", recipe, f"output.dir={disk.folder}/run", "checkpoints.every_steps=20")
    done = run(*words, log=tmp_path / "log", prelude=(fills, disk.holder, disk.folder, {STEPS: True}))
    folder = disk.seen_from_here / "run"
    assert done.wait() == 2, done.output
    error = done.output.strip().splitlines()[-1]
    assert error.startswith(f"error: the checkpoint of step {STEPS} could not be written to {disk.folder}/run/checkpoints (")
    assert "No space left" in error
    assert "the newest one is step-000020; see to the disk, and the same command goes on from there" in error
    assert "Traceback" not in done.output
    assert checkpoint.steps(folder / "checkpoints") == [20]
    assert nothing_half(folder)
    assert not (folder / "final").exists()

    (disk.seen_from_here / "filler").unlink()
    again = run(*words, log=tmp_path / "again", prelude=(enter, disk.holder))
    assert again.wait() == 0, again.output
    assert adapter(folder) == whole
    assert [r["step"] for r in metrics(folder)] == list(range(1, STEPS + 1))


def test_a_disk_without_room_for_the_checkpoints_is_said_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    """Fault 7: free disk is checked at the start, for the mirror as well."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        words = ("train.py", recipe, f"output.dir={disk.folder}/run")
        done = run(*words, log=tmp_path / "log", prelude=(enter, disk.holder))
        assert done.wait() == 2, done.output
        assert "error: output.dir: this run will need " in done.output
        assert "3 checkpoints of 0." in done.output
        assert "4.0 MiB are free; make room" in done.output.replace("3.9 MiB", "4.0 MiB")
        assert not (disk.seen_from_here / "run" / "checkpoints").exists()
        assert read_json(disk.seen_from_here / "run" / "status.json")["state"] == "failed"
    with small_disk(tmp_path / "mirror", "300k") as disk:
        words = ("train.py", recipe, f"output.dir={tmp_path}/run", f"output.mirror={disk.folder}")
        done = run(*words, log=tmp_path / "log2", prelude=(enter, disk.holder))
        assert done.wait() == 2, done.output
        assert "error: output.mirror: this run will need " in done.output


def test_a_mirror_that_is_full_costs_its_copies_not_the_run(recipe: Path, whole: bytes, disk: Disk, tmp_path: Path) -> None:
    """Fault 7: said, counted, noted; nothing half stays there."""
    words = ("train.py", recipe, f"output.dir={tmp_path}/run", f"output.mirror={disk.folder}/mirror")
    done = run(*words, log=tmp_path / "log", prelude=(fills, disk.holder, disk.folder, {5: True, 14: False}))
    assert done.wait() == 0, done.output
    assert [(e["step"], e["event"]) for e in events(tmp_path / "run")] == [(8, "mirroring failed"), (12, "mirroring failed")]
    assert adapter(tmp_path / "run") == whole
    assert checkpoint.steps(disk.seen_from_here / "mirror" / "checkpoints") == [28, 30]
    assert nothing_half(disk.seen_from_here / "mirror")


def test_preparation_leaves_the_old_data_and_nothing_half(recipe: Path, tmp_path: Path) -> None:
    """Fault 7: full during the preparation of the data."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        words = ("prepare_data.py", recipe, f"data.prepared={disk.folder}/prepared", "--num-workers", "1")
        first = run(*words, log=tmp_path / "first", prelude=(enter, disk.holder))
        assert first.wait() == 0, first.output
        before = {p.name: p.read_bytes() for p in (disk.seen_from_here / "prepared").rglob("*") if p.is_file()}
        fill(disk.seen_from_here)
        second = run(*words, "data.max_length=200", log=tmp_path / "second", prelude=(enter, disk.holder))
        assert second.wait() == 2, second.output
        assert "Traceback" not in second.output
        error = second.output.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "Errno 28" in error
        assert str(disk.folder) in error
        assert {p.name: p.read_bytes() for p in (disk.seen_from_here / "prepared").rglob("*") if p.is_file()} == before
        assert sorted(p.name for p in disk.seen_from_here.iterdir()) == ["filler", "prepared"]


def test_an_evaluation_leaves_no_half_report(recipe: Path, whole: bytes, disk: Disk, tmp_path: Path) -> None:
    """Fault 7: full when the report is written: a sentence, the run untouched, and the same command writes it later."""
    shutil.copytree(recipe.parent / "whole", disk.seen_from_here / "run")
    fill(disk.seen_from_here)
    words = ("evaluate.py", f"{disk.folder}/run", "--answers", "0")
    done = run(*words, log=tmp_path / "log", prelude=(enter, disk.holder))
    assert done.wait() == 2, done.output
    error = done.output.strip().splitlines()[-1]
    assert error.startswith("error: [Errno 28] No space left on device: ")
    assert str(disk.folder) in error, "it says which disk"
    folder = disk.seen_from_here / "run"
    assert nothing_half(folder)
    assert not list(folder.glob("report*"))
    (disk.seen_from_here / "filler").unlink()
    again = run(*words, log=tmp_path / "again", prelude=(enter, disk.holder))
    assert again.wait() == 0, again.output
    assert len(list(folder.glob("report.*"))) == 3


# --- where no disk can be made: a fake that fails at every write in turn


def fails_at(number: int, counter: str) -> None:
    """A prelude: the disk is full at the so manieth flush of a file, and only there. How many there were goes to `counter`."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        Path(counter).write_text(str(calls))
        if calls == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fsync


PARTS = 10
SHORT = ("train.max_steps=4", "checkpoints.every_steps=2")


@pytest.fixture(scope="module")
def counted(recipe: Path) -> tuple[int, bytes]:
    """How often a run of four steps flushes, and its adapter."""
    counter = recipe.parent / "flushes"
    done = run(
        "train.py", recipe, *SHORT, f"output.dir={recipe.parent}/counted", log=recipe.parent / "log", prelude=(fails_at, 0, str(counter))
    )
    assert done.wait() == 0, done.output
    return int(counter.read_text()), adapter(recipe.parent / "counted")


@pytest.mark.parametrize("part", range(PARTS))
def test_a_write_that_fails_anywhere_costs_at_most_the_start(recipe: Path, counted: tuple[int, bytes], tmp_path: Path, part: int) -> None:
    """Fault 7: the run goes on, or it ends with one sentence and the same command goes on; the result is the same."""
    flushes, wanted = counted
    number = 1 + part * flushes // PARTS
    words = ("train.py", recipe, *SHORT, f"output.dir={tmp_path}/run")
    first = run(*words, log=tmp_path / "log", prelude=(fails_at, number, str(tmp_path / "flushes")))
    assert "Traceback" not in first.output, first.output
    if first.wait() != 0:
        assert first.wait() == 2
        assert "No space left" in first.output.strip().splitlines()[-1]
        again = run(*words, log=tmp_path / "again")
        assert again.wait() == 0, again.output
    assert adapter(tmp_path / "run") == wanted
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert nothing_half(tmp_path / "run")
    assert read_json(tmp_path / "run" / "status.json")["state"] == "finished"


def test_a_tracker_that_fails_costs_its_numbers_not_the_run(recipe: Path, tmp_path: Path) -> None:
    """Fault 7: a tracker raises whatever its library does when its disk is full; said once, noted once."""
    done = run("train.py", recipe, *SHORT, f"output.dir={tmp_path}/run", log=tmp_path / "log", prelude=(tracking_fails,))
    assert done.wait() == 0, done.output
    assert done.output.count("tracking FAILED (RuntimeError: the tracker's disk is full)") == 1
    assert [(e["step"], e["event"]) for e in events(tmp_path / "run")] == [(1, "tracker failed")]


def tracking_fails() -> None:
    from accelerate import Accelerator

    def log(*_: object, **__: object) -> None:
        raise RuntimeError("the tracker's disk is full")

    Accelerator.log = log
