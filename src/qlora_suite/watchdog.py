"""The end of a run in which nothing happens any more: a hang, or a process that waits for one that died.

    with explain_lost_peers(), Watchdog(run.path, rank, limit_seconds=900) as watch:
        for step in range(num_steps):
            watch.beat(f"step {step + 1}")          # tens of nanoseconds: at every step, micro-batch, evaluation batch
            ...
            with watch.allow("saving", minutes=30):  # what may take longer than the limit
                ...

Two lines of defence. A thread looks once a second whether there was a beat; after `limit_seconds` without one it writes the stacks of
all threads to stderr and to hung-rank0.txt, marks status.json as failed and ends the process. A thread needs Python's interpreter
lock, which a C call can hold for ever (a kernel launch behind a hung NCCL collective does). So a guard, a small process of its own
(12 MB), waits for a word from the thread; if none comes it has the stacks written by faulthandler's signal handler, which needs no
lock, and kills the process. (faulthandler.dump_traceback_later needs no lock either, but it counts the time in which the process was
stopped: after Ctrl-Z, lunch and `fg` it would end a healthy run.)

Time in which the process was stopped (SIGSTOP, a suspended laptop or queue) does not count. This module imports only the standard
library, for the guard runs it as a script.
"""

import contextlib
import datetime
import faulthandler
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

EXIT_CODE = 124
"""Of a process that its watchdog ended, as `timeout` has it. `accelerate launch` turns each code into 1; status.json has the reason."""
TICK_SECONDS = 1.0
LINGER_SECONDS = 5.0
"""From the report to the end, so that the other processes of the run, whose last beat was a little later, report their stacks too."""
GUARD_SECONDS = 15
"""The guard waits so much longer than the thread, and so long for a thread that reports (the run's disk may be what hangs)."""
LOST_PEER_SECONDS, STOP_SECONDS = 5.0, 20.0
"""After SIGTERM: how long a process of several may be silent if another one of its machine is gone, and if none is. A launcher kills
30 s after its SIGTERM, and then nobody would say why. The longest micro-batch takes some 15 s."""
STACKS_SIGNAL = signal.SIGUSR2
"""`kill -USR2 PID` shows the stacks of a running process, and harms nothing."""


def process_group_timeout(hung_after_minutes: float) -> datetime.timedelta:
    """How long a collective may wait: a little longer than the watchdog, which can say more, and below torch's 30 minutes.

    Raises ValueError unless 0 < hung_after_minutes <= 25.
    """
    if not 0 < hung_after_minutes <= 25:
        raise ValueError(f"stop.hung_after_minutes: {hung_after_minutes:g} is not above 0 and at most 25")
    return datetime.timedelta(minutes=hung_after_minutes + 2)


