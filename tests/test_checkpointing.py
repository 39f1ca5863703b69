"""Layers that recompute their activations: how many, which, what it costs and what it saves; and that nothing else changes."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import MakeRecipe, write_recipe
from in_process import prepared
from test_memory_estimate import CPU, MARKERS, saved_bytes
from tiny_models import tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qlora_suite import checkpoint, micro_batch
from qlora_suite.batches import Limit
from qlora_suite.engine import seed_for
from qlora_suite.launched_runs import EQUAL, Case, difference, launch
from qlora_suite.loss import Batch, collate, summed_loss
from qlora_suite.micro_batch import SHARES, by_speed, choose, cost, in_words, recomputing, set_checkpointing
from qlora_suite.recipe import Train
from qlora_suite.recipe_file import load
from qlora_suite.trainable import build_model

CUDA = torch.device("cuda")
"""Named, not used: what fits is said by the tests."""


# --- which layers


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, "........"),
        (0.01, "R......."),
        (0.25, "RR......"),
        (0.5, "R.R.R.R."),
        (0.75, "RRR.RRR."),
        (0.9, "RRRRRRRR"),
        (1.0, "RRRRRRRR"),
    ],
)
def test_layers_are_evenly_spread_and_the_last_is_kept(share: float, expected: str) -> None:
    found = "".join("R" if recomputes else "." for recomputes in recomputing(8, share))
    assert found.count("R") == expected.count("R")
    if share in (0.0, 0.5, 0.75, 1.0):
        assert found == expected
    if share < 0.9:
        assert found[-1] == "."


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7, 30, 32, 80])
def test_as_many_layers_as_asked_for(num_layers: int) -> None:
    for part in range(num_layers + 1):
        assert sum(recomputing(num_layers, part / num_layers)) == part
    assert sum(recomputing(25, 0.28)) == 7  # 25 x 0.28 is 7.000000000000001


def test_a_share_is_set_and_taken_back_layer_by_layer() -> None:
    model = tiny("llama").train()
    for share, expected in ((0.5, [True, False]), (1.0, [True, True]), (0.1, [True, False]), (0.0, [False, False])):
        set_checkpointing(model, share)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == expected


def test_a_model_without_such_layers_is_refused() -> None:
    model = tiny("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match=r"train\.gradient_checkpointing: 0\.5 needs layers that recompute one by one, which LlamaForCaus"):
        set_checkpointing(model, 0.5)


def test_the_words_for_it() -> None:
    assert [in_words(share) for share in (0.0, 0.125, 1.0)] == ["off", "on in 12.5 % of the layers", "on"]


# --- what it costs and saves


def step(net: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The loss and every gradient."""
    net.zero_grad(set_to_none=True)
    seed_for(0, 1)
    loss = summed_loss(net, batch)
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters() if p.grad is not None]


