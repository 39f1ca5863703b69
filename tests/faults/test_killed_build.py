"""A build of DeepSpeed's ops that was killed does not hang every later run; one that goes on is waited for."""

import os
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from qlora_suite.extension_builds import DEAD_AFTER_SECONDS, release_dead_builds


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """As torch makes it."""
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"


def age(lock: Path, seconds: float) -> None:
    os.utime(lock, (time.time() - seconds,) * 2)


def test_the_lock_of_a_dead_build_is_removed_and_said(lock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    os.close(baton.fd)  # as a kill does
    age(lock, DEAD_AFTER_SECONDS + 1)
    assert release_dead_builds(tmp_path) == [lock]
    assert "every later one would wait" in capsys.readouterr().out
    assert FileBaton(str(lock)).try_acquire()


def test_a_build_that_goes_on_keeps_its_lock(lock: Path, tmp_path: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    age(lock, 10 * DEAD_AFTER_SECONDS)
    assert release_dead_builds(tmp_path) == []
    baton.release()


def test_a_young_lock_may_be_another_nodes(lock: Path, tmp_path: Path) -> None:
    lock.touch()
    assert release_dead_builds(tmp_path) == []
    assert lock.exists()