def set_timeout_of_every_group(timeout: datetime.timedelta) -> None:
    """Of the process groups that exist now. A new group has torch's default (NCCL 10, gloo 30 minutes), not its parent's: DeepSpeed
    makes one that spans all ranks. Call it when all are made; without torch.distributed it does nothing.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


# ---- a process that died ------------------------------------------------------------------------------------------------------


class LostPeerError(RuntimeError):
    """Another process of this run died, or does not answer."""


_BROKEN = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|Application timeout caused pair closure|Timed out waiting \S+ for (recv|send)"
    r"|NCCL error|NCCL communicator was aborted|Watchdog caught collective operation timeout"
)
"""The words of gloo and NCCL. Only a RuntimeError is looked at."""


@contextlib.contextmanager
def explain_lost_peers() -> Iterator[None]:
    """Raises LostPeerError, in one sentence, where a collective inside failed because of another process. Other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostPeerError) or not _is_lost_peer(error):
            raise
        # gloo begins with the place in its source: [.../gloo/transport/tcp/pair.cc:538] Connection closed by peer
        lines = [re.sub(r"^\[\S*:\d+\] ", "", line).strip().rstrip(".") for line in str(error).splitlines()]
        words = next((line for line in lines if _BROKEN.search(line)), lines[0] if lines else "").split(". ")[0][:160]
        what = "does not answer" if re.search(r"tim(ed|e) ?out", str(error), re.IGNORECASE) else "died"
        raise LostPeerError(
            f"another process of this run {what} ({words}); its own message is above, or in hung-rank*.txt; the same command goes on "
            "from the last checkpoint"
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return False
    return isinstance(error, torch.distributed.DistError) or _BROKEN.search(str(error)) is not None


@contextlib.contextmanager
def exit_at_once_on_errors() -> Iterator[None]:
    """Around everything a script does: in a process of several, an error ends the process without Python's and torch's teardown, by
    which alone the others notice. The teardown took up to 7 s under DeepSpeed, and may wait for a collective that never ends.
    """
    try:
        yield
    except BaseException as error:
        torch = sys.modules.get("torch")
        if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if code is None or code == 0:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
        with contextlib.suppress(OSError, ValueError):  # closed by whoever read them
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


# ---- a hang -------------------------------------------------------------------------------------------------------------------


class Watchdog:
    """Ends this process if the block makes no `beat` for `limit_seconds`, and says so in `folder`; `rank` 0 marks its status.json.

    With several `processes` also if it is silent for some seconds after SIGTERM, outside `allow`: a launcher sends it when one of
    them died, and the others may be inside a collective that will never end. (Python runs a signal's handler in the main thread, so
    never there; but it writes the signal's number to a file at once, and that is read here.)
    Only the main thread may enter.
    """

    def __init__(self, folder: Path, rank: int, limit_seconds: float, processes: int = 1) -> None:
        self.folder, self.rank, self._limit = Path(folder).absolute(), rank, limit_seconds
        self._tick = min(TICK_SECONDS, limit_seconds / 4)
        self._words, self._beats, self._allowances = "the start", 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._several = processes > 1
        self._siblings = _children(os.getppid()) if self._several else []
        self._guard: subprocess.Popen[bytes] | None = None

    def beat(self, words: str) -> None:
        """Something happens: `words` say what. Only the thread that entered the block may call it."""
        self._words = words
        self._beats += 1

    @contextlib.contextmanager
    def allow(self, words: str, minutes: float = 0.0) -> Iterator[None]:
        """A phase without beats that may take `minutes`, or the limit if that is longer, and goes on after SIGTERM. All ranks must be
        in it together: one that waits in a collective waits no longer than `process_group_timeout`.
        """
        before = self._limit
        self._limit = max(before, minutes * 60)
        self._allowances += 1
        self.beat(words)
        self._tell_guard(self._limit + GUARD_SECONDS)  # now, for the next call may hold the interpreter's lock
        try:
            yield
        finally:
            self.beat(f"{words}, which is done")  # before the limit falls, or the thread would hold the pause against it
            self._limit = before
            self._allowances -= 1

    def __enter__(self) -> "Watchdog":
        read, self._to_guard = os.pipe()
        os.set_blocking(self._to_guard, False)  # a guard that was stopped must not stop us
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), str(self.folder), str(self.rank)]
        with contextlib.suppress(OSError):  # no more processes allowed: the thread is there for all but a few hangs
            self._guard = subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL)  # noqa: S603
        os.close(read)
        faulthandler.register(STACKS_SIGNAL, file=self._to_guard, all_threads=True)
        self._signals, self._signals_in = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._signals_in, False)
        if self._several:
            self._wakeup_before = signal.set_wakeup_fd(self._signals_in, warn_on_full_buffer=False)
        self._tell_guard(self._limit + GUARD_SECONDS)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()  # for ever, if it is ending the process: who noticed the hang first also gives the exit code
        faulthandler.unregister(STACKS_SIGNAL)
        if self._several:
            signal.set_wakeup_fd(self._wakeup_before)
        for descriptor in (self._to_guard, self._signals, self._signals_in):
            os.close(descriptor)
        if self._guard is not None:
            try:
                self._guard.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._guard.kill()

    def _watch(self) -> None:
        seen, silent, since_stop, stop_asked, before = self._beats, 0.0, 0.0, False, time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self._tick), now  # more has passed only if this process was stopped, too
            limit = self._limit  # before the beats: see allow()
            self._tell_guard(limit + GUARD_SECONDS)
            if self._beats != seen:
                seen, silent, since_stop = self._beats, 0.0, 0.0
            silent += passed
            if silent >= limit:
                self._end(f"hung: nothing for {silent:.0f} s since {self._words}")
            with contextlib.suppress(BlockingIOError):
                stop_asked = signal.SIGTERM in os.read(self._signals, 4096) or stop_asked
            since_stop = since_stop + passed if stop_asked and not self._allowances else 0.0
            if since_stop >= LOST_PEER_SECONDS and (gone := [pid for pid in self._siblings if not _alive(pid)]):
                self._end(f"another process of this run (pid {gone[0]}) died, and nothing for {since_stop:.0f} s since {self._words}")
            if since_stop >= STOP_SECONDS:
                self._end(f"SIGTERM, and nothing for {since_stop:.0f} s since {self._words}")

    def _tell_guard(self, seconds: float) -> None:
        """The guard is to expect the next word within this time."""
        with contextlib.suppress(OSError):  # it is gone, or was stopped for so long that the pipe is full
            os.write(self._to_guard, f"{math.ceil(seconds)} {self._words}\n".encode())

    def _end(self, reason: str) -> None:
        """Report and exit. In this order: what can hang itself comes later."""
        self._tell_guard(GUARD_SECONDS)
        try:
            with tempfile.TemporaryFile() as file:  # in one piece, or the stacks of several ranks mix on the terminal
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read().decode(errors="replace")
            _report(self.folder, self.rank, os.getpid(), reason, stacks)
            time.sleep(LINGER_SECONDS)
        finally:
            os._exit(EXIT_CODE)


