"""A process in which nothing happens ends, says where it stood, and only then: real processes, real signals."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from watched import GUARD, LIMIT, LINGER, LOST_PEER, STOP

from qlora_suite.watchdog import EXIT_CODE, LostPeerError, Watchdog, explain_lost_peers, process_group_timeout, set_timeout_of_every_group

SLACK = 3.0
"""Start of a process, ticks, a busy machine."""


class Watched:
    """tests/watched.py in a mode, with a status.json as a run has it."""

    def __init__(self, folder: Path, mode: str, *arguments: str, state: str = "running") -> None:
        self.folder = folder
        (folder / "status.json").write_text(json.dumps({"state": state, "reason": "", "step": 11, "identity": {"seed": 1}}))
        command = [sys.executable, str(Path(__file__).with_name("watched.py")), mode, str(folder), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True
        )
        assert self.process.stdout.readline() == "in\n"
        self.began = time.monotonic()
        self.pid = self.process.pid
        self.guard = psutil.Process(self.pid).children()[0]

    def end(self, timeout: float = 60) -> int:
        """Wait; its guard holds stderr, so it must be gone too. Returns the exit code."""
        self.stdout, self.stderr = self.process.communicate(timeout=timeout)
        self.seconds = time.monotonic() - self.began
        while self.guard.is_running() and self.guard.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - self.began - self.seconds < 1, "its guard is still there"
            time.sleep(0.01)
        return self.process.returncode

    @property
    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())

    @property
    def report(self) -> str:
        return (self.folder / "hung-rank0.txt").read_text()

    def went_on(self) -> bool:
        """Ended by itself, and nothing was said."""
        silent = not (self.folder / "hung-rank0.txt").exists() and self.status["state"] == "running"
        return self.end() == 0 and self.stdout == "out\n" and self.stderr == "" and silent


Start = Callable[..., Watched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Watched] = []

    def start(mode: str, *arguments: str, **options: str) -> Watched:
        started.append(Watched(tmp_path, mode, *arguments, **options))
        return started[-1]

    yield start
    for watched in started:  # a test that failed leaves no process behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(watched.pid, signal.SIGKILL)


# --- a hang


def test_a_hang_ends_with_the_stacks_and_a_reason(start: Start) -> None:
    watched = start("sleeps")
    assert watched.end() == EXIT_CODE
    assert LIMIT <= watched.seconds < LIMIT + LINGER + SLACK
    assert watched.report.startswith(f"rank 0 (pid {watched.pid} on {os.uname().nodename}, ")
    assert "hung: nothing for 1 s since step 12, micro-batch 3\n" in watched.report
    assert "watched.py" in watched.report
    assert " in block" in watched.report, "the main thread's stack"
    assert " in _watch" in watched.report, "every thread's"
    assert watched.report.strip() in watched.stderr
    assert watched.stderr.splitlines()[-1].startswith("error: rank 0: hung: nothing for 1 s since step 12, micro-batch 3; ")
    reason = "hung: nothing for 1 s since step 12, micro-batch 3; stacks in hung-rank*.txt"
    assert watched.status == {"state": "failed", "reason": reason, "step": 11, "identity": {"seed": 1}}


def test_a_hang_that_holds_the_lock_of_python_ends_too(start: Start) -> None:
    """No thread can run then: the guard has the stacks written, and kills."""
    watched = start("holds the lock of Python")
    assert watched.end() == -signal.SIGKILL
    assert watched.seconds < LIMIT + GUARD + 2 * SLACK
    assert " in locked_for_ever" in watched.report
    assert "last seen at step 12, micro-batch 3 (a call into C holds Python's lock" in watched.report
    assert watched.report.strip() in watched.stderr
    assert watched.status["state"] == "failed"
    assert watched.status["reason"].startswith("hung: nothing for ")


def test_it_ends_where_the_report_itself_hangs(start: Start, tmp_path: Path) -> None:
    """A dead disk is a reason to hang; here a FIFO that nobody reads."""
    os.mkfifo(tmp_path / "hung-rank0.txt")
    watched = start("sleeps")
    assert watched.end() == -signal.SIGKILL
    assert watched.seconds < LIMIT + GUARD + 5 + 2 * SLACK
    assert "hung: nothing for 1 s since step 12, micro-batch 3\n" in watched.stderr


def test_reports_are_kept_and_a_finished_run_stays_finished(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hung-rank0.txt").write_text("of an attempt before\n")
    watched = start("sleeps", state="finished")
    assert watched.end() == EXIT_CODE
    assert watched.report.startswith("of an attempt before\nrank 0")
    assert watched.status["state"] == "finished"


def test_a_hang_is_noticed_after_a_long_phase(start: Start) -> None:
    watched = start("sleeps after it was allowed")
    assert watched.end() == EXIT_CODE
    assert watched.seconds < LIMIT + LINGER + SLACK
    assert "since compiling, which is done" in watched.status["reason"]


# --- no hang


@pytest.mark.parametrize("mode", ["beats", "is allowed", "is allowed to hold the lock", "ends"])
def test_what_is_no_hang_goes_on(start: Start, mode: str) -> None:
    """Beats; phases that may take longer; and whatever comes after the block."""
    assert start(mode).went_on()


@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "process and guard"])
def test_time_in_which_it_was_stopped_does_not_count(start: Start, whole_group: bool) -> None:
    """kill -STOP, or Ctrl-Z and a suspended queue, which stop the guard too; longer than the limits of both."""
    watched = start("beats")
    time.sleep(0.3)
    send = os.killpg if whole_group else os.kill
    send(watched.pid, signal.SIGSTOP)
    time.sleep(LIMIT + GUARD + 3)
    send(watched.pid, signal.SIGCONT)
    assert watched.went_on()


def test_the_guard_ends_with_its_process(start: Start) -> None:
    watched = start("beats")
    watched.process.kill()
    assert watched.end(timeout=SLACK) == -signal.SIGKILL


def test_it_goes_on_without_its_guard(start: Start) -> None:
    watched = start("beats")
    watched.guard.kill()
    assert watched.went_on()


def test_a_signal_shows_the_stacks_of_a_running_process(start: Start) -> None:
    watched = start("beats")
    time.sleep(0.3)
    os.kill(watched.pid, signal.SIGUSR2)
    assert watched.end() == 0
    assert " in beats" in watched.stderr
    assert watched.status["state"] == "running"


def test_a_beat_costs_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 100) as watch:
        seconds = min(timeit.repeat(lambda: watch.beat("step 1"), number=10_000, repeat=5)) / 10_000
    assert seconds < 2e-6
    assert not list(tmp_path.iterdir())


# --- a process that died


@pytest.fixture
def sibling() -> Iterator[subprocess.Popen]:
    """Another child of what started the watched process, as the ranks of a launcher are."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()


