"""The report of a run that began with another adapter: perplexity before and after, and held-out pairs by the rewards that DPO defines."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, write_recipe
from in_process import evaluate, prepared, script, train
from peft import PeftModel
from playwright.sync_api import Page
from test_evaluate_on_two_processes import ENVIRONMENT, LAUNCH, assert_close
from transformers import AutoModelForCausalLM

from qlora_suite import dataset
from qlora_suite.charts import histogram
from qlora_suite.compared_runs import comparison_of, result_rows
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.evaluation import AnswerScore, Cut, over_trees
from qlora_suite.files import read_json
from qlora_suite.model_card import eval_results, training_rows
from qlora_suite.preferences import LONGER, SHORTER, compare_pairs, pairs_that_fit
from qlora_suite.recipe import Dpo
from qlora_suite.recipe_file import load
from qlora_suite.report import headline, preference_facts
from qlora_suite.report_page import answers, curves, environment, heroes, preferences
from qlora_suite.sample_answers import CONCISE_WORDS, concise_words
from qlora_suite.subject import renderers_of, subject_of

PLAIN = ("model.quantization=none", "data.validation_share=0.4", "data.max_length=256")
PAIRS = (
    "data.policy=preference_pairs",
    "data.pairs={choose: all}",
    "data.packing=false",
    "dpo={beta: 0.2}",
    "train={rows_per_step: 8, max_steps: 8}",
)
NAMES = ("one", "two", "gone", "changed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preferences")


@pytest.fixture(scope="module")
def first(folder: Path, tiny_base: Path, oasst_file: Path) -> Path:
    """A run of SFT, whose role markers are trained token rows."""
    recipe = write_recipe(folder, tiny_base, oasst_file, *PLAIN, "train.max_steps=8", f"data.prepared={folder / 'first-prepared'}")
    return train(prepared(recipe), f"output.dir={folder / 'first'}")


@pytest.fixture(scope="module")
def recipe(folder: Path, tiny_base: Path, oasst_file: Path, first: Path) -> Path:
    more = (f"adapter.start_from={first}", "evaluation.every_steps=4", "optim.learning_rate=5e-3")
    return prepared(write_recipe(folder, tiny_base, oasst_file, *PLAIN, *PAIRS, *more))


@pytest.fixture(scope="module")
def run(recipe: Path, folder: Path) -> Path:
    made = train(recipe)
    for name in NAMES:
        shutil.copytree(made, folder / name, ignore=shutil.ignore_patterns("checkpoints"))
    return made


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return evaluate(run)


def test_three_are_compared_and_what_became_of_the_start_is_said(report: dict[str, Any], run: Path) -> None:
    cells = report["formats"]["oasst"]
    assert list(cells) == ["base_unquantised", "start", "adapter"]
    assert set(report["formats"]["human_assistant"]) == {"base_unquantised"}
    assert report["labels"]["start"] == "adapter at the start"
    assert report["base"]["column"] == "base_unquantised", "the start is no base"
    after = report["difference_from_start"]
    assert after["bits_per_byte"] == pytest.approx(cells["adapter"]["bits_per_byte"] - cells["start"]["bits_per_byte"], abs=1e-9)
    assert after["interval_95"][0] < after["bits_per_byte"] < after["interval_95"][1]
    assert after["bits_per_byte"] != report["difference"]["bits_per_byte"]
    assert report["start"] == {"format": "oasst", **cells["start"]}
    text = (run / "report.md").read_text()
    assert f"After DPO: {after['bits_per_byte']:+.4f} bits per byte (95 % interval " in text
    assert "the preference tuning" not in text
    assert "| base, fp32 | adapter at the start | adapter |" in text
    assert list(report["answers"]["columns"]) == ["base", "start", "adapter"]
    assert "| words, mean | " in text
    assert "Of 5 answers, ended by themselves within 100 words: base " in text
    assert "start_nats" in report["conversations"][0]


def test_the_start_scores_and_answers_as_an_adapter_of_its_own(report: dict[str, Any], first: Path, recipe: Path) -> None:
    """The same answers through scripts/evaluate.py --adapter."""
    alone = evaluate(recipe, adapter=str(first / "final"))
    for name in ("bits_per_byte", "num_tokens", "end_nll"):
        assert alone["adapter"][name] == pytest.approx(report["start"][name], rel=1e-6)
    assert alone["preferences"]["rewards"] is None, "nobody knows where it began"
    ours, theirs = report["preferences"]["columns"]["start"], alone["preferences"]["columns"]["adapter"]
    assert (ours["prefers_chosen"], ours["format"]) == (theirs["prefers_chosen"], theirs["format"])
    made = {name: column["answers"] for name, column in report["answers"]["columns"].items()}
    assert made["start"] == alone["answers"]["columns"]["adapter"]["answers"]
    assert made["start"] != made["adapter"]


def log_probs(model: torch.nn.Module, rendered: Any) -> float:
    """Of the last answer and its end token, by a plain forward pass of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([rendered.ids]), use_cache=False).logits[0].double().log_softmax(-1)
    last = rendered.turns[-1]
    return sum(logits[place - 1, rendered.ids[place]].item() for place in range(last.start, last.end + 1))


