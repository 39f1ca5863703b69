"""One function over many items in several processes, in the order of the items and with only a few of them on the way."""

import contextlib
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

WORTH_IT = 20_000
"""Items from which on it takes less time than to start the processes, each of which imports what the function needs."""
CHUNK = 64
"""Items that travel to a process at once."""
_function: Callable[[Any], Any] | None = None
"""In a worker: what it computes. Sent once, for it may hold a tokenizer."""


def in_order(function: Callable[[Any], Any], items: Iterable[Any], total: int, num_workers: int) -> Generator[Any, None, None]:
    """function(item) for each of about `total` items, in their order. With one worker, or few items, in this process.

    `function` is sent to new processes, which start without what this one has imported, threads and all. What it raises is raised here.
    Close the generator (contextlib.closing) where something else may fail: that ends the processes. Raises ValueError if one is killed.
    """
    if num_workers == 1 or total < WORTH_IT:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _begin, (function,))
    waiting: deque[Future[list[Any]]] = deque()
    try:
        for chunk in _chunks(iter(items)):
            with _deaf_to_ctrl_c():  # the pool may start a process here
                waiting.append(pool.submit(_compute, chunk))
            if len(waiting) > 2 * num_workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {num_workers} processes was killed, perhaps because memory was short; try --num-workers {max(1, num_workers // 2)}"
        ) from None
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:  # a pool with a dead process waits for the living ones, which wait for work
            worker.kill()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started meanwhile stay so, from their first moment: Ctrl-C reaches all, and this one says what is to be said.

    Blocked, not ignored: here it is heard when the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _chunks(items: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def _begin(function: Callable[[Any], Any]) -> None:
    global _function  # noqa: PLW0603 - a worker has one
    _function = function


def _compute(chunk: list[Any]) -> list[Any]:
    assert _function is not None
    return [_function(item) for item in chunk]
