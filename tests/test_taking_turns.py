"""Ranks that load one after another, and that end together: real processes over gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT

from qlora_suite.ranks import EndedByAnotherRank, gathered, taking_turns, together

PROGRAM = str(ROOT / "tests" / "turns_program.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
Outcomes = list[dict[str, dict[str, Any]]]


def outcomes_in(folder: Path, world: int) -> Outcomes:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What happened to two ranks of one node, as the launcher starts them."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", PROGRAM, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return outcomes_in(folder, 2)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcomes, list[int], float]:
    """Ranks 0 and 1 on one node and 2 on another, without a launcher to end those that are left when one is killed.

    Returns what happened to them, their exit codes, and the seconds from the killing to the end of the last.
    """
    folder = tmp_path_factory.mktemp("nodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank, local in enumerate((0, 1, 0)):
        where = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**ENVIRONMENT, **{name: str(value) for name, value in where.items()}}
        command = [sys.executable, PROGRAM, str(folder), "--kill"]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    ranks[0].communicate(timeout=120)
    killed = time.monotonic()
    for rank in ranks[1:]:
        rank.communicate(timeout=60)
    return outcomes_in(folder, 3), [rank.returncode for rank in ranks], time.monotonic() - killed


def overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def test_the_ranks_of_a_node_load_one_after_another(two_ranks: Outcomes) -> None:
    first, second = (outcomes["turns"]["result"] for outcomes in two_ranks)
    assert first[1] <= second[0]


def test_nodes_load_side_by_side(two_nodes: tuple) -> None:
    first, second, elsewhere = (outcomes["turns"]["result"] for outcomes in two_nodes[0])
    assert not overlap(first, second)
    assert overlap(first, elsewhere)


def test_a_rank_that_fails_in_its_turn_ends_those_that_wait_and_those_that_are_done(two_ranks: Outcomes, two_nodes: tuple) -> None:
    for ranks in (two_ranks, two_nodes[0]):
        failed, *others = (outcomes["first fails"] for outcomes in ranks)
        assert (failed["error"], failed["said"]) == ("ValueError", "no such base")
        for other in others:
            assert (other["error"], other["code"]) == ("EndedByAnotherRank", 2)
            assert other["said"] == "rank 0 failed: ValueError: no such base"
        assert others[0]["after"] < 0.38  # it did not load any more
        done, failed = (outcomes["second fails"] for outcomes in ranks[:2])
        assert (failed["error"], failed["said"]) == ("RuntimeError", "it broke")
        assert (done["error"], done["said"]) == ("EndedByAnotherRank", "rank 1 failed: RuntimeError: it broke")


def test_a_mistake_that_all_ranks_find_is_said_once(two_ranks: Outcomes) -> None:
    assert [outcomes["same mistake"]["error"] for outcomes in two_ranks] == ["ValueError", "EndedByAnotherRank"]


def test_memory_that_is_short_on_one_rank_is_short_on_all(two_ranks: Outcomes) -> None:
    first, second = (outcomes["memory"] for outcomes in two_ranks)
    assert (first["error"], second["error"]) == ("OutOfMemoryError", "OutOfMemoryError")
    assert (first["said"], second["said"]) == ("on rank 1: OutOfMemoryError: on the card", "on the card")
    mixed = [outcomes["memory and a mistake"]["error"] for outcomes in two_ranks]
    assert mixed == ["EndedByAnotherRank", "ValueError"]  # trying again with less would not help


def test_values_come_in_the_order_of_the_ranks(two_nodes: tuple) -> None:
    assert [outcomes["gathered"]["result"] for outcomes in two_nodes[0]] == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def test_a_rank_that_is_killed_leaves_nobody_waiting(two_nodes: tuple) -> None:
    _, codes, seconds = two_nodes
    assert codes[0] == -9
    assert all(code > 0 for code in codes[1:])
    assert seconds < 30


def test_one_process_has_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_gather_object", None)
    alone = SimpleNamespace(num_processes=1, process_index=0, local_process_index=0)
    assert gathered(alone, 7) == gathered(None, 7) == [7]
    for block in (together, taking_turns):
        error = ValueError("mine")
        with block(alone):
            pass
        with pytest.raises(ValueError, match="mine") as caught, block(alone):
            raise error
        assert caught.value is error


def test_who_is_ended_by_another_rank_says_nothing_itself() -> None:
    command = [sys.executable, "-c", "from qlora_suite.ranks import EndedByAnotherRank as E; raise E('rank 1 failed: it broke')"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "it broke" not in done.stderr
    assert str(EndedByAnotherRank("rank 1 failed")) == "rank 1 failed"