def test_rewards_are_those_of_plain_transformers(report: dict[str, Any], run: Path, first: Path, tiny_base: Path) -> None:
    """Reward accuracy and margins of some pairs by hand, from the two adapters as they lie on the disk."""
    subject = subject_of(run, [])
    ours, _ = renderers_of(subject, dataset.load_manifest(subject.recipe))
    pairs = {c.key: c for c in dataset.read_conversations(Path(subject.recipe.data.prepared) / "validation.arrow")}
    models = {
        name: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), place / "final").eval()
        for name, place in (("start", first), ("adapter", run))
    }
    rows = report["preferences"]["rows"]
    rendered = {row["key"]: [ours.render(one) for one in pairs[row["key"]].chosen_and_rejected()] for row in rows}
    whole = [row for row in rows if all(len(side.ids) <= 256 for side in rendered[row["key"]])]
    assert len(whole) > 10  # of the others, the beginning of the conversation was left out
    for row in whole[::2]:
        sides = rendered[row["key"]]
        by_hand = {name: [log_probs(model, side) for side in sides] for name, model in models.items()}
        for name, values in by_hand.items():
            assert row[name] == pytest.approx(values, rel=1e-5, abs=1e-4)
        margin = 0.2 * np.subtract(by_hand["adapter"], by_hand["start"]) @ [1, -1]
        assert row["margin"] == pytest.approx(margin, abs=1e-3)
        assert row["tokens"] == [side.turns[-1].end + 1 - side.turns[-1].start for side in sides]
    rewards = report["preferences"]["rewards"]
    margins = [0.2 * ((r["adapter"][0] - r["start"][0]) - (r["adapter"][1] - r["start"][1])) for r in rows]
    assert rewards["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(rows), abs=1e-9)
    assert rewards["margin"] == pytest.approx(math.fsum(margins) / len(rows), rel=1e-6)
    assert rewards["interval_95"][0] < rewards["accuracy"] < rewards["interval_95"][1]
    assert np.std(margins) > 0.01, "it has moved"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "The interval is a bootstrap over trees (200 samples)."),
        ({"accuracy": 1.0, "interval_95": [0.7, 1.0]}, "The interval is Clopper's and Pearson's, for a share of 100% of 12 trees"),
        ({"accuracy": 1.0, "interval_95": None}, None),
    ],
)
def test_the_report_says_how_the_interval_was_made(report: dict[str, Any], changed: dict[str, Any], said: str | None) -> None:
    rewards = {**report["preferences"]["rewards"], "samples": 200, **changed}
    told = " ".join(preference_facts({**report, "preferences": {**report["preferences"], "trees": 12, "rewards": rewards}}))
    assert said in told if said else "interval is" not in told