def _report(folder: Path, rank: int, pid: int, reason: str, stacks: str) -> None:
    """To stderr, hung-rankN.txt (after what is there: a queue may have started the run again) and, from rank 0, status.json."""
    path = folder / f"hung-rank{rank}.txt"
    when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    header = f"rank {rank} (pid {pid} on {os.uname().nodename}, {when}): {reason}\n"
    end = f"error: rank {rank}: {reason}; its stacks are above and in {path}; the same command goes on from the last checkpoint\n"
    _write_all(2, f"\n{header}{stacks}\n{end}".encode(errors="replace"))  # not sys.stderr: a hung thread may hold its lock
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{header}{stacks}\n")
        if rank == 0:
            _mark_failed(folder / "status.json", f"{reason}; stacks in hung-rank*.txt")
    except (OSError, ValueError) as error:
        _write_all(2, f"rank {rank}: could not note it in {folder} ({error})\n".encode(errors="replace"))


def _mark_failed(path: Path, reason: str) -> None:
    """Without tracking.Status, which belongs to the thread that hangs, perhaps while it writes this file."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if values.get("state") == "finished":
        return  # the result is written: what hung was the way out
    aside = path.with_name(".status.json.watchdog.tmp")
    aside.write_text(json.dumps({**values, "state": "failed", "reason": reason}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def _write_all(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def _children(pid: int) -> list[int]:
    """Processes that a process has started (one of them is the caller). Empty where /proc does not say."""
    pids: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids += map(int, path.read_text().split())
    return pids


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ---- the guard, a process of its own -------------------------------------------------------------------------------------------


def guard(pid: int, folder: Path, rank: int) -> None:
    """Read lines from stdin, `915 step 12`: so many seconds to wait for the next line, and the last beat. Kill the parent `pid` if
    none comes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, STACKS_SIGNAL):
        signal.signal(number, signal.SIG_IGN)  # meant for the run; this ends when the run does
    patience, silent, rest, words, before = math.inf, 0.0, b"", b"the start", time.monotonic()
    while silent <= patience:
        readable = select.select([0], [], [], TICK_SECONDS)[0]
        passed, before = min(time.monotonic() - before, 2 * TICK_SECONDS), time.monotonic()
        if readable:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                number, _, rest_of_line = line.partition(b" ")
                if number.isdigit():
                    patience, silent, words = float(number), 0.0, rest_of_line
                else:
                    _write_all(2, line + b"\n")  # stacks that a person asked for
        elif os.getppid() != pid:  # a child of the run may hold the pipe open
            return
        elif not _stopped(pid):
            silent += passed
    os.kill(pid, STACKS_SIGNAL)
    stacks = b""
    while select.select([0], [], [], 1.0)[0] and (data := os.read(0, 65536)):
        stacks += data
    os.kill(pid, signal.SIGKILL)
    signal.alarm(int(LINGER_SECONDS))  # ends the guard if the folder's disk is what hangs: it still holds stderr open
    why = "a call into C holds Python's lock, or the watchdog could not report"
    reason = f"hung: nothing for {silent:.0f} s, last seen at {words.decode(errors='replace')} ({why})"
    _report(folder, rank, pid, reason, stacks.decode(errors="replace"))


def _stopped(pid: int) -> bool:
    """By a signal, or by a debugger?"""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # no /proc, as on a Mac
        state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603, S607
    return state[:1] in ("T", "t")


if __name__ == "__main__":
    guard(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
