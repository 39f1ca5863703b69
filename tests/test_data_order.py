"""Which rows a step sees is a function of the seed and the step, whatever the machine and the micro-batch."""

import hashlib
import itertools
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_suite.batches import EMPTY, GROUP, POOL, Limit, Order, check_division, micro_batches, permutation

GOLDEN = {
    "plain": [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7],
    "other": [3, 1, 7, 8, 10, 4, 0, 6, 9, 5, 2, 11],
    "grouped": [
        24,
        13,
        2,
        32,
        21,
        10,
        29,
        18,
        36,
        25,
        14,
        3,
        33,
        22,
        11,
        0,
        7,
        37,
        26,
        15,
        4,
        34,
        23,
        12,
        30,
        19,
        8,
        38,
        27,
        16,
        5,
        35,
        1,
        31,
        20,
        9,
        39,
        28,
        17,
        6,
    ],
    "digest": "45884fd0fc31ca15e1c88ae3c15a33ab9b6c8d78799136bf6c9c2ba784aa0c19",
}
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def positions(order: Order) -> list[int]:
    """The rows of the whole run, step after step, without the empty places."""
    return [row for step in range(order.num_steps) for row in order.rows_for_step(step) if row != EMPTY]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 70), st.integers(1, 3), st.booleans(), st.integers(0, 2**31 - 1))
def test_each_row_comes_once_an_epoch(lengths: list[int], rows_per_step: int, epochs: int, grouped: bool, seed: int) -> None:
    order = Order(seed, lengths, rows_per_step, epochs, group_by_length=grouped)
    assert Counter(positions(order)) == dict.fromkeys(range(len(lengths)), epochs)
    assert all(len(order.rows_for_step(step)) == rows_per_step for step in range(order.num_steps))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 70), st.integers(1, 4), st.booleans(), st.randoms())
def test_a_step_depends_on_seed_and_step_alone(lengths: list[int], rows_per_step: int, epochs: int, grouped: bool, random) -> None:
    def fresh() -> Order:
        return Order(3, lengths, rows_per_step, epochs, group_by_length=grouped)

    in_order = [fresh().rows_for_step(step) for step in range(fresh().num_steps)]
    steps = list(range(len(in_order)))
    random.shuffle(steps)
    one = fresh()
    assert {step: one.rows_for_step(step) for step in steps} == dict(enumerate(in_order))


def test_another_seed_or_epoch_is_another_order() -> None:
    assert not np.array_equal(permutation(0, 0, 50), permutation(1, 0, 50))
    assert not np.array_equal(permutation(0, 0, 50), permutation(0, 1, 50))


@pytest.mark.parametrize("grouped", [False, True])
def test_max_steps_ends_the_same_order_earlier(grouped: bool) -> None:
    lengths = [7, 3, 5, 1, 9, 2, 8]
    whole, short = (Order(0, lengths, 2, 2, max_steps=m, group_by_length=grouped) for m in (None, 3))
    assert (whole.num_steps, short.num_steps) == (7, 3)
    assert [short.rows_for_step(s) for s in range(3)] == [whole.rows_for_step(s) for s in range(3)]


def test_a_step_crosses_epochs_and_the_last_one_is_filled_with_empty_places() -> None:
    order = Order(seed=0, lengths=[1] * 5, rows_per_step=4, epochs=2)
    first, second = (permutation(0, epoch, 5).tolist() for epoch in (0, 1))
    assert order.num_steps == 3
    assert order.rows_for_step(0) == sorted(first[:4])
    assert order.rows_for_step(1) == sorted([first[4], *second[:3]])
    assert order.rows_for_step(2) == [*sorted(second[3:]), EMPTY, EMPTY]


def test_a_step_may_hold_several_epochs() -> None:
    assert Order(seed=0, lengths=[1, 2], rows_per_step=5, epochs=3).rows_for_step(0).count(EMPTY) == 0
    whole = Order(seed=0, lengths=[1, 2], rows_per_step=6, epochs=3).rows_for_step(0)
    assert whole == [1, 1, 1, 0, 0, 0], "longest first"


@pytest.mark.parametrize(("epochs", "count"), [(0.5, 5), (0.01, 1), (1.3, 13), (2.0, 20)])
def test_a_part_of_an_epoch_is_its_first_rows(epochs: float, count: int) -> None:
    order = Order(seed=1, lengths=[1] * 10, rows_per_step=3, epochs=epochs)
    run = [*permutation(1, 0, 10).tolist(), *permutation(1, 1, 10).tolist()]
    assert order.num_positions == count
    assert order.num_steps == math.ceil(count / 3)
    assert sorted(positions(order)) == sorted(run[:count])