def test_every_pair_is_compared_or_counted_as_left_out(report: dict[str, Any], run: Path) -> None:
    """And each chosen answer counts once for the perplexity, in however many pairs it is."""
    everything = dataset.read_conversations(Path(load(run / "recipe.yaml").data.prepared) / "validation.arrow")
    preferences = report["preferences"]
    assert preferences["left_out"] > 5
    assert preferences["pairs"] + preferences["left_out"] == len(everything)
    assert len({row["key"] for row in preferences["rows"]}) == preferences["pairs"]
    chosen = {(c.group, *c.turns) for c in everything}
    assert len(chosen) < len(everything)
    assert report["data"]["answers"] + report["cut"]["answers"] == len(chosen)
    assert sum(row["bytes"] for row in report["conversations"]) == report["adapter"]["num_bytes"]
    assert sum(one["pairs"] for one in preferences["slices"]) == preferences["pairs"]


def test_nothing_is_scored_twice_and_what_is_kept_not_again(report: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script("evaluate"), "load_column", lambda *_: pytest.fail("the scores are kept"))
    monkeypatch.setattr("qlora_suite.sample_answers.load", lambda *_: pytest.fail("the answers are kept"))
    again = evaluate(run)
    assert {**again, "made_by": None} == {**report, "made_by": None}
    (kept,) = (run / "evaluation").glob("start-oasst-*.json")
    scores = read_json(kept)
    assert len({(a["group"], a["key"]) for a in scores}) == len(scores)
    assert len(scores) < 2 * (report["preferences"]["pairs"] + report["preferences"]["left_out"])


def test_two_processes_report_what_one_reports(report: dict[str, Any], folder: Path) -> None:
    command = [*LAUNCH, "2", "scripts/evaluate.py", str(folder / "two"), "--answers", "2", "--answer-tokens", "12"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = read_json(folder / "two" / "report.json")
    ours, of_two = report["preferences"], theirs["preferences"]
    for key in ("pairs", "trees", "left_out", "columns"):
        assert ours[key] == of_two[key]
    for a, b in zip(of_two["rows"], ours["rows"], strict=True):
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-4)
        assert (a["key"], a["tokens"]) == (b["key"], b["tokens"])
    assert of_two["rewards"]["accuracy"] == ours["rewards"]["accuracy"]
    assert_close(theirs["formats"]["oasst"]["start"], report["formats"]["oasst"]["start"], rel=1e-6)
    assert theirs["answers"] == report["answers"]
    assert done.stdout.count("After DPO: ") == 1
    assert len(re.findall(r"the chosen answer's reward, against the adapter at the start, is", " ".join(done.stdout.split()))) == 1


@pytest.mark.parametrize(("name", "why"), [("gone", "is not at hand"), ("changed", "is another adapter now")])
def test_a_start_that_cannot_be_had_is_left_out_with_a_word(folder: Path, run: Path, first: Path, name: str, why: str) -> None:
    target = folder / name
    other = folder / "moved" if name == "gone" else folder / "other-first"
    if name == "changed":
        shutil.copytree(run / "final", other)
    recipe = (target / "recipe.yaml").read_text()
    assert str(first) in recipe
    (target / "recipe.yaml").write_text(recipe.replace(str(first), str(other)))
    found = evaluate(target, num_answers=1)
    (left,) = found["left_out"]
    assert left["column"] == "start"
    assert why in left["why"]
    assert why in (target / "report.md").read_text()
    assert "start" not in found["formats"]["oasst"]
    assert (found["start"], found["difference_from_start"], found["preferences"]["rewards"]) == (None, None, None)
    assert set(found["preferences"]["columns"]) == {"base_unquantised", "adapter"}
    assert list(found["answers"]["columns"]) == ["base", "adapter"]
    assert found["difference"] is not None


def test_without_pairs_there_is_no_such_section(first: Path) -> None:
    found = evaluate(first, num_answers=0)
    assert (found["preferences"], found["start"], found["difference_from_start"]) == (None, None, None)
    assert "Held-out pairs" not in (first / "report.md").read_text()
    assert 'id="pairs"' not in (first / "report.html").read_text()


