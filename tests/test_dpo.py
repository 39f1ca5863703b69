"""DPO's loss on the prepared pairs, in every cut of them, and beside TRL's."""

import math
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch.nn.functional import logsigmoid

from qlora_suite import dpo, tiled_head
from qlora_suite.loss import Batch, collate, summed_loss, token_losses
from qlora_suite.recipe import Dpo

BETA = 0.3


def pair(chosen: int, rejected: int, prompt: int = 3, seed: int = 0) -> dict[str, Any]:
    """A row: a prompt and a chosen answer, the prompt and a rejected one, of so many tokens each."""
    ids = torch.randint(1, 90, (2 * prompt + chosen + rejected,), generator=torch.Generator().manual_seed(seed))
    ids[prompt + chosen : 2 * prompt + chosen] = ids[:prompt]
    flags = torch.tensor([False] * prompt + [True] * chosen + [False] * prompt + [True] * rejected)
    return {
        "input_ids": ids,
        "supervised": flags,
        "lengths": [prompt + chosen, prompt + rejected],
        "reference": (-4.0 * chosen - seed, -4.2 * rejected + seed),
    }


PAIRS = [pair(5, 3, seed=1), pair(2, 7, seed=2), pair(1, 1, seed=3)]


def log_probs_alone(model: torch.nn.Module, row: dict[str, Any]) -> list[float]:
    """Of the two answers, each conversation by itself, from transformers' own logits."""
    found, start = [], 0
    for length in row["lengths"]:
        ids, flags = row["input_ids"][start : start + length], row["supervised"][start : start + length]
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        found.append(float(log_p[flags[1:]].sum().detach()))
        start += length
    return found


@pytest.mark.parametrize("length_normalized", [False, True])
def test_the_loss_and_what_is_measured_are_those_of_the_formula(length_normalized: bool) -> None:
    model, settings = tiny(), Dpo(beta=BETA, length_normalized=length_normalized)
    expected = dict.fromkeys(("loss", *dpo.MEASURES), 0.0)
    for row in PAIRS:
        sizes = [int(row["supervised"][: row["lengths"][0]].sum()), int(row["supervised"][row["lengths"][0] :].sum())]
        ratios = [p - r for p, r in zip(log_probs_alone(model, row), row["reference"], strict=True)]
        rewards = [BETA * ratio / (size if length_normalized else 1) for ratio, size in zip(ratios, sizes, strict=True)]
        margin = rewards[0] - rewards[1]
        expected["loss"] -= float(logsigmoid(torch.tensor(margin)))
        expected["accuracy"] += margin > 0
        expected["margin"] += margin
        expected["reward_chosen"] += rewards[0]
        expected["reward_rejected"] += rewards[1]
        expected["log_ratio"] += sum(ratios) / sum(sizes)
        expected["chosen_tokens"] += sizes[0]
        expected["rejected_tokens"] += sizes[1]
    found = summed_loss(model, collate(PAIRS, 0, dpo=settings))
    assert found.tolist() == pytest.approx(list(expected.values()), rel=1e-4, abs=1e-4)


def test_a_model_that_is_its_reference_loses_log_2_on_each_pair_and_prefers_none() -> None:
    model = tiny()
    rows = [{**row, "reference": tuple(log_probs_alone(model, row))} for row in PAIRS]
    loss, accuracy, margin, *_ = (summed_loss(model, collate(rows, 0, dpo=Dpo())) / 3).tolist()
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert margin == pytest.approx(0, abs=1e-5)
    assert 0 <= accuracy <= 1


def gradients(model: torch.nn.Module, batches: list[Batch]) -> tuple[list[float], dict[str, torch.Tensor]]:
    model.zero_grad()
    sums = [summed_loss(model, batch) for batch in batches]
    for one in sums:
        one[0].backward()
    return torch.stack(sums).sum(dim=0).tolist(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tile", [None, 1, 4, 100])
def test_any_cut_into_micro_batches_and_tiles_has_the_same_loss_and_gradient(tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty rows in between add nothing. In tiles the head is frozen, and each token's loss has its pair's factor."""
    model, settings = tiny(), Dpo(beta=BETA)
    model.get_output_embeddings().requires_grad_(False)
    plain = gradients(model, [collate(PAIRS, 0, dpo=settings)])
    if tile is not None:
        vocabulary = model.config.vocab_size
        monkeypatch.setattr(tiled_head, "LOGITS_PER_TILE", tile * vocabulary)
        tiled_head.use(model.get_output_embeddings(), vocabulary)
    cuts: list[list[list[Any]]] = [[PAIRS], [PAIRS[:1], PAIRS[1:]], [[None], [PAIRS[2], None], [PAIRS[0]], [PAIRS[1]]]]
    for cut in cuts:
        sums, found = gradients(model, [collate(rows, 0, dpo=settings) for rows in cut])
        assert sums == pytest.approx(plain[0], rel=1e-5, abs=1e-5)
        assert found.keys() == plain[1].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_where_the_head_is_trained_its_gradient_is_that_of_the_plain_loss() -> None:
    model, settings = tiny(), Dpo(beta=BETA)
    plain = gradients(model, [collate(PAIRS, 0, dpo=settings)])
    tiled_head.use(model.get_output_embeddings(), model.config.vocab_size)
    sums, found = gradients(model, [collate(PAIRS, 0, dpo=settings)])
    assert sums == pytest.approx(plain[0], rel=1e-5)
    head = next(name for name in found if name.endswith("lm_head.weight"))
    assert float(found[head].abs().sum()) > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-6)


def test_a_tile_holds_no_more_logits_where_losses_have_factors_of_their_own() -> None:
    """The plain way keeps the logits of all tokens for the backward pass."""
    model, settings = tiny(), Dpo()
    model.get_output_embeddings().requires_grad_(False)
    batch, kept = collate([pair(40, 40)], 0, dpo=settings), []

    def times_kept() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
            token_losses(model, batch)
        return kept.count((80, model.config.vocab_size))

    assert times_kept() > 0
    tiled_head.use(model.get_output_embeddings(), model.config.vocab_size)
    assert times_kept() == 0