def test_grouping_keeps_neighbours_alike_and_depends_on_lengths_and_seed_alone() -> None:
    lengths = np.random.Generator(np.random.Philox(0)).integers(1, 1000, size=2000).tolist()
    grouped = permutation(7, 0, 2000, lengths)
    assert np.array_equal(grouped, permutation(7, 0, 2000, np.asarray(lengths)))
    assert sorted(grouped) == list(range(2000))

    def places(order: np.ndarray) -> int:
        """Padding included, if `GROUP` neighbours go through together."""
        return sum(GROUP * max(lengths[row] for row in order[i : i + GROUP]) for i in range(0, 2000, GROUP))

    assert places(grouped) < 1.1 * sum(lengths) < 1.5 * sum(lengths) < places(permutation(7, 0, 2000))
    # The groups themselves are shuffled: no long way from long to short.
    means = [np.mean([lengths[row] for row in grouped[i : i + GROUP]]) for i in range(0, 2000, GROUP)]
    assert sum(a < b for a, b in pairwise(means)) > 80


def test_the_order_of_a_run_survives_an_upgrade() -> None:
    """Frozen: another version of numpy, or a change here, must not give a resumed run other data."""
    assert permutation(0, 0, 12).tolist() == GOLDEN["plain"]
    assert permutation(1234, 3, 12).tolist() == GOLDEN["other"]
    lengths = [(i * 37) % 101 + 1 for i in range(40)]
    assert permutation(5, 1, 40, lengths).tolist() == GOLDEN["grouped"]
    digest = hashlib.sha256(permutation(2**31 - 1, 9, 5000).astype("<i8").tobytes()).hexdigest()
    assert digest == GOLDEN["digest"]


# --- a step's rows -> micro-batches


@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 600), st.data())
def test_micro_batches_hold_the_steps_rows_and_stay_within_the_limit(
    lengths: list[int], world: int, per_rank: int, rows: int, tokens: int, data: st.DataObject
) -> None:
    order = Order(0, lengths, world * per_rank, 1.5)
    step = order.rows_for_step(data.draw(st.integers(0, order.num_steps - 1)))
    limit = Limit(rows, tokens)
    ranks = [micro_batches(step, lengths, limit, rank, world) for rank in range(world)]
    assert len(set(map(len, ranks))) == 1, "another number of micro-batches would hang an engine"
    everything = Counter(row for share in ranks for micro in share for row in micro if row != EMPTY)
    assert everything == Counter(row for row in step if row != EMPTY)
    for micro in itertools.chain(*ranks):
        places = len(micro) * max(lengths[row] if row != EMPTY else 1 for row in micro)
        assert 1 <= len(micro) <= rows
        assert len(micro) == 1 or places <= tokens


def test_ranks_get_like_lengths() -> None:
    lengths = list(range(1, 65))
    step = Order(0, lengths, 64, 1).rows_for_step(0)
    sums = [sum(lengths[row] for m in micro_batches(step, lengths, Limit(8, 10_000), rank, 4) for row in m) for rank in range(4)]
    assert max(sums) - min(sums) < 64


def test_a_share_that_does_not_divide_is_told_with_the_arithmetic() -> None:
    check_division(16, 4, 4)
    check_division(16, 2, "auto")
    with pytest.raises(ValueError, match=r"train\.rows_per_step is 2 but there are 4 processes"):
        check_division(2, 4, "auto")
    with pytest.raises(ValueError, match="cannot be shared out") as caught:
        check_division(20, 2, 4)
    assert str(caught.value) == (
        "train.rows_per_step = 20 cannot be shared out: 2 processes x micro-batch 4 = 8 rows at a time, and 20 / 8 leaves 4; use 16 or 24"
    )
    with pytest.raises(ValueError, match=r"use 8$"):
        check_division(4, 2, 4)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 511, 512, 513, 1030, 5000])
def test_grouping_by_length_sorts_pools_and_shuffles_their_groups(num_rows: int) -> None:
    """As it is said in words, one pool and one group after another: no run of before may find its rows in another order."""
    lengths = np.random.default_rng(num_rows).integers(1, 60, num_rows)
    order = permutation(3, 2, num_rows)
    pools = [order[i : i + POOL] for i in range(0, num_rows, POOL)]
    pools = [pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools]
    groups = [pool[i : i + GROUP] for pool in pools for i in range(0, len(pool), GROUP)]
    shuffled = np.argsort(np.random.Philox(key=[3, 5]).random_raw(len(groups)), kind="stable")
    assert permutation(3, 2, num_rows, lengths.tolist()).tolist() == np.concatenate([groups[i] for i in shuffled]).tolist()
