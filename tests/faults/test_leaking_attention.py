"""Fault 20: conversations that share a row do not know of each other, and a configuration in which they do is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe
from in_process import metrics, prepared
from leaking import leak
from processes import run
from tiny_models import CONFIGS, VOCABULARY, tiny
from transformers import PreTrainedModel

from qlora_suite.loss import check_separates_packed_rows, collate, forward, summed_loss

BACKENDS = ("eager", "sdpa")
"""FlexAttention has no backward pass on a CPU, and the FlashAttentions none at all: tests/test_gpu.py."""


CASES = [(name, backend) for name in CONFIGS for backend in BACKENDS if (name, backend) != ("gemma2", "sdpa")]
"""Gemma 2 caps its attention's logits, which SDPA cannot: transformers gives it eager attention alone."""


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    name, backend = request.param
    model = tiny(name)
    model.set_attn_implementation(backend)
    assert model.config._attn_implementation == backend
    return model


def packed_row(*lengths: int, seed: int) -> dict[str, Any]:
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    flags = torch.cat([torch.arange(n) >= min(1, n - 1) if n > 1 else torch.zeros(1, dtype=torch.bool) for n in lengths])
    return {"input_ids": ids, "supervised": flags, "lengths": list(lengths)}


ROWS = [packed_row(9, 13, 4, seed=1), packed_row(17, seed=2), packed_row(1, 2, 3, 4, 5, seed=3)]


def alone(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each conversation of a row as a row of its own."""
    pieces = zip(row["input_ids"].split(row["lengths"]), row["supervised"].split(row["lengths"]), row["lengths"], strict=True)
    return [{"input_ids": ids, "supervised": flags, "lengths": [length]} for ids, flags, length in pieces]


def separate(model: PreTrainedModel, row: dict[str, Any]) -> list[torch.Tensor]:
    """The logits of each conversation of a row in a forward pass of its own, by the model's plain call."""
    return [model(input_ids=piece["input_ids"][None]).logits[0] for piece in alone(row)]


@torch.no_grad()
def test_packed_logits_equal_separate_logits(model: PreTrainedModel) -> None:
    """With several rows of unequal length and padding, by the one call that training and evaluation make."""
    batch = collate(ROWS, pad_id=0)
    logits = forward(model, batch, torch.arange(batch.input_ids.shape[1]))
    for row, found in zip(ROWS, logits, strict=True):
        torch.testing.assert_close(found[: len(row["input_ids"])], torch.cat(separate(model, row)), atol=1e-5, rtol=1e-5)


def gradients(model: PreTrainedModel, batches: list[list[dict[str, Any]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of some batches of rows."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for rows in batches:
        loss = summed_loss(model, collate(rows, pad_id=0))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_gradients_equal_separate_gradients(model: PreTrainedModel) -> None:
    loss, packed = gradients(model, [ROWS])
    loss_alone, apart = gradients(model, [[piece] for row in ROWS for piece in alone(row)])
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    assert packed.keys() == apart.keys()
    largest = max(gradient.abs().max().item() for gradient in apart.values())
    assert largest > 0.1, "there is something to compare"
    assert max((packed[name] - apart[name]).abs().max().item() for name in packed) <= 1e-5 * largest


@torch.no_grad()
@pytest.mark.parametrize("trap", ["all-ones mask", "cache", "running positions"])
def test_the_trap_is_real(model: PreTrainedModel, trap: str) -> None:
    """What `forward` avoids lets packed conversations read each other without a word."""
    batch = collate(ROWS[:1], pad_id=0)
    settings_of = {
        "all-ones mask": {"attention_mask": torch.ones_like(batch.input_ids), "use_cache": False, "position_ids": batch.position_ids},
        "cache": {"use_cache": True, "position_ids": batch.position_ids},
        "running positions": {"use_cache": False},
    }
    leaking = model(input_ids=batch.input_ids, **settings_of[trap]).logits[0]
    assert (leaking - torch.cat(separate(model, ROWS[0]))).abs().max() > 1e-2


def test_a_model_that_separates_passes_the_guard(model: PreTrainedModel) -> None:
    model.train()
    check_separates_packed_rows(model)
    assert model.training, "it leaves the mode as it was"
    model.eval()


@pytest.mark.parametrize("injected", ["attention_mask", "use_cache"])
def test_a_model_that_leaks_is_refused_by_the_guard(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, injected: str) -> None:
    plain = model.forward

    def leaking(input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **kwargs: Any) -> Any:
        kwargs[injected] = torch.ones_like(input_ids) if injected == "attention_mask" else True
        return plain(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(model, "forward", leaking)
    with pytest.raises(ValueError, match=r"lets packed conversations read each other .* set data\.packing: false"):
        check_separates_packed_rows(model)


def test_a_model_whose_head_cannot_be_asked_for_some_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model, "forward", lambda input_ids, position_ids: None)
    with pytest.raises(ValueError, match="does not take logits_to_keep"):
        check_separates_packed_rows(model)


@pytest.mark.parametrize("by", ["attention_mask", "use_cache"])
def test_training_refuses_a_leaking_model_before_the_first_step(make_recipe: MakeRecipe, tmp_path: Path, by: str) -> None:
    """Fault 20 in the real script, on 4-bit weights: the guard is asked, and its remedy works."""
    recipe = prepared(make_recipe("train.max_steps=1"))
    ended = run("train.py", recipe, log=tmp_path / "log", prelude=(leak, by))
    assert ended.process.exitcode == 2, ended.output
    assert "lets packed conversations read each other" in ended.output
    assert "set data.packing: false" in " ".join(ended.output.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run")