def test_of_a_new_adapter_the_base_is_the_reference(folder: Path, tiny_base: Path, oasst_file: Path) -> None:
    text = ("chat.role_markers=text", "train.max_steps=3", f"data.prepared={folder / 'new-prepared'}", f"output.dir={folder / 'new'}")
    recipe = prepared(write_recipe(folder, tiny_base, oasst_file, *PLAIN, *PAIRS, *text))
    found = evaluate(train(recipe), num_answers=0)
    rewards, row = found["preferences"]["rewards"], found["preferences"]["rows"][0]
    assert rewards["start"] == "base, fp32"
    assert "start" not in found["formats"]["oasst"]
    ours, base = (read_json(next((folder / "new" / "evaluation").glob(f"{name}-oasst-*.json"))) for name in ("adapter", "base_unquantised"))
    sums = [{a["key"]: -(a["nats"] + a["end_nats"]) for a in of_all} for of_all in (ours, base)]
    # the first pair's answers are the first chosen one, and the first that is nothing but rejected or another chosen one
    assert row["adapter"][0] == pytest.approx(sums[0][row["key"]])
    assert rewards["accuracy"] != 0.5


# --- what is counted, by hand


def pair(key: str, chosen: str, rejected: str, group: str = "t", question: str = "Which?") -> Conversation:
    return Conversation(key, (key,), group, (Turn("user", question), Turn("assistant", chosen)), "en", rejected)


def scored(nats: float, tokens: int = 1, num_bytes: int = 10) -> AnswerScore:
    return AnswerScore("k", "t", "en", 1, num_bytes, nats, tokens - 1, 0.0, 1)


@pytest.fixture(scope="module")
def renderer(run: Path) -> Any:
    subject = subject_of(run, [])
    return renderers_of(subject, dataset.load_manifest(subject.recipe))[0]


def test_an_answer_of_several_pairs_is_scored_once(renderer: Any) -> None:
    three = [pair("21", "two", "one"), pair("23", "two", "three"), pair("13", "one", "three"), pair("x", "two", "one", group="other")]
    found = pairs_that_fit(three, [renderer], 160)
    texts = [(e.conversation.group, e.conversation.turns[-1].content) for e in found.found]
    assert texts == [("t", "two"), ("t", "one"), ("other", "two"), ("t", "three"), ("other", "one")]
    assert (found.num_chosen, found.num_left_out, found.cut) == (3, 0, Cut())
    assert [(p.chosen, p.rejected) for p in found.pairs] == [(0, 1), (0, 3), (1, 3), (2, 4)]


def test_a_pair_of_which_one_answer_is_too_long_is_left_out_and_its_chosen_answer_is_not(renderer: Any) -> None:
    found = pairs_that_fit([pair("a", "short", "long " * 300), pair("b", "long " * 200, "no"), pair("c", "yes", "no")], [renderer], 160)
    assert [e.conversation.turns[-1].content for e in found.found] == ["short", "yes", "no"]
    assert (found.num_chosen, found.num_left_out, found.cut.answers) == (2, 2, 1)
    assert [p.key for p in found.pairs] == ["c"]


def test_answers_behind_unequal_contexts_are_not_compared(renderer: Any) -> None:
    """The longer one fits only where the beginning of the conversation is left out."""
    words = "and so on " * 12
    turns = (Turn("user", words), Turn("assistant", words, learn=False), Turn("user", "Yes?"), Turn("assistant", "Fine."))
    found = pairs_that_fit([Conversation("k", ("k",), "t", turns, "en", "long " * 60)], [renderer], 160)
    assert (len(found.pairs), found.num_left_out, found.num_chosen, len(found.found)) == (0, 1, 1, 1)


def measured(values: dict[str, list[tuple[float, int]]], dpo: Dpo, renderer: Any, sizes: tuple[int, int] = (10, 10)) -> dict[str, Any]:
    """Two pairs in two trees, whose answers have these nats and tokens: chosen, chosen, rejected, rejected."""
    held_out = pairs_that_fit([pair("a", "yes", "no", "1"), pair("b", "yes", "no", "2")], [renderer], 160)
    num_bytes = (sizes[0], sizes[0], sizes[1], sizes[1])
    scores = {"oasst": {n: [scored(*v, num_bytes=b) for v, b in zip(of, num_bytes, strict=True)] for n, of in values.items()}}
    return compare_pairs(held_out, scores, {n: n for n in values}, "oasst", "start", dpo, 100)


