"""The report of a run of GRPO: what answers to held-out prompts are worth, before and after; and its card."""
# ruff: noqa: F811 (fixtures are imported)

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chain import chain  # noqa: F401
from in_process import evaluate
from playwright.sync_api import Page

from qlora_suite import dataset
from qlora_suite.answer_rewards import judge_answers, judges_at_hand, summary
from qlora_suite.compared_runs import REWARD_FILES, comparison_of, notes, read_run, result_rows
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.evaluation import scorable
from qlora_suite.files import file_table, read_json, write_json, write_text
from qlora_suite.model_card import eval_results
from qlora_suite.recipe import Reward
from qlora_suite.report import base_line, findings, headline
from qlora_suite.report_page import heroes
from qlora_suite.rewards import in_words, judges_of
from qlora_suite.sample_answers import chosen_prompts
from qlora_suite.subject import renderer_of, subject_of

COUNT = 12
"""Held-out prompts: enough for a verdict."""


@pytest.fixture(scope="module")
def run(chain: dict[str, Path]) -> Path:
    evaluate(chain["grpo"], num_answers=COUNT, answer_tokens=None)
    return chain["grpo"]


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return read_json(run / "report.json")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """With its answers and scores, so that nothing is computed anew."""
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints")))


def held_out(report: dict[str, Any], column: str) -> list[dict[str, Any]]:
    asked = report["answers"]
    return [one for one, prompt in zip(asked["columns"][column]["answers"], asked["prompts"], strict=True) if prompt["held_out"]]


# --- what is measured


def test_the_answers_are_judged_by_the_rewards_that_were_trained_on(report: dict[str, Any]) -> None:
    """By hand, from the texts in report.json."""
    rewards = report["rewards"]
    assert rewards["weights"] == {"letters": 1.0, "no_repetition": 0.25}
    assert (rewards["prompts"], rewards["began"], rewards["left_out"]) == (COUNT, "start", [])
    totals = {}
    for column in ("base", "start", "adapter"):
        answers = held_out(report, column)
        assert len(answers) == COUNT
        by_hand = [min(1.0, one["text"].count("e") / 8) + 0.25 * (1 - one["repetition"]) for one in answers]
        assert [one["reward"] for one in answers] == pytest.approx(by_hand)
        assert rewards["columns"][column]["mean"] == pytest.approx(np.mean(by_hand))
        each = rewards["columns"][column]["each"]
        assert each["letters"] + 0.25 * each["no_repetition"] == pytest.approx(np.mean(by_hand))
        totals[column] = by_hand
    assert report["answers"]["max_new_tokens"] == 24, "as many as in training"
    for key, before in (("difference_from_start", "start"), ("difference", "base")):
        changes = np.subtract(totals["adapter"], totals[before])
        d = rewards[key]
        assert d["reward"] == pytest.approx(changes.mean())
        assert d["interval_95"][0] <= d["reward"] <= d["interval_95"][1]
        assert (d["higher"], d["lower"]) == ((changes > 0).sum(), (changes < 0).sum())
    assert totals["adapter"] != totals["start"]
    assert rewards["difference_from_start"]["verdict"] is not None


def columns_of(**rewards: Sequence[float]) -> dict[str, Any]:
    prompts = [{"held_out": i < len(next(iter(rewards.values()))) - 1} for i in range(len(next(iter(rewards.values()))))]
    columns = {name: {"label": name, "answers": [{"reward": r, "rewards": {"x": r}} for r in values]} for name, values in rewards.items()}
    return {"prompts": prompts, "columns": columns}