def packed_batch() -> Batch:
    ids = torch.arange(40) % 100
    rows = [{"input_ids": ids, "supervised": torch.arange(40) % 20 > 4, "lengths": [20, 20]}]
    return collate([*rows, {"input_ids": ids[:30], "supervised": torch.arange(30) > 4, "lengths": [30]}], 0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_losses_and_gradients_are_the_same_to_the_last_bit(make_recipe: MakeRecipe, quantization: str, dropout: float) -> None:
    recipe = load(make_recipe(f"model.quantization={quantization}", f"adapter.dropout={dropout}"), [])
    net, base = build_model(recipe, {"role_markers": MARKERS}, torch.float32, CPU)
    net.train()
    found = {}
    for share in (0.0, 0.5, 1.0):
        set_checkpointing(base, share)
        found[share] = step(net, packed_batch())
    loss, gradients = found[0.0]
    assert len(gradients) > 20
    for other_loss, others in (found[0.5], found[1.0]):
        assert other_loss.equal(loss)
        assert len(others) == len(gradients)
        assert all(a.equal(b) for a, b in zip(gradients, others, strict=True))


def test_each_layer_costs_its_forward_pass_and_saves_its_activations(make_recipe: MakeRecipe) -> None:
    """And nothing else: the gradient of the embedding's output, which nobody wants, is not computed."""
    recipe = load(make_recipe("model.quantization=none"), [])
    net, base = build_model(recipe, {"role_markers": {**MARKERS, "token_ids": []}}, torch.float32, CPU)
    net.train()
    batch = packed_batch()
    operations, saved = [], []
    for share in (0.0, 0.5, 1.0):
        set_checkpointing(base, share)
        with FlopCounterMode(display=False) as counted:
            step(net, batch)
        operations.append(counted.get_total_flops())
        saved.append(saved_bytes(net, lambda: base.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        base.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    forward = counted.get_total_flops()
    again = operations[2] - operations[0]
    assert 0.98 * forward < again <= forward, "a layer's last product, whose result no gradient needs, is left out"
    assert operations[1] - operations[0] == again / 2
    assert min(saved[0] - saved[1], saved[1] - saved[2]) > 0.4 * saved[0]


# --- which is chosen


def chosen(train: Train, longest: int, room: float, rows: int = 8) -> tuple[int, float, list[tuple[int, float]]]:
    """(rows at once, share, what was tried) with room for so many rows' activations; a layer that recomputes keeps a tenth."""
    tried = []

    def trial(num_rows: int, share: float) -> None:
        tried.append((num_rows, share))
        if num_rows * (1 - 0.9 * share) > room:
            raise torch.OutOfMemoryError

    def fits(trial: Callable[[], None], *_: object) -> bool:
        try:
            trial()
        except torch.OutOfMemoryError:
            return False
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "_fits", fits)
        limit, share = choose(train, rows, longest, CUDA, trial, lambda n: n)
    return limit.tokens // longest, share, tried


@pytest.mark.parametrize(
    ("longest", "room", "expected"),
    [
        (2048, 8, (8, 0.0)),
        (2048, 7, (4, 0.0)),
        (2048, 1, (1, 0.0)),  # a smaller micro-batch before any recomputing
        (2048, 0.9, (1, 0.25)),
        (2048, 0.5, (1, 0.75)),
        (2048, 0.1, (1, 1.0)),
        (128, 8, (8, 0.0)),
        (300, 1.6, (2, 0.25)),  # 2.25 x (1 + 200 / 600) = 3.0 against 2 x (1 + 200 / 300) = 3.3: weights are made ready half as often
        (128, 1, (8, 1.0)),
    ],
)
def test_the_fastest_that_fits(longest: int, room: float, expected: tuple[int, float]) -> None:
    found = chosen(Train(rows_per_step=8), longest, room)
    assert found[:2] == expected
    fitting = [way for way in by_speed(Train(rows_per_step=8), 8, longest) if way[0] * (1 - 0.9 * way[1]) <= room]
    assert cost(expected[0] * longest, expected[1]) == min(cost(rows * longest, share) for rows, share in fitting)


def test_what_one_row_is_too_much_for_is_not_tried_with_more() -> None:
    *_, tried = chosen(Train(rows_per_step=8), 2048, 0.3)
    assert tried.count((1, 0.0)) == tried.count((1, 1.0)) == 1
    assert {rows for rows, share in tried if share < 0.75} == {1}
    assert len(tried) <= len(SHARES) + 4


def test_what_the_recipe_says_is_not_tried_and_a_share_of_its_own_is_kept() -> None:
    assert chosen(Train(rows_per_step=8, micro_batch=2, gradient_checkpointing=0.3), 2048, 0.0) == (2, 0.3, [])
    assert chosen(Train(rows_per_step=8, gradient_checkpointing=0.5), 2048, 1.1)[:2] == (2, 0.5)
    assert chosen(Train(rows_per_step=8, gradient_checkpointing=True), 2048, 0.5)[:2] == (4, 1.0)
    assert choose(Train(rows_per_step=8), 8, 512, CPU, chosen, min) == (Limit(8, 1024), 0.0)
    assert choose(Train(rows_per_step=8, gradient_checkpointing=True), 8, 512, CPU, chosen, min) == (Limit(8, 1024), 1.0)


@pytest.mark.parametrize("rooms", [(8.0, 8.0), (8.0, 0.9), (0.5, 3.0, 0.9), (0.05, 8.0)])
def test_ranks_whose_memory_differs_agree(rooms: Sequence[float]) -> None:
    """Each tries at its own pace; all ask one another equally often, and take what fits the smallest."""
    ways = by_speed(Train(rows_per_step=8), 8, 128)
    said, barrier, found = [0] * len(rooms), threading.Barrier(len(rooms), timeout=20), [-1] * len(rooms)

    def rank(i: int) -> None:
        def agree(value: int) -> int:
            said[i] = value
            barrier.wait()
            least = min(said)
            barrier.wait()
            return least

        found[i] = micro_batch._first_that_fits(ways, lambda rows, share: rows * (1 - 0.9 * share) <= rooms[i], agree)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(rooms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = next((i for i, (rows, share) in enumerate(ways) if rows * (1 - 0.9 * share) <= min(rooms)), len(ways))
    assert found == [expected] * len(rooms)


def test_checkpoints_from_before_there_were_shares_are_read() -> None:
    good = checkpoint.GOOD["micro_batch"]
    assert all(good({"rows": 1, "tokens": 9, "checkpointing": value}) for value in (True, False, 0, 0.5, 1.0))
    assert not any(good({"rows": 1, "tokens": 9, "checkpointing": value}) for value in (2, -0.5, "auto", None))


# --- on engines that shard the weights


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_sharded_weights_learn_the_same_with_any_share(engine: str, tmp_path: Path, tiny_base: Path, oasst_file: Path) -> None:
    recipe = prepared(write_recipe(tmp_path, tiny_base, oasst_file, "train={rows_per_step: 8, max_steps: 2, micro_batch: 2}"))
    cases = [Case(name, (f"train.gradient_checkpointing={name}",)) for name in ("false", "0.5", "true")]
    assert set(launch(engine, cases, tmp_path / engine, str(recipe), [], 2, gpu=False).values()) == {""}
    runs = [case.path(tmp_path / engine) for case in cases]
    assert difference(runs[0], runs[1]) == EQUAL
    assert difference(runs[0], runs[2]) == EQUAL
