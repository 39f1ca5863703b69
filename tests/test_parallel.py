"""Parallel: several processes give what one gives, in the same order, and only a little of it is on the way."""

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from math import factorial, isqrt
from pathlib import Path

import pytest
from conftest import MakeRecipe

from qlora_suite import parallel
from qlora_suite.files import file_table
from qlora_suite.parallel import CHUNK, in_order
from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WORTH_IT", 0)


class Pulled:
    """Numbers, and how many of them were asked for."""

    def __init__(self, count: int | None = None) -> None:
        self.count, self.numbers = 0, itertools.count() if count is None else iter(range(count))

    def __iter__(self) -> Iterator[int]:
        for number in self.numbers:
            self.count += 1
            yield number


# The functions are the standard library's, so that a new process need not import this file and with it torch.


@pytest.mark.parametrize("count", [0, 1, CHUNK, CHUNK + 1, 20 * CHUNK + 7])
def test_two_workers_give_what_one_gives_in_the_same_order(count):
    alone, together = (list(in_order(isqrt, iter(range(count)), count, workers)) for workers in (1, 2))
    assert alone == together == [isqrt(number) for number in range(count)]


def test_only_a_bounded_number_of_items_is_pulled_ahead():
    endless = Pulled()
    results = in_order(isqrt, endless, 10**9, 2)
    for taken in range(1, 10 * CHUNK):
        assert next(results) == isqrt(taken - 1)
        assert endless.count - taken <= 5 * CHUNK  # two chunks for each worker, and the one that is being handed out
    results.close()
    assert endless.count < 16 * CHUNK


def test_several_processes_work_but_not_for_few_items(monkeypatch):
    items = ["/proc/self"] * 10 * CHUNK
    assert str(os.getpid()) not in set(in_order(os.readlink, items, len(items), 2))
    monkeypatch.setattr(parallel, "WORTH_IT", len(items) + 1)
    assert set(in_order(os.readlink, items, len(items), 2)) == {str(os.getpid())}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_function_raises_is_raised_here(workers):
    with pytest.raises(ValueError, match="not defined for negative"):
        list(in_order(factorial, (300 - number for number in range(1000)), 1000, workers))


def test_what_the_items_raise_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(in_order(isqrt, (1 // (300 - number) for number in range(1000)), 1000, 2))


@pytest.mark.parametrize("keys", [(), ("data.policy=preference_pairs", "data.packing=false", "dpo={}")], ids=["conversations", "pairs"])
def test_the_prepared_folder_does_not_depend_on_the_number_of_workers(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    monkeypatch.setattr(parallel, "WORTH_IT", 100)  # train alone: each start of processes that import transformers takes seconds
    tables, manifests = [], []
    for workers in (1, 2):
        recipe = load(make_recipe(f"data.prepared={tmp_path / f'prepared{workers}'}", "data.weight=1.5", *keys))
        with selected(recipe) as selection:
            assert len(selection.splits["train"]) > 2 * CHUNK
            prepare(recipe, selection, num_workers=workers)
        folder = Path(recipe.data.prepared)
        tables.append(file_table(folder, but="manifest.json"))
        manifests.append(json.loads((folder / "manifest.json").read_text()))
    assert tables[0] == tables[1]
    assert manifests[0] == manifests[1]
    assert {"train.arrow", "dev.arrow", "validation.arrow", "bad_rows.jsonl"} <= tables[0].keys()


def test_a_killed_worker_is_one_sentence_and_nothing_hangs():
    def kill_one() -> Iterator[int]:
        for number in range(10**6):
            if number == 20 * CHUNK:
                os.kill(min(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)
            yield number

    with pytest.raises(ValueError, match="one of 2 processes was killed, perhaps because memory was short; try --num-workers 1"):
        list(in_order(isqrt, kill_one(), 10**6, 2))
    while multiprocessing.active_children():  # the pool's own thread is about to bury them
        time.sleep(0.01)


def test_workers_never_hear_ctrl_c_and_this_process_does_again():
    blocked = partial(signal.pthread_sigmask, signal.SIG_BLOCK)
    assert all(signal.SIGINT in of_worker for of_worker in in_order(blocked, [()] * 40 * CHUNK, 40 * CHUNK, 2))
    assert signal.SIGINT not in blocked(())