@pytest.mark.parametrize(("count", "verdict"), [(9, None), (10, "better")])
def test_few_prompts_have_no_verdict_and_the_fixed_ones_do_not_count(count: int, verdict: str | None) -> None:
    """The last prompt is none of the validation split."""
    asked = columns_of(start=[0.0] * count + [9.0], adapter=[0.5, 1.0] * (count // 2) + [0.5] * (count % 2) + [0.0])
    found = summary(asked, {"x": (1.0, lambda _: 0.0)}, [], "start", 200)
    assert found["difference_from_start"]["prompts"] == count
    assert found["difference_from_start"]["verdict"] == verdict
    assert found["columns"]["start"]["mean"] == 0.0
    said = findings(found_report(found))[0]
    assert ("which is better" in said) == bool(verdict)
    assert ("too few prompts (9) for a verdict" in said) != bool(verdict)


def found_report(rewards: dict[str, Any]) -> dict[str, Any]:
    return {"tuning": "grpo", "rewards": rewards, "adapter": None, "base": None, "difference": None}


def test_worse_is_worse(report: dict[str, Any]) -> None:
    found = summary(columns_of(start=[0.9, 1.0] * 6, adapter=[0.1] * 12), {"x": (1.0, lambda _: 0.0)}, [], "start", 200)
    assert found["difference_from_start"]["verdict"] == "worse"
    assert found["difference"] is None, "there is no base"


def test_a_judge_is_given_all_that_stood_before_the_answer(tmp_path: Path) -> None:
    said = "answer.prompt.startswith('<|prompter|>') and answer.question == 'hi' and answer.expected == 'Hello.'"
    (tmp_path / "own.py").write_text(f"def asked(answer):\n    return float({said})\n")
    judges = judges_of([Reward(path=f"{tmp_path}/own.py:asked")])
    answers = [{"text": "a", "num_tokens": 1, "stopped": True, "repetition": 0.0} for _ in range(2)]
    prompts = [{"prompt": "hi", "reference": "Hello."}] * 2
    judge_answers({"prompts": prompts, "columns": {"adapter": {"answers": answers}}}, ["<|prompter|> hi", "hi"], judges, [])
    assert [one["reward"] for one in answers] == [1.0, 0.0]


def test_a_reward_that_fails_is_left_out_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def odd(answer):\n    return 1 / (len(answer.text) - 3)\n")
    judges = judges_of([Reward(path=f"{tmp_path}/own.py:odd"), Reward(name="no_repetition", weight=2.0)])
    answers = [{"text": text, "num_tokens": 1, "stopped": True, "repetition": 0.25} for text in ("four", "two")]
    left_out: list[str] = []
    prompts = [{"prompt": "hi", "reference": None}] * 2
    judge_answers({"prompts": prompts, "columns": {"adapter": {"answers": answers}}}, ["", ""], judges, left_out)
    assert list(judges) == ["no_repetition"]
    assert left_out == ["odd failed with ZeroDivisionError"]
    assert [(one["rewards"], one["reward"]) for one in answers] == [({"no_repetition": 0.75}, 1.5)] * 2


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_file_of_ones_own_that_is_not_what_it_was_is_left_out_with_a_word(
    copy: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (copy / "recipe.yaml").read_text()
    own = tmp_path / "own.py"
    place = next(line for line in recipe.splitlines() if "own.py:letters" in line).split("path:")[1].strip().removesuffix(":letters")
    if what == "changed":
        own.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{Path(place).read_text()}")
    (copy / "recipe.yaml").write_text(recipe.replace(place, str(own)))
    found = evaluate(copy, num_answers=COUNT, answer_tokens=None)["rewards"]
    assert list(found["weights"]) == ["no_repetition"]
    (why,) = found["left_out"]
    assert ("there is no file own.py" if what == "gone" else "own.py is not what it was in training") in why
    assert str(tmp_path) not in why
    assert str(own) in " ".join(capsys.readouterr().out.replace("\n", "").split()), "the console says where"
    assert found["in_words"] == "0.25 x no_repetition", "what was not asked does not count as asked"
    assert why in (copy / "report.md").read_text()
    assert why in (copy / "report.html").read_text()
    if what == "changed":
        assert not (tmp_path / "ran").exists(), "what is not the reward is not run"


SECRET = "/proj/secret_lab/customers/words.txt"


def failing(answer: object) -> float:
    raise FileNotFoundError(2, "No such file or directory", SECRET)


def test_an_error_of_ones_own_function_is_for_the_console_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_suite.rewards.judge_of", lambda _: failing)
    found = evaluate(copy, num_answers=COUNT, answer_tokens=None)
    assert found["rewards"]["left_out"] == ["letters failed with FileNotFoundError", "no_repetition failed with FileNotFoundError"]
    assert SECRET in capsys.readouterr().out.replace("\n", "")
    for name in ("report.json", "report.md", "report.html"):
        assert "secret_lab" not in (copy / name).read_text(), name
    assert "None of the recipe's rewards could be asked." in (copy / "report.md").read_text()
    assert found["rewards"]["columns"] == {}
    assert not any("reward" in one for column in found["answers"]["columns"].values() for one in column["answers"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import nowhere_at_all", "f: own.py cannot be run: ModuleNotFoundError"),
        ("g = 1", "f: own.py has no function f"),
        (None, "f: there is no file own.py"),
    ],
)
def test_what_is_wrong_with_a_file_is_published_without_its_folder(tmp_path: Path, body: str | None, said: str) -> None:
    if body:
        (tmp_path / "own.py").write_text(body)
    assert judges_at_hand([Reward(path=f"{tmp_path}/own.py:f")], {}) == ({}, [said])


def test_a_file_that_may_not_be_looked_at_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refused)  # as in a folder that one may not enter; root may enter each
    assert judges_at_hand([Reward(path=f"{tmp_path}/own.py:f")], {}) == ({}, ["f: own.py cannot be read: PermissionError"])


def test_a_value_that_is_none_is_not_published_either(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(answer):\n    return 'secret'\n")
    judges, left_out = judges_at_hand([Reward(path=f"{tmp_path}/own.py:f")], {})
    answers = [{"text": "a", "num_tokens": 1, "stopped": True, "repetition": 0.0}]
    judge_answers({"prompts": [{"prompt": "", "reference": None}], "columns": {"x": {"answers": answers}}}, [""], judges, left_out)
    assert left_out == ["f gave no number from 0 to 1"]


def test_a_reward_keeps_its_name_if_the_one_before_it_is_gone(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text("def f(answer):\n    return 1.0\n")
    wanted = [Reward(path=f"{tmp_path}/{name}.py:f") for name in ("gone", "here")]
    judges, left_out = judges_at_hand(wanted, {})
    assert list(judges) == ["f_2"]
    assert left_out == ["f: there is no file gone.py"]
    many = [Reward(path=f"{tmp_path}/here.py:f"), Reward(path=f"{tmp_path}/here.py:f"), Reward(name="no_repetition")]
    assert list(judges_of(many)) == ["f", "f_2", "no_repetition"], "the names of training"


def test_while_a_reward_is_left_out_there_is_no_verdict(report: dict[str, Any]) -> None:
    for left_out, clear in (([], True), (["f: there is no file own.py"], False)):
        asked = columns_of(start=[0.0] * COUNT, adapter=[1.0] * COUNT)
        found = {"in_words": "x", **summary(asked, {"x": (1.0, failing)}, left_out, "start", 100)}
        shown = {**report, "rewards": found}
        assert (found["difference_from_start"]["verdict"] is not None) == clear
        assert ("of the rewards that could be asked" in findings(shown)[0]) != clear
        assert ("without a verdict, for not all were asked" in findings(shown)[0]) != clear
        (hero,) = [one for one in heroes(shown) if "mean reward" in one["unit"]]
        assert ("too few" in str(hero["badges"])) is False
        assert ("no verdict: not all rewards were asked" in str(hero["badges"])) != clear


def test_a_hub_metric_is_of_all_rewards_or_is_none(run: Path, report: dict[str, Any]) -> None:
    for left_out in ([], ["f: there is no file own.py"]):
        shown = {**report, "rewards": {**report["rewards"], "left_out": left_out}}
        result = SimpleNamespace(subject=subject_of(run, []), run=read_json(run / "run.json"), report=shown, datasets=(), form="adapter")
        assert ("mean_reward" in [one.metric_type for one in eval_results(result)]) == (not left_out)


def test_without_a_reward_for_few_words_nobody_counts_them(report: dict[str, Any], run: Path) -> None:
    assert report["answers"]["concise_words"] is None
    text = (run / "report.md").read_text() + (run / "report.html").read_text()
    assert "within 100 words" not in text
    assert "Dashed: " not in text
    assert "ended by themselves: base" in text


def test_rewards_are_told_without_the_folder_they_lie_in() -> None:
    wanted = [Reward(name="within_words", words=30, min_words=4), Reward(path="/home/me/own.py:polite", weight=0.5)]
    assert (
        in_words(wanted, published=True)
        == "within_words (words: 30, min_words: 4) + 0.5 x polite (a function of its maker's own, in own.py)"
    )


# --- what is said first


def test_the_aim_comes_first_then_what_it_cost_and_then_the_base(report: dict[str, Any], run: Path, chain: dict[str, Path]) -> None:
    said = findings(report)
    assert headline(report) == said[0]
    assert said[0].startswith(f"The mean reward of answers to {COUNT} held-out prompts is ")
    assert said[1].startswith("After GRPO: ")
    assert "against the adapter at the start" in said[1]
    assert said[2] == base_line(report)
    text = (run / "report.md").read_text()
    assert text.index(said[0]) < text.index(said[1]) < text.index(said[2]) < text.index("## Rewards")
    assert "| reward, the weighted sum |" in text
    of_sft = evaluate(chain["sft"], num_answers=0)
    assert headline(of_sft) == base_line(of_sft)


def test_slices_and_conversations_compare_with_the_start(report: dict[str, Any], run: Path) -> None:
    for row in report["slices"]:
        assert {"base", "start", "adapter"} < row.keys()
    sides = {name: report["formats"]["oasst"][name]["bits_per_byte"] for name in ("start", "adapter")}
    by_answer = [row for row in report["slices"] if row["by"] == "language"]
    assert len(by_answer) == 1  # of all answers together
    assert by_answer[0]["start"] == pytest.approx(sides["start"])
    text = (run / "report.md").read_text()
    assert "| by | slice | answers | base | start | adapter | difference to the start |" in text
    assert f"| {by_answer[0]['adapter'] - by_answer[0]['start']:+.4f} |" in text


@pytest.fixture
def opened(page: Page, run: Path) -> Page:
    page.goto((run / "report.html").as_uri())
    return page


def test_the_page_shows_reward_and_cost_each_with_what_it_is_compared_with(opened: Page, report: dict[str, Any]) -> None:
    rewards = report["rewards"]
    shown = [f"{rewards['columns'][name]['mean']:.3f}" for name in ("base", "start", "adapter")]
    bits = [f"{report[name]['bits_per_byte']:.4f}" for name in ("base", "start", "adapter")]
    assert opened.locator(".numbers .big").all_inner_texts() == [*shown, *bits]
    badges = [opened.locator(".numbers").nth(place).locator(".verdict").all_inner_texts() for place in range(2)]
    for found, of in zip(badges, (rewards, report), strict=True):
        assert len(found) == 2
        assert found[0].startswith(of["difference_from_start"]["verdict"])
        assert found[0].endswith("the start")
        assert found[1].startswith(of["difference"]["verdict"])
        assert found[1].endswith("the base")
    assert opened.locator("#rewards + .under + .two tbody tr").count() == 3
    assert opened.get_by_role("img", name="reward of each answer").count() == 1
    assert "than at the start" in opened.locator("#conversations + .under").inner_text()
    assert "may begin in the middle of a word" in opened.locator("#answers + .under").inner_text()
    assert f"reward {held_out(report, 'adapter')[0]['reward']:.3f}" in opened.locator(".answer.adapter .who").first.inner_text()
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# --- data of prompts alone


@pytest.fixture
def prompts_alone(copy: Path, tmp_path: Path) -> Path:
    """The run, whose held-out conversations have lost their answers."""
    prepared = Path(subject_of(copy, []).recipe.data.prepared)
    shutil.copytree(prepared, tmp_path / "prepared")
    path = tmp_path / "prepared" / "validation.arrow"
    kept = []
    for one in dataset.read_conversations(path):
        place = next(i for i, turn in enumerate(one.turns) if turn.role == "assistant")
        kept.append(replace(one, turns=(*one.turns[:place], Turn("assistant", ""))))
    dataset.write_table(path, map(dataset.conversation_record, kept), dataset.CONVERSATIONS)
    manifest = read_json(tmp_path / "prepared" / "manifest.json")
    manifest["files"]["validation.arrow"] = file_table(path.parent, but=dataset.MANIFEST)["validation.arrow"]
    write_json(tmp_path / "prepared" / "manifest.json", dataset.sealed(manifest))
    recipe = (copy / "recipe.yaml").read_text()
    write_text(copy / "recipe.yaml", recipe.replace(str(prepared), str(tmp_path / "prepared")))
    return copy


def test_prompts_alone_are_answered_and_judged_and_nothing_is_scored(prompts_alone: Path, report: dict[str, Any], page: Page) -> None:
    found = evaluate(prompts_alone, num_answers=COUNT, answer_tokens=None)
    assert (found["formats"], found["adapter"], found["base"], found["start"]) == ({}, None, None, None)
    assert {**found["rewards"], "x": 0} == {**report["rewards"], "x": 0}, "the same prompts, the same answers"
    assert all(prompt["reference"] is None for prompt in found["answers"]["prompts"])
    text = (prompts_alone / "report.md").read_text()
    assert text.count("there is nothing to score in bits per byte") == 2
    page.goto((prompts_alone / "report.html").as_uri())
    assert page.locator(".numbers .big").count() == 3
    headings = page.locator("h2").all_inner_texts()
    assert not {"Every model in every format", "Slices", "Conversation by conversation"} & set(headings)
    with pytest.raises(ValueError, match="was scored on prompts alone"):
        read_run(prompts_alone)


def test_prompts_alone_and_no_answers_asked_for_are_nothing_to_report(prompts_alone: Path) -> None:
    with pytest.raises(ValueError, match="no held-out conversation has an answer to be scored"):
        evaluate(prompts_alone, num_answers=0, answer_tokens=None)


def test_what_can_be_scored_ends_on_an_answer_that_says_something() -> None:
    def of(*turns: tuple[str, str]) -> Conversation:
        return Conversation("k", ("k",), "t", tuple(Turn(*turn) for turn in turns))

    whole = of(("user", "a"), ("assistant", "b"))
    assert scorable(whole) is whole
    assert scorable(of(("user", "a"), ("assistant", " \n"))) is None
    assert scorable(of(("user", "a"))) is None
    assert scorable(of(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", ""))) == whole


def test_prompts_are_chosen_with_and_without_answers(run: Path) -> None:
    renderer = renderer_of(subject_of(run, []))
    kept = [Conversation("k", ("k",), "t", (Turn("user", "Why?"), *end)) for end in ((Turn("assistant", ""),), ())]
    for one in kept:
        assert [(p.text, p.reference) for p in chosen_prompts([one], renderer, 3, 100) if p.held_out] == [("Why?", None)]


# --- side by side


def test_runs_side_by_side_have_their_mean_reward(run: Path, copy: Path, report: dict[str, Any]) -> None:
    (compared,) = comparison_of([run, copy], samples=50)
    for row in result_rows(compared):
        assert row["mean reward"] == f"{report['rewards']['columns']['adapter']['mean']:.4f}"
        assert row["ended within the limit"] == ""


@pytest.mark.parametrize("what", ["in_words", "weights", "file", "prompts", "max_new_tokens"])
def test_means_of_different_rewards_do_not_stand_in_one_column(run: Path, copy: Path, report: dict[str, Any], what: str) -> None:
    if what in ("prompts", "max_new_tokens"):
        other = report["answers"][what][:-1] if what == "prompts" else 1
        write_json(copy / "report.json", {**report, "answers": {**report["answers"], what: other}})
    elif what == "file":
        status = read_json(copy / "status.json")
        status["identity"] = {k: f"{v}x" if k.startswith("grpo.rewards.") else v for k, v in status["identity"].items()}
        write_json(copy / "status.json", status)
    else:
        other = {"in_words": "no_repetition", "weights": {"letters": 1.0, "no_repetition": 0.5}}[what]
        write_json(copy / "report.json", {**report, "rewards": {**report["rewards"], what: other}})
    (compared,) = comparison_of([run, copy], samples=50)
    assert [row["mean reward"] for row in result_rows(compared)] == [""] * len(compared.entries)
    (note,) = (note for note in notes(compared) if "The mean reward is left out" in note)
    assert ("by different rewards: " in note) == (what == "in_words")


def test_only_files_of_ones_own_have_a_hash_beside_the_settings(copy: Path) -> None:
    assert REWARD_FILES in read_run(copy).settings
    status = read_json(copy / "status.json")
    status["identity"] = {k: v for k, v in status["identity"].items() if ".path (" not in k}
    write_json(copy / "status.json", status)
    assert REWARD_FILES not in read_run(copy).settings


def test_runs_that_cannot_be_compared_are_told_why_and_what_to_do(run: Path, chain: dict[str, Path], capsys: Any) -> None:
    evaluate(chain["sft"], num_answers=0)
    evaluate(chain["dpo"], num_answers=0)
    with pytest.raises(ValueError, match="no two of these runs were scored on the same answers") as refused:
        comparison_of([chain["sft"], chain["dpo"], run])
    said = str(refused.value)
    assert "window (data.max_length): 256 tokens | 200 tokens | 160 tokens" in said
    assert "policy preference_pairs" in said
    assert f"{chain['dpo']} began with {chain['sft']}: its own report compares the two" in said
    command = said.partition("python scripts/evaluate.py ")[2].split()
    assert command == [f"{chain['sft']}/recipe.yaml", "--adapter", f"{chain['dpo']}/final"]
    other = evaluate(Path(command[0]), adapter=command[2], num_answers=0)  # what it says can be done
    assert other["window"] == 256
    assert other["adapter"] is not None
    assert (chain["sft"] / "report-dpo.json").is_file()
