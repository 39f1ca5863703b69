"""What the processes of one job tell each other, so that none waits for another that has gone another way.

    with together(accelerator): ...          an error on one rank is an error on all of them
    with taking_turns(accelerator): ...      the same, and the ranks of a node go one after another
    gathered(accelerator, value)             every rank's value, in the order of the ranks

All ranks come to the same of these, in the same order, and a block has no collective in it: a rank that fails there leaves by the
end of the block like the others. On one process all three do nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator


class EndedByAnotherRank(SystemExit):
    """Ends this process without a word of its own: the rank that failed says why. Exit code 2, as for a person's mistake."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.code = 2


def gathered(accelerator: Accelerator | None, value: Any) -> list[Any]:
    """Every rank's `value` (any object that can be pickled), in the order of the ranks. `None` stands for one process."""
    if _alone(accelerator):
        return [value]
    values = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together(accelerator: Accelerator | None) -> Iterator[None]:
    """A block that ends well on every rank or on none.

    The first rank that failed raises what it found; the others raise EndedByAnotherRank, those too that found the same mistake, so
    that it is said once. Memory that is short on one rank is short on all: each raises torch.OutOfMemoryError, and the caller may
    try again with less. KeyboardInterrupt and SystemExit go on at once, for a process that was told to end waits for nobody.
    """
    if _alone(accelerator):
        yield
        return
    error = None
    try:
        try:
            yield
        except Exception as caught:
            error = caught
        _agree(accelerator, error)
    finally:
        del error  # the traceback holds on to this frame, and through others to tensors


@contextlib.contextmanager
def taking_turns(accelerator: Accelerator) -> Iterator[None]:
    """`together`, one rank of a node after another: eight ranks that load a model need the host memory of one.

    Nodes go side by side. Between two turns all ranks meet, so that a rank waits for one turn at a time (a collective has a time
    limit), and a rank that fails ends the others there, before they have loaded anything.
    """
    if _alone(accelerator):
        yield
        return
    mine = accelerator.local_process_index
    turns = max(gathered(accelerator, mine)) + 1  # the same number for all, where nodes have unequally many ranks
    for _ in range(mine):
        _agree(accelerator, None)
    with together(accelerator):
        yield
    for _ in range(turns - mine - 1):
        _agree(accelerator, None)


def _alone(accelerator: Accelerator | None) -> bool:
    return accelerator is None or accelerator.num_processes == 1


def _agree(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise on every rank if there is an error on one."""
    short = isinstance(error, torch.OutOfMemoryError)
    found = gathered(accelerator, None if error is None else (short, f"{type(error).__name__}: {error}"))
    failed = [(rank, *complaint) for rank, complaint in enumerate(found) if complaint]
    if not failed:
        return
    rank, only_memory, said = next((f for f in failed if not f[1]), failed[0])
    if only_memory:
        raise error if short else torch.OutOfMemoryError(f"on rank {rank}: {said}")
    if rank == accelerator.process_index:
        raise error
    raise EndedByAnotherRank(f"rank {rank} failed: {said}") from None
