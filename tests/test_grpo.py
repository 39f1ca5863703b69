"""GRPO's arithmetic: against TRL's on one batch of stored answers, token by token where it is done by hand, and in the loop."""

import copy
import statistics
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from qlora_suite import reference_weights
from qlora_suite.base_config import load_tokenizer
from qlora_suite.grpo import advantages, are_alike, log_probabilities, summed_loss
from qlora_suite.loss import Batch, collate
from qlora_suite.recipe import Model

GROUP, BETA, CLIP = 4, 0.04, 0.2
PROMPTS = [[5, 6, 7], [30, 31, 32, 33, 34, 35, 36]]
ANSWERS = [[[8 + 40 * g + 7 * i + n for n in range(3 + 2 * i + g)] for i in range(GROUP)] for g in range(2)]
"""Of two prompts, four each, of 3 to 10 tokens."""
REWARDS = [[1.0, 0.5, 0.0, 0.25], [0.0, 0.0, 1.0, 0.0]]
ROWS = [
    {"input_ids": [*prompt, *ids], "supervised": [False] * len(prompt) + [True] * len(ids), "lengths": [len(prompt) + len(ids)]}
    for prompt, group in zip(PROMPTS, ANSWERS, strict=True)
    for ids in group
]
LENGTHS = torch.tensor([len(ids) for group in ANSWERS for ids in group])


# --- what an answer is worth beside its group


def test_advantages_are_deviations_from_the_group_in_sample_deviations() -> None:
    found = advantages([1.0, 0.0, 0.0, 1.0])
    assert found == pytest.approx([0.5 / (statistics.stdev([1, 0, 0, 1]) + 1e-4) * s for s in (1, -1, -1, 1)])
    tensor = torch.tensor([0.2, 0.9, 0.4])
    assert advantages([0.2, 0.9, 0.4]) == pytest.approx(((tensor - tensor.mean()) / (tensor.std() + 1e-4)).tolist(), rel=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_a_group_of_equals_learns_nothing(reward: float) -> None:
    assert advantages([reward] * 7) == [0.0] * 7


# --- the loss, against TRL's


@pytest.fixture
def models(tiny_base: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(what is trained, the reference it has left by some noise)"""
    reference = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    trained = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return trained, reference


class Trl:
    """TRL's trainer on a copy of the model, and its loss of the stored answers."""

    def __init__(self, models: tuple[PreTrainedModel, PreTrainedModel], tiny_base: Path, folder: Path, temperature: float) -> None:
        model, reference = copy.deepcopy(models)
        tokenizer = load_tokenizer(Model(base=str(tiny_base)))
        tokenizer.pad_token = tokenizer.eos_token
        config = GRPOConfig(
            output_dir=str(folder),
            loss_type="grpo",
            scale_rewards="group",
            beta=BETA,
            epsilon=CLIP,
            num_generations=GROUP,
            temperature=temperature,
            per_device_train_batch_size=2 * GROUP,
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
        )
        rows = Dataset.from_list([{"prompt": "hello"}] * 2)
        trainer = GRPOTrainer(model, reward_funcs=lambda **_: [0.0], args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.ref_model.load_state_dict(reference.state_dict())
        assert trainer.model is model
        trainer.current_gradient_accumulation_steps = 1
        self.trainer, self.model = trainer, model
        self.inputs = self.padded(tokenizer.pad_token_id)
        self.inputs["ref_per_token_logps"] = self.log_probabilities(trainer.ref_model)

    @staticmethod
    def padded(pad: int) -> dict[str, torch.Tensor]:
        """Prompts padded on the left, answers on the right."""
        answers, width = [ids for group in ANSWERS for ids in group], int(LENGTHS.max())
        prompts, before = [prompt for prompt in PROMPTS for _ in range(GROUP)], max(map(len, PROMPTS))
        return {
            "prompt_ids": torch.tensor([[pad] * (before - len(p)) + p for p in prompts]),
            "prompt_mask": torch.tensor([[0] * (before - len(p)) + [1] * len(p) for p in prompts]),
            "completion_ids": torch.tensor([a + [pad] * (width - len(a)) for a in answers]),
            "completion_mask": torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in answers]),
            "advantages": torch.tensor([value for group in REWARDS for value in advantages(group)]),
        }

    def log_probabilities(self, model: nn.Module) -> torch.Tensor:
        """Padded. [answers, longest]"""
        ids = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], dim=1)
        mask = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            return self.trainer._get_per_token_logps_and_entropies(model, ids, mask, self.inputs["completion_ids"].shape[1])[0]

    def loss(self) -> torch.Tensor:
        return self.trainer._compute_loss(self.model, self.inputs)