def test_a_tie_counts_half_and_beta_scales_the_margin(renderer: Any) -> None:
    start = [(5.0, 2), (5.0, 2), (4.0, 4), (4.0, 4)]
    now = [(3.0, 2), (5.0, 2), (4.5, 4), (4.0, 4)]  # of the first pair +2 and -0.5, of the second nothing
    found = measured({"start": start, "adapter": now}, Dpo(beta=0.5), renderer)
    assert [row["margin"] for row in found["rows"]] == [1.25, 0.0]
    assert found["rewards"]["accuracy"] == 0.75
    assert found["rewards"]["margin"] == 0.625
    assert found["rewards"]["log_ratio_chosen"] == pytest.approx(2.0 / 4)
    assert found["rewards"]["log_ratio_rejected"] == pytest.approx(-0.5 / 8)
    assert found["rewards"]["verdict"] is None, "two trees"
    by_token = measured({"start": start, "adapter": now}, Dpo(beta=0.5, length_normalized=True), renderer)
    assert by_token["rows"][0]["margin"] == pytest.approx(0.5 * (2.0 / 2 + 0.5 / 4))
    # -3 > -4.5 and -5 < -4: one of two; a token -1.5 < -1.125 and -2.5 < -1: none
    assert (found["columns"]["adapter"]["prefers_chosen"], found["columns"]["adapter"]["prefers_chosen_per_token"]) == (0.5, 0.0)
    assert found["columns"]["start"]["prefers_chosen"] == 0.0


def many(renderer: Any, count: int, right: int) -> dict[str, Any]:
    """So many pairs, each in a tree of its own, of which so many are right."""
    pairs = [pair(f"{i}", f"yes {i}", f"no {i}", f"tree {i}") for i in range(count)]
    held_out = pairs_that_fit(pairs, [renderer], 160)
    ours = [scored(4.0, 2) if i < right else scored(6.0, 2) for i in range(count)] + [scored(5.0, 2)] * count
    scores = {"oasst": {"start": [scored(5.0, 2)] * 2 * count, "adapter": ours}}
    found = compare_pairs(held_out, scores, {"start": "adapter at the start", "adapter": "adapter"}, "oasst", "start", Dpo(), 200)
    return {"tuning": "dpo", "preferences": found, "adapter": None, "base": None, "difference": None}


def test_few_trees_have_neither_interval_nor_verdict(renderer: Any) -> None:
    """Seven of seven is no 100 %, from 100 % to 100 %."""
    few, enough = many(renderer, 9, 9), many(renderer, 10, 9)
    for report, knows in ((few, False), (enough, True)):
        rewards, said = report["preferences"]["rewards"], headline(report)
        assert (rewards["interval_95"] is not None) == (rewards["margin_interval_95"] is not None) == knows
        assert (rewards["verdict"] is not None) == ("95 % interval" in said) == ("better than chance" in said) == knows
        assert ("too few trees (9) for a verdict" in said) != knows
        (hero,) = [one for one in heroes({**NOTHING, **report}) if "accuracy" in one["unit"]]
        assert hero["badges"] == ((("better", "better than chance"),) if knows else (("", "too few trees (9)"),))
    assert many(renderer, 10, 0)["preferences"]["rewards"]["verdict"] == "worse"
    assert many(renderer, 10, 5)["preferences"]["rewards"]["verdict"] == "not clearly different"


NOTHING = {"start": None, "difference_from_start": None}


def test_a_share_of_all_trees_is_not_certain(renderer: Any) -> None:
    """By hand: ten heads have the probability 0.025 with a coin of 0.6915, 0.6915 ** 10 = 0.025."""
    low, high = many(renderer, 10, 10)["preferences"]["rewards"]["interval_95"]
    assert (low, high) == (pytest.approx(0.6915, abs=1e-4), 1.0)
    low, high = many(renderer, 10, 0)["preferences"]["rewards"]["interval_95"]
    assert (low, high) == (0.0, pytest.approx(0.3085, abs=1e-4))


