"""What scripts/evaluate.py measures: every answer once, the same whatever the batches, and an interval that knows its trees."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OASST1, MakeRecipe, run_script
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_suite import oasst1, sources
from qlora_suite.batches import Limit
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.evaluation import LN2, AnswerScore, Excerpt, excerpts, paired_interval, perplexity, score, slices
from qlora_suite.metric import corpus_perplexity
from qlora_suite.model import load_tokenizer
from qlora_suite.recipe import Chat, Model
from qlora_suite.role_markers import add_role_markers

EVERYTHING = Limit(rows=10**6, tokens=10**9)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def renderer(base: Path, chat_format: str) -> Renderer:
    chat, tokenizer = Chat(format=chat_format), load_tokenizer(Model(base=str(base)))
    return Renderer(tokenizer, chat, add_role_markers(tokenizer, 1040, chat))


@pytest.fixture(scope="module")
def conversations(messages: list[dict]) -> list[Conversation]:
    found, _ = oasst1.conversations(messages[:120], "all_paths", None)
    return [kept for c in found if (kept := c.without_open_end()) and any(t.learn for t in kept.turns if t.role == "assistant")]


# --- scoring


def test_an_answers_score_is_what_a_plain_forward_pass_gives(model: PreTrainedModel, tiny_base: Path) -> None:
    ours = renderer(tiny_base, "instruct_output")
    chat = Conversation("k", ("k",), "g", (Turn("user", "How are you?"), Turn("assistant", "Fine – thank you.")), "en")
    (answer,) = score(model, ours, [Excerpt(chat)], 256, EVERYTHING)

    rendered = ours.render(chat)
    with torch.no_grad():
        logits = model(torch.tensor([rendered.ids]), use_cache=False).logits[0].double()
    nats = [-logits[i - 1].log_softmax(-1)[token].item() for i, token in enumerate(rendered.ids) if i]
    (turn,) = rendered.turns
    assert answer.nats == pytest.approx(sum(nats[turn.start - 1 : turn.end - 1]), rel=1e-5)
    assert answer.end_nats == pytest.approx(nats[turn.end - 1], rel=1e-5)
    assert answer.bytes == len("Fine – thank you.".encode())
    assert (answer.tokens, answer.end_tokens) == (turn.end - turn.start, 1)


@pytest.mark.parametrize("chat_format", ["oasst", "human_assistant", "instruct_output"])
def test_scores_do_not_depend_on_the_batches(
    model: PreTrainedModel, tiny_base: Path, conversations: list[Conversation], chat_format: str
) -> None:
    ours = renderer(tiny_base, chat_format)
    found, _ = excerpts(conversations[:25], [ours], 256)
    alone, together, some = (score(model, ours, found, 256, limit) for limit in (Limit(1, 10**9), EVERYTHING, Limit(rows=7, tokens=700)))
    for answers in (together, some):
        for a, b in zip(alone, answers, strict=True):
            assert replace(a, nats=0, end_nats=0) == replace(b, nats=0, end_nats=0)
        assert math.fsum(a.nats for a in answers) == pytest.approx(math.fsum(a.nats for a in alone), rel=1e-6)


def test_every_learnt_answer_is_scored_exactly_once_or_counted_as_cut(tiny_base: Path) -> None:
    """On all trees of the validation file, in a window so small that much has to be left out."""
    found, _ = oasst1.conversations(sources.read(str(OASST1)), "all_paths", None)
    everything = [kept for c in found if (kept := c.without_open_end())]
    ours = [renderer(tiny_base, name) for name in ("oasst", "human_assistant")]
    kept, cut = excerpts(everything, ours, 300)
    scored = [
        (e.conversation.turns[i].content, e.conversation.key)
        for e in kept
        for i in range(len(e.conversation.turns))
        if e.conversation.turns[i].role == "assistant" and e.conversation.turns[i].learn
    ]
    assert cut.answers > 100
    assert len(scored) + cut.answers == 1241  # the learnt answers of all_paths
    assert len(set(scored)) == len(scored)
    for excerpt in kept:
        assert excerpt.conversation.turns[0].role == "user"
        assert all(len(r.render(excerpt.conversation).ids) <= 300 for r in ours)


def test_a_long_conversation_loses_its_beginning_not_its_answer(tiny_base: Path) -> None:
    ours = renderer(tiny_base, "oasst")
    words = "Tell me about the weather in the mountains, please. " * 3
    turns = tuple(Turn("assistant" if i % 2 else "user", f"{i}: {words}") for i in range(8))
    whole = Conversation("k", ("k",), "g", turns, "en")
    window = len(ours.render(replace(whole, turns=turns[:4])).ids)
    kept, cut = excerpts([whole], [ours], window)
    assert cut.answers == 0
    assert [e.answers_before for e in kept] == [0, 1, 2]
    assert [[t.content[0] for t in e.conversation.turns if t.role == "assistant" and t.learn] for e in kept] == [["1", "3"], ["5"], ["7"]]
    assert [e.conversation.turns[0].content[0] for e in kept] == ["0", "2", "4"]


def test_a_plain_text_is_scored_in_pieces_without_losing_a_byte(model: PreTrainedModel, tiny_base: Path) -> None:
    ours = renderer(tiny_base, "text")
    text = "The quick brown fox jumps over the lazy dog. " * 20
    chat = Conversation("k", ("k",), "g", (Turn("assistant", text),))
    (answer,) = score(model, ours, [Excerpt(chat)], 64, EVERYTHING)
    assert (answer.bytes, answer.end_tokens) == (len(text), 1)
    assert answer.tokens == len(ours.render(chat).ids) - 2


# --- means and intervals


def test_perplexity_by_hand() -> None:
    means = perplexity(nats=math.log(8) * 10, tokens=10, num_bytes=30)
    assert means["perplexity"] == pytest.approx(8)
    assert means["bits_per_byte"] == pytest.approx(1.0)  # 10 tokens x 3 bits / 30 bytes


def test_the_metric_module_loads_offline_and_divides_sums() -> None:
    means = corpus_perplexity([10.0, 1.0], [2, 8], [5, 5])
    assert means["nll_per_token"] == pytest.approx(11 / 10)  # not (10/2 + 1/8) / 2
    assert means == perplexity(11.0, 10, 10)


def answers(nats: Sequence[float], groups: Sequence[str]) -> list[AnswerScore]:
    return [AnswerScore(str(i), g, "en", 1, 100, n, 20, 0.0, 1) for i, (n, g) in enumerate(zip(nats, groups, strict=True))]


def test_the_interval_resamples_trees_not_answers() -> None:
    """Forty answers of two trees are two observations: the interval has to be as wide as the trees differ."""
    rng = np.random.default_rng(0)
    groups = ["a"] * 20 + ["b"] * 20
    base = answers(50 + rng.normal(0, 0.1, 40), groups)
    better = answers([b.nats - (5 if b.group == "a" else 1) for b in base], groups)
    found = paired_interval(base, better, samples=2000)
    low, high = found["interval_95"]
    assert found["bits_per_byte"] == pytest.approx(-3 / LN2 / 100)
    assert low == pytest.approx(-5 / LN2 / 100)
    assert high == pytest.approx(-1 / LN2 / 100)
    as_if_independent = paired_interval(*([replace(x, group=x.key) for x in side] for side in (base, better)), samples=2000)
    assert as_if_independent["interval_95"][1] - as_if_independent["interval_95"][0] < (high - low) / 2


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        groups = [str(g) for g in range(60) for _ in range(3)]
        base = answers(np.full(180, 50.0), groups)
        effect = np.repeat(rng.normal(-1, 2, 60), 3)
        adapter = answers(50 + effect, groups)
        low, high = paired_interval(base, adapter, samples=400)["interval_95"]
        hits += low <= -1 / LN2 / 100 <= high
    assert 178 <= hits <= 198  # 190 expected, and the percentile method is a little short at 60 trees


def test_different_answers_are_not_compared() -> None:
    base = answers([1.0, 2.0], ["a", "b"])
    with pytest.raises(AssertionError, match="same answers"):
        paired_interval(base, [base[0], replace(base[1], key="other")], samples=10)


def test_slices_hold_every_answer_once_in_each_cut() -> None:
    base = [replace(a, number=i % 4 + 1, bytes=150 * (i + 1)) for i, a in enumerate(answers([9.0] * 12, ["g"] * 12))]
    found = slices(base, base)
    for cut in ("answer", "length", "language"):
        assert sum(row["answers"] for row in found if row["by"] == cut) == 12
    assert all(row["base"] == row["adapter"] for row in found)


# --- the script


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """A recipe whose run is finished: 12 steps of QLoRA on the tiny random base."""
    from conftest import write_recipe

    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, tiny_base, oasst_file, "train.max_steps=12", "evaluation.every_steps=6")
    for name in ("prepare_data.py", "train.py"):
        done = run_script(name, recipe)
        assert done.returncode == 0, done.stderr
    return recipe


def test_a_run_is_compared_with_its_base_and_shown_at_once_the_second_time(finished: Path) -> None:
    run = finished.parent / "run"
    first = run_script("evaluate.py", run)
    assert first.returncode == 0, first.stderr
    report = json.loads((run / "report.json").read_text())
    for side in ("base", "adapter"):
        assert {"nll_per_token", "num_tokens", "perplexity", "bits_per_byte"} <= report[side].keys()
    low, high = report["difference"]["interval_95"]
    assert low <= report["difference"]["bits_per_byte"] <= high
    assert report["difference"]["bits_per_byte"] == pytest.approx(report["adapter"]["bits_per_byte"] - report["base"]["bits_per_byte"])
    # 12 steps from random weights: of course it is better, and against the base's best format
    assert high < 0
    assert report["base"]["bits_per_byte"] == min(
        c["bits_per_byte"] for f in report["formats"].values() for n, c in f.items() if n != "adapter"
    )
    assert "lowest development loss" in report["chosen_by"]
    again = run_script("evaluate.py", run)
    assert json.loads((run / "report.json").read_text()) == report
    assert again.returncode == 0
    text = (run / "report.md").read_text()
    assert "paired bootstrap over" in text
    assert f"{report['adapter']['bits_per_byte']:.4f}" in text


def test_an_adapter_trained_elsewhere_is_scored_in_its_format(finished: Path, tmp_path: Path) -> None:
    adapter = finished.parent / "run" / "final"
    done = run_script("evaluate.py", finished, f"output.dir={tmp_path / 'out'}", "--adapter", adapter, "--format", "instruct_output")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["adapter"]["format"] == "instruct_output"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--adapter", "a", "--model", "b"], "give one"),
        (["--format", "oasst"], "--adapter or --model"),
        (["--adapter", "no/such-adapter"], "cannot put the adapter no/such-adapter"),
    ],
)
def test_mistakes_get_a_sentence_and_no_traceback(finished: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = run_script("evaluate.py", finished, f"output.dir={tmp_path / 'out'}", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unfinished_run_is_not_evaluated(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(make_recipe().read_text())
    (folder / "status.json").write_text('{"state": "stopped", "step": 3, "num_steps": 9}')
    done = run_script("evaluate.py", folder)
    assert done.returncode == 2
    assert "not finished (stopped at step 3 of 9)" in done.stderr
