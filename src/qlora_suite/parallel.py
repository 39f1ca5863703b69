"""One function over many items in several processes, in the order of the items and with only a few of them on the way."""

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

WORTH_IT = 20_000
"""Items from which on it takes less time than to start the processes, each of which imports what the function needs."""
CHUNK = 64
"""Items that travel to a process at once."""
_function: Callable[[Any], Any] | None = None
"""In a worker: what it computes. Sent once, for it may hold a tokenizer."""


def in_order(function: Callable[[Any], Any], items: Iterable[Any], total: int, num_workers: int) -> Iterator[Any]:
    """function(item) for each of about `total` items, in their order. With one worker, or few items, in this process.

    `function` is sent to new processes, which start without what this one has imported, threads and all. What it raises is raised here.
    """
    if num_workers == 1 or total < WORTH_IT:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _begin, (function,)) as pool:
        waiting: deque[Future[list[Any]]] = deque()
        try:
            for chunk in _chunks(iter(items)):
                waiting.append(pool.submit(_compute, chunk))
                if len(waiting) > 2 * num_workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _chunks(items: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def _begin(function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one says what is to be said
    global _function  # noqa: PLW0603 - a worker has one
    _function = function


def _compute(chunk: list[Any]) -> list[Any]:
    assert _function is not None
    return [_function(item) for item in chunk]