def test_slices_tell_a_length_from_a_preference(renderer: Any) -> None:
    values = {"start": [(5.0, 2)] * 4, "adapter": [(4.0, 2), (4.0, 2), (5.0, 2), (5.0, 2)]}
    for sizes, name in (((10, 16), SHORTER), ((16, 10), LONGER), ((10, 15), "of like length"), ((10, 10), "of like length")):
        (row,) = measured(values, Dpo(), renderer, sizes)["slices"]
        assert (row["slice"], row["pairs"], row["accuracy"]) == (name, 2, 1.0)


def test_the_interval_draws_trees() -> None:
    """A tree of many like pairs is one draw: the interval of ten trees is that of ten coins."""
    trees = [str(i) for i in range(10) for _ in range(50)]
    values = [float(i < 6) for i in range(10) for _ in range(50)]
    mean, (low, high) = over_trees(trees, values, [1.0] * 500, 2000)
    assert mean == 0.6
    assert low == pytest.approx(0.3, abs=0.11)
    assert high == pytest.approx(0.9, abs=0.11)
    assert over_trees(["a", "a"], [1.0, 0.0], [1.0, 1.0], 100) == (0.5, None)


def test_the_bars_of_margins_have_the_colours_of_what_is_better() -> None:
    above = histogram([1.0, 2.0, 3.0], "l", "u", more_is_better=True)
    assert "var(--good)" in above
    assert histogram([1.0, 2.0, 3.0], "l", "u") != above


# --- curves, words, runs side by side


def test_the_curves_are_those_of_what_was_learnt(run: Path, first: Path) -> None:
    def titles(metrics: list[dict[str, Any]]) -> list[str]:
        return [curve["title"] for curve in curves(metrics, [])]

    of_dpo, of_sft = ([json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, first))
    assert titles(of_dpo)[:5] == [
        "Loss, nats per pair",
        "Reward accuracy",
        "Margin between the rewards",
        "Rewards",
        "Log-ratio of both answers, nats per token",
    ]
    assert titles(of_sft)[:2] == ["Loss, nats per token", "Learning rate"]
    step = {"step": 1, "loss": 0.0, "reward": 0.4, "finished": 0.5, "words": 40.0, "kl": 0.01, "learning_rate": 1e-4}
    of_grpo = titles([step, {**step, "step": 2}])
    assert of_grpo[0] == "Loss, mean over answers"
    assert {"Reward of an answer", "Answers that end by themselves", "KL divergence from the start, nats per token"} < set(of_grpo)


def test_the_limit_in_words_is_the_one_that_was_rewarded(recipe: Path) -> None:
    values = load(recipe)
    assert concise_words(values) == CONCISE_WORDS == 100
    rewards = [SimpleNamespace(name="no_repetition", words=None), SimpleNamespace(name="within_words", words=60)]
    assert concise_words(SimpleNamespace(grpo=SimpleNamespace(rewards=rewards))) == 60
    assert concise_words(SimpleNamespace(grpo=SimpleNamespace(rewards=rewards[:1]))) is None, "nobody asked for a length"


def test_runs_of_pairs_are_put_side_by_side_with_their_reward_accuracy(run: Path, report: dict[str, Any], folder: Path) -> None:
    other = folder / "one"
    shutil.copytree(run / "evaluation", other / "evaluation", dirs_exist_ok=True)
    evaluate(other)
    (compared,) = comparison_of([run, other], samples=100)
    row = result_rows(compared)[0]
    assert row["reward accuracy"] == f"{report['preferences']['rewards']['accuracy']:.1%}"
    assert row["ended within the limit"].endswith("(100 words)")
    script("evaluate").compare_runs([run, other], folder / "side-by-side")
    page = (folder / "side-by-side" / "compare.html").read_text()
    assert "Training loss, nats per pair" in page
    assert "nats per token" not in page