def ours(model: nn.Module, batch: Batch, old: torch.Tensor | None, reference: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean over answers, as the engine makes it."""
    now = log_probabilities(model, batch, temperature)
    advantage = torch.tensor([value for group in REWARDS for value in advantages(group)])
    measured = summed_loss(now, now.detach() if old is None else old, reference, advantage, LENGTHS, BETA, CLIP)
    return measured.loss / len(LENGTHS)


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    theirs = {name: p.grad for name, p in other.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_are_trls_over_two_updates_of_which_the_second_is_clipped(
    models: tuple[PreTrainedModel, PreTrainedModel], tiny_base: Path, tmp_path: Path, temperature: float
) -> None:
    trl = Trl(models, tiny_base, tmp_path, temperature)
    (model, reference_model), batch = models, collate(ROWS, pad_id=0)
    with torch.no_grad():
        reference = log_probabilities(reference_model, batch, temperature)
        old = log_probabilities(model, batch, temperature)
    padded = trl.log_probabilities(trl.model)
    torch.testing.assert_close(padded[trl.inputs["completion_mask"].bool()], old, rtol=1e-4, atol=1e-5)

    first, theirs = ours(model, batch, None, reference, temperature), trl.loss()
    assert first.item() == pytest.approx(theirs.item(), abs=1e-6, rel=1e-4)
    assert abs(first.item()) > 1e-3, "only the divergence is left of it, and that is not zero"
    first.backward()
    theirs.backward()
    assert_same_gradients(model, trl.model)
    with torch.no_grad():
        for one in (model, trl.model):
            for p in one.parameters():
                p.sub_(0.3 * p.grad)
                p.grad = None

    trl.inputs["old_per_token_logps"] = padded
    second, theirs = ours(model, batch, old, reference, temperature), trl.loss()
    assert second.item() == pytest.approx(theirs.item(), abs=1e-6, rel=1e-4)
    second.backward()
    theirs.backward()
    assert_same_gradients(model, trl.model)
    clipped = trl.trainer._metrics["eval" if not trl.model.training else "train"]["clip_ratio/region_mean"][-1]
    measured = summed_loss(log_probabilities(model, batch, temperature), old, reference, trl.inputs["advantages"], LENGTHS, BETA, CLIP)
    assert 0.05 < clipped < 0.95
    assert measured.clipped.item() / LENGTHS.sum().item() == pytest.approx(clipped)
    mode = "eval" if not trl.model.training else "train"
    assert measured.kl.item() / LENGTHS.sum().item() == pytest.approx(trl.trainer._metrics[mode]["kl"][-1], rel=1e-4)


def test_a_step_is_the_same_however_it_is_cut(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """The summed losses of micro-batches, and of an empty one, are that of all answers at once; so are the gradients."""
    model, reference_model = models
    advantage = torch.tensor([value for group in REWARDS for value in advantages(group)])

    def gradients_of(pieces: list[list[int]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for piece in pieces:
            batch = collate([ROWS[i] for i in piece] or [None], pad_id=0)
            with torch.no_grad():
                reference = log_probabilities(reference_model, batch, 1.0)
            now = log_probabilities(model, batch, 1.0)
            loss = summed_loss(now, now.detach(), reference, advantage[piece], LENGTHS[piece], BETA, CLIP).loss
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in model.parameters()]

    whole, expected = gradients_of([list(range(8))])
    for pieces in ([[0], [3, 1], [7, 2, 4], [5, 6]], [[0, 1, 2, 3, 4], [], [5, 6, 7]]):
        found, gradients = gradients_of(pieces)
        assert found == pytest.approx(whole, abs=1e-5)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_by_hand() -> None:
    """Two answers of 1 and 2 tokens; ratios 1.5 (clipped to 1.2, for its advantage is positive), 0.5 and 1.5 (advantage negative)."""
    now = torch.tensor([1.5, 0.5, 1.5]).log()
    found = summed_loss(now, torch.zeros(3), now, torch.tensor([2.0, -1.0]), torch.tensor([1, 2]), beta=0.04, clip=0.2)
    # 1.2 x 2 for the first; of the second min(-0.5, -0.8) and min(-1.5, -1.2), half each
    assert found.loss.item() == pytest.approx(-(2.4 + (-0.8 - 1.5) / 2))
    assert (found.kl.item(), found.clipped.item()) == (0, 2), "the third has left the range, but to its cost"
    shifted = now.detach().requires_grad_()
    apart = summed_loss(shifted, now, now + 0.5, torch.zeros(2), torch.tensor([1, 2]), beta=0.04, clip=0.2)
    k3 = torch.tensor(0.5).exp().item() - 0.5 - 1
    assert apart.loss.item() == pytest.approx(0.04 * k3 * 2)
    assert apart.kl.item() == pytest.approx(3 * k3)
    apart.loss.backward()
    # of r KL at r = 1: KL + (1 - exp(d)) = -d, the gradient of the divergence of the model from the reference
    assert shifted.grad.tolist() == pytest.approx([-0.04 * 0.5, -0.04 * 0.25, -0.04 * 0.25])


# --- the model as it was


def test_the_reference_is_the_start_and_only_for_a_while(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for p in model.model.embed_tokens.parameters():
        p.requires_grad_(False)
    batch, start = collate(ROWS[:2], pad_id=0), {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = reference_weights.kept(model)
    before = log_probabilities(model, batch, 1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        (-log_probabilities(model, batch, 1.0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        learnt = log_probabilities(model, batch, 1.0)
        assert (learnt - before).abs().max() > 1e-2
        with reference():
            found = log_probabilities(model, batch, 1.0)
            assert not found.requires_grad
            assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
        torch.testing.assert_close(found, before)
        torch.testing.assert_close(log_probabilities(model, batch, 1.0), learnt)


def test_an_error_puts_the_learnt_weights_back(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    reference = reference_weights.kept(model)
    with torch.no_grad():
        model.lm_head.bias += 1
    with pytest.raises(RuntimeError), reference():
        raise RuntimeError
    assert (model.lm_head.bias >= 0.5).all()


def test_sums_that_differ_by_their_rounding_are_the_same_reward() -> None:
    assert 0.1 + 0.2 != 0.3
    assert advantages([0.1 + 0.2, 0.3, 0.3]) == [0, 0, 0]
    assert are_alike([0.1 + 0.2, 0.3])
    assert not are_alike([0.3, 0.3 + 1e-6])
