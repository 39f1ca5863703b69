"""The preview timeline: greedy answers, what is shown of them, and what is measured."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_suite.base_config import load_tokenizer
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Turn
from qlora_suite.generation import Answer, answer, record, repetition, summary, write_timeline
from qlora_suite.recipe import Chat, Model
from qlora_suite.role_markers import add_role_markers

CHATS = [[Turn("user", "Why is the sky blue?")], [Turn("user", "No.")]]


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    tokenizer = load_tokenizer(Model(base=str(tiny_base)))
    return Renderer(tokenizer, Chat(), add_role_markers(tokenizer, 1040, Chat()))


@pytest.fixture
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


class Scripted(nn.Module):
    """Answers with the ids it was given."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = torch.tensor(answers)

    def generate(self, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        assert not self.training, "dropout is on"
        assert settings["do_sample"] is False
        return torch.cat([input_ids, self.answers], dim=1)


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0),
        ([1, 2, 3, 4], 0),
        ([1, 1, 1, 1, 1], 0.5),  # two windows, the second is the first again
        (list(range(50)), 0),
        ([1, 2, 3, 4] * 2, 0.2),  # five windows, the last is the first again
        ([7] * 103, 0.99),
    ],
)
def test_repetition_is_the_share_of_windows_seen_before(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


def test_summary_is_the_mean_over_answers() -> None:
    answers = [Answer("p", "a", 3, True, 0.0), Answer("p", "b", 10, False, 0.5), Answer("p", "c", 5, True, 0.1)]
    assert summary(answers) == pytest.approx({"stopped": 2 / 3, "tokens": 6, "repetition": 0.2})


def test_nothing_beyond_the_stop_token_is_shown(renderer: Renderer) -> None:
    """The first answer stops after two words; what the batch goes on with there is not its own. The second runs into the limit."""
    words = renderer.tokenizer("Yes indeed and more", add_special_tokens=False)["input_ids"]
    stop, width = renderer.stop_token_ids[0], len(words)
    model = Scripted([[*words[:2], stop, *words[3:]], words])
    short, long = answer(model, renderer, CHATS, max_new_tokens=width)
    assert short.text == renderer.tokenizer.decode(words[:2])
    assert (short.num_tokens, short.stopped, short.prompt) == (2, True, "Why is the sky blue?")
    assert long.text == "Yes indeed and more"
    assert (long.num_tokens, long.stopped, long.prompt) == (width, False, "No.")
    assert summary([short, long])["stopped"] == 0.5


def test_a_model_that_stops_at_once_says_nothing(model: PreTrainedModel, renderer: Renderer) -> None:
    model.lm_head.bias.data[renderer.stop_token_ids[0]] = 100
    answers = answer(model, renderer, CHATS, max_new_tokens=8)
    assert [(a.text, a.num_tokens, a.stopped, a.repetition) for a in answers] == [("", 0, True, 0.0)] * 2


@pytest.mark.parametrize("training", [True, False])
def test_previews_are_greedy_and_leave_the_model_as_it_was(model: PreTrainedModel, renderer: Renderer, training: bool) -> None:
    """The same answers whatever the generator's state, each token the most likely one, alone or in a batch, and no gradient."""
    model.train(training)
    first = answer(model, renderer, CHATS, max_new_tokens=12)
    torch.manual_seed(123)
    assert answer(model, renderer, CHATS, max_new_tokens=12) == first
    assert [answer(model, renderer, [chat], max_new_tokens=12)[0].text for chat in CHATS] == [a.text for a in first]
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())

    ids = list(renderer.prompt(CHATS[0]))
    length = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    assert renderer.answer_text(ids[length:]) == first[0].text


def test_the_mode_comes_back_even_after_an_error(model: PreTrainedModel, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError

    model.train()
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError):
        answer(model, renderer, CHATS, max_new_tokens=2)
    assert model.training


def test_the_timeline_shows_newest_first_and_every_step_in_the_table(tmp_path: Path) -> None:
    early = record(0, [Answer("Say\nhello", "la la", 96, False, 0.97)])
    late = record(50, [Answer("Say\nhello", "Hello!\nHow are you?", 7, True, 0.0)])
    write_timeline(tmp_path / "previews.md", [early, late])
    text = (tmp_path / "previews.md").read_text()
    assert "| 0 | 0% | 96 | 97% |" in text
    assert "| 50 | 100% | 7 | 0% |" in text
    assert text.index("## Step 50") < text.index("## Step 0\n")
    assert "**Say hello**" in text
    assert "> Hello!\n> How are you?" in text
    assert "*7 tokens, stopped by itself, repetition 0%*" in text
    assert "*96 tokens, ran into the limit, repetition 97%*" in text


def test_an_empty_answer_is_said_to_be_one(tmp_path: Path) -> None:
    write_timeline(tmp_path / "previews.md", [record(1, [Answer("p", "", 0, True, 0.0)])])
    assert "> (nothing)" in (tmp_path / "previews.md").read_text()
