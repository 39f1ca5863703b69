"""A small process under a watchdog, for test_watchdog.py: watched.py MODE FOLDER. It prints `in` when the mode begins and `out` at the end.

The limits are short, and so are the pauses of watchdog.py.
"""

import ctypes
import sys
import time
from pathlib import Path

from qlora_suite import watchdog

LIMIT, LINGER, GUARD, LOST_PEER, STOP = 1.0, 0.5, 2, 0.4, 0.7


def locked_for_ever(library: ctypes.CDLL) -> None:
    """A call into C that no signal ends: a mutex is taken twice."""
    mutex = ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def beats(watch: watchdog.Watchdog, seconds: float) -> None:
    for i in range(int(seconds * 10)):
        watch.beat(f"step {i}")
        time.sleep(0.1)


def block(mode: str, watch: watchdog.Watchdog) -> None:
    watch.beat("step 12, micro-batch 3")
    if mode == "sleeps":
        time.sleep(1000)
    elif mode == "holds the lock of Python":
        time.sleep(0.4)  # the guard hears of beats from the thread
        locked_for_ever(ctypes.PyDLL(None))
    elif mode == "waits in C":
        locked_for_ever(ctypes.CDLL(None))
    elif mode == "beats":
        beats(watch, 3 * LIMIT)
    elif mode == "is allowed":
        with watch.allow("compiling", minutes=1):
            time.sleep(2 * LIMIT)
    elif mode == "is allowed to hold the lock":
        with watch.allow("compiling", minutes=1):
            ctypes.PyDLL(None).sleep(int(2 * (LIMIT + GUARD)))
    elif mode == "sleeps after it was allowed":
        with watch.allow("compiling", minutes=1):
            time.sleep(0.2)
        time.sleep(1000)
    elif mode == "waits in C while it is allowed":
        with watch.allow("saving", minutes=1):
            time.sleep(2 * LIMIT)
    else:
        assert mode == "ends"


if __name__ == "__main__":
    mode, folder, *processes = sys.argv[1:]
    watchdog.LINGER_SECONDS, watchdog.GUARD_SECONDS = LINGER, GUARD
    watchdog.LOST_PEER_SECONDS, watchdog.STOP_SECONDS, watchdog.TICK_SECONDS = LOST_PEER, STOP, 0.1
    if processes:
        from qlora_suite.preemption import StopRequest

        StopRequest(Path(folder))
    with watchdog.Watchdog(Path(folder), rank=0, limit_seconds=LIMIT, processes=int(*processes or [1])) as watch:
        print("in", flush=True)
        block(mode, watch)
    if mode == "ends":
        time.sleep(2 * LIMIT)
    print("out", flush=True)