def test_the_card_says_what_was_learnt_from_and_in_which_unit(run: Path, first: Path, report: dict[str, Any]) -> None:
    results = [
        SimpleNamespace(subject=subject_of(r, []), run=read_json(r / "run.json"), report=report, datasets=(), form="adapter")
        for r in (run, first)
    ]
    of_dpo, of_sft = (dict(training_rows(result)) for result in results)
    assert of_dpo["preferences"] == "DPO on pairs of a chosen and a rejected answer, beta 0.2"
    assert " of 8 pairs, " in of_dpo["steps"]
    assert of_dpo["loss"].endswith("(nats per pair)")
    assert of_sft["loss"].endswith("(nats per token)")
    assert not {"preferences", "start"} & of_sft.keys()
    told = {one.metric_type: one for one in eval_results(results[0])}
    assert told["reward_accuracy"].metric_value == pytest.approx(report["preferences"]["rewards"]["accuracy"], abs=1e-6)
    assert told["reward_accuracy"].metric_args["against"] == "adapter at the start"


# --- the page


def test_where_there_are_many_prompts_the_later_ones_are_folded(report: dict[str, Any]) -> None:
    asked = report["answers"]
    columns = {name: {**column, "answers": column["answers"] * 3} for name, column in asked["columns"].items()}
    assert answers({"answers": {**asked, "prompts": asked["prompts"] * 3, "columns": columns}})["open"] == 9
    assert answers(report)["open"] == 5


@pytest.fixture
def opened(page: Page, run: Path, report: dict[str, Any]) -> Page:
    page.goto((run / "report.html").as_uri())
    return page


def test_the_pairs_at_the_ends_are_shown_with_both_answers(opened: Page, report: dict[str, Any], run: Path) -> None:
    everything = dataset.read_conversations(Path(load(run / "recipe.yaml").data.prepared) / "validation.arrow")
    texts = {c.key: c for c in everything}
    ordered = sorted(report["preferences"]["rows"], key=lambda row: row["margin"])
    for title, rows in (("Most clearly right", ordered[::-1][:3]), ("Most clearly wrong", ordered[:3])):
        card = opened.locator(".card", has=opened.get_by_role("heading", name=title, exact=True))
        shown = card.locator("details")
        assert shown.count() == 3
        for place, row in enumerate(rows):
            one = shown.nth(place)
            assert one.locator(".change").inner_text() == f"{row['margin']:+.3f}"
            one.locator("summary").click()
            for name, text in (("chosen", texts[row["key"]].turns[-1].content), ("rejected", texts[row["key"]].rejected)):
                assert one.locator(f".turn.{name} .text").inner_text().startswith(text[:40].strip())


def test_hostile_pairs_are_text(report: dict[str, Any]) -> None:
    """The page's own template, with answers that a person could have written to be run."""
    hostile = "<script>alert(1)</script>{{ 7*7 }}"
    rows = [{**row, "key": "k", "tree": "t"} for row in report["preferences"]["rows"][:1]]
    found = preferences(
        {**report, "preferences": {**report["preferences"], "rows": [{**rows[0], "margin": 1.0}]}},
        [Conversation("k", ("k",), "t", (Turn("user", hostile), Turn("assistant", hostile)), "en", hostile)],
    )
    ((title, _, (one,)),) = found["ends"]
    assert title == "Most clearly right"
    page = environment().from_string("{{ row.of.turns[-1].content }} {{ row.of.rejected }}").render(row=one)
    assert "<script>" not in page
    source = (ROOT / "src/qlora_suite/pages/report.html").read_text()
    assert "| safe" not in source


def test_the_page_shows_pairs_and_three_models(opened: Page, report: dict[str, Any]) -> None:
    assert "Which of two answers" in opened.locator("h2").all_inner_texts()
    aim = f"{report['preferences']['rewards']['accuracy']:.1%}"
    bits = [f"{report[name]['bits_per_byte']:.4f}" for name in ("base", "start", "adapter")]
    assert opened.locator(".numbers .big").all_inner_texts() == [aim, *bits]
    assert opened.locator(".hero .unit").all_inner_texts()[0].startswith("DPO · reward accuracy on ")
    assert opened.locator(".hero .sentence").inner_text().count("95 % interval") == 3
    assert f"{report['preferences']['rewards']['accuracy']:.1%}" in opened.locator("#pairs + .under").inner_text()
    assert opened.locator(".prompt").first.locator(".answer").count() == 3
    assert opened.get_by_role("img", name="pairs by their margin").count() == 1
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