def lose(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("dead", [True, False], ids=["on this machine", "on another"])
def test_a_rank_in_a_collective_does_not_wait_for_a_dead_one(start: Start, sibling: subprocess.Popen, dead: bool) -> None:
    """As a launcher does it: one process is gone, the others get SIGTERM. No Python code runs in the main thread any more."""
    watched = start("waits in C", "2")
    if dead:
        lose(sibling)
    os.kill(watched.pid, signal.SIGTERM)
    assert watched.end() == EXIT_CODE
    assert (LOST_PEER if dead else STOP) <= watched.seconds < STOP + LINGER + SLACK
    what = f"another process of this run (pid {sibling.pid}) died" if dead else "SIGTERM"
    assert re.fullmatch(
        rf"{re.escape(what)}, and nothing for \d s since step 12, micro-batch 3; stacks in hung-rank\*.txt", watched.status["reason"]
    )
    assert " in locked_for_ever" in watched.report


@pytest.mark.parametrize("mode", ["beats", "waits in C while it is allowed"])
def test_a_request_to_stop_is_no_hang(start: Start, sibling: subprocess.Popen, mode: str) -> None:
    """A preempted run goes on to the end of its step, and saves."""
    watched = start(mode, "2")
    lose(sibling)
    os.kill(watched.pid, signal.SIGTERM)
    assert watched.end() == 0
    assert watched.stdout == "out\n"
    assert watched.stderr == "\nSIGTERM: saving after this step; wait for the word `stopped`\n"


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4431"
NCCL = "NCCL error in: ../torch/csrc/ProcessGroupNCCL.cpp:77, remote process exited or there was a network error\nncclRemoteError: ..."
LATE = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1020000ms for recv operation to complete"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(GLOO), "another process of this run died (Connection closed by peer [127.0.0.1]:4431); its own message is above"),
        (RuntimeError(LATE), "another process of this run does not answer (Timed out waiting 1020000ms for recv operation to complete)"),
        (torch.distributed.DistBackendError(NCCL), "another process of this run died (NCCL error in: "),
        (torch.distributed.DistNetworkError("Connection was likely closed"), "another process of this run died (Connection was likely"),
    ],
    ids=["gloo", "gloo timeout", "NCCL", "store"],
)
def test_a_lost_process_is_explained_in_a_sentence(error: Exception, said: str) -> None:
    with pytest.raises(LostPeerError) as caught, explain_lost_peers(), explain_lost_peers():
        raise error
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("the same command goes on from the last checkpoint")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ValueError("Connection closed by peer"),
        OSError("No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_other_errors_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explain_lost_peers():
        raise error
    assert caught.value is error


# --- the process group


def test_the_process_group_waits_a_little_longer_and_less_than_half_an_hour() -> None:
    for minutes in (0.1, 1, 15, 25):
        assert timedelta(minutes=minutes) + timedelta(minutes=1) < process_group_timeout(minutes) < timedelta(minutes=30)
    for minutes in (0, -1, 26, float("nan")):
        with pytest.raises(ValueError, match=r"stop\.hung_after_minutes"):
            process_group_timeout(minutes)


def test_groups_that_a_library_makes_wait_no_longer() -> None:
    """DeepSpeed's group over all ranks would keep torch's default, half an hour over gloo."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        backends = [g._get_backend(torch.device("cpu")) for g in (group, torch.distributed.group.WORLD)]
        assert [backend.options._timeout for backend in backends] == [timedelta(minutes=30)] * 2
        set_timeout_of_every_group(process_group_timeout(15))
        assert [backend.options._timeout for backend in backends] == [timedelta(minutes=17)] * 2
    finally:
        torch.distributed.destroy_process_group()
    set_timeout_of_every_group(process_group_timeout(15))  # one process: there is none
