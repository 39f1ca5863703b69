"""evaluate.py --compare: what differs is named, seeds are folded, and what cannot be compared is not."""

import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import run_script, write_recipe
from in_process import prepared, script, train
from playwright.sync_api import Page

from qlora_suite.compare_page import compare_page
from qlora_suite.compared_runs import comparison_of, markdown, notes, result_rows
from qlora_suite.evaluation import AnswerScore, paired_interval
from qlora_suite.files import read_json, write_json

NAMES = {"first": (), "second": ("seed=1",), "third": ("seed=2",), "slow": ("optim.learning_rate=1e-4", "train.micro_batch=2")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """Four evaluated runs of six steps: three seeds of one recipe, and one with a lower rate."""
    folder = tmp_path_factory.mktemp("compared")
    recipe = prepared(write_recipe(folder, tiny_base, oasst_file, "train.max_steps=6", "data.policy=best_replies"))
    for name, overrides in NAMES.items():
        run = train(recipe, f"output.dir={folder / name}", *overrides)
        try:
            script("evaluate").run(run, [], num_answers=1, answer_tokens=4)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return folder


def changed(run: Path, to: Path, **values: Any) -> Path:
    """A copy of the run whose report has other values."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "final"))
    write_json(to / "report.json", {**read_json(to / "report.json"), **values})
    return to


def bits(run: Path) -> float:
    return read_json(run / "report.json")["adapter"]["bits_per_byte"]


def adapter_scores(run: Path) -> list[AnswerScore]:
    (path,) = (run / "evaluation").glob("adapter-*.json")
    return [AnswerScore(**values) for values in read_json(path)]


def test_seeds_are_folded_into_mean_and_standard_deviation(runs: Path) -> None:
    folders = [runs / name for name in ("first", "slow", "second", "third")]
    (compared,) = comparison_of(folders)
    seeds, slow = compared.entries
    assert [run.folder.name for run in seeds.runs] == ["first", "second", "third"]
    scores = [bits(runs / name) for name in ("first", "second", "third")]
    assert len(set(scores)) == 3
    assert seeds.mean == pytest.approx(statistics.fmean(scores))
    assert seeds.deviation == pytest.approx(statistics.stdev(scores))
    assert slow.deviation is None
    first, second = result_rows(compared)
    assert first["bits per byte"] == f"{statistics.fmean(scores):.4f} ± {statistics.stdev(scores):.4f}"
    assert (first["seeds"], second["seeds"]) == ("3 seeds", "one seed")
    assert any(f"{runs / 'slow'}: one seed." in note and str(runs / "first") not in note for note in notes(compared))


def test_runs_on_other_data_are_no_seeds_of_one_run(runs: Path, tmp_path: Path) -> None:
    other = changed(runs / "second", tmp_path / "other")
    status = read_json(other / "status.json")
    status["identity"]["data (hash of rows and tokenizer)"] = "0" * 64
    write_json(other / "status.json", status)
    (compared,) = comparison_of([runs / "first", other])
    assert [len(entry.runs) for entry in compared.entries] == [1, 1]
    assert "data (hash)" in {key for key, _, _ in compared.differing}


def test_what_differs_is_named_and_nothing_else(runs: Path) -> None:
    (compared,) = comparison_of([runs / "first", runs / "slow"])
    settings = {key: (values, learnt) for key, values, learnt in compared.differing}
    assert settings == {"optim.learning_rate": (("0.002", "0.0001"), True), "train.micro_batch": (("auto", "2"), False)}
    (compared,) = comparison_of([runs / "first", runs / "second", runs / "slow"])
    assert compared.differing[0] == ("seed", ("0, 1", "0"), True)


def test_a_run_is_paired_with_the_first_on_the_same_trees(runs: Path) -> None:
    (compared,) = comparison_of([runs / "first", runs / "slow"])
    none, found = compared.against_first
    assert none is None
    expected = paired_interval(adapter_scores(runs / "first"), adapter_scores(runs / "slow"), 2000)
    assert found["bits_per_byte"] == pytest.approx(bits(runs / "slow") - bits(runs / "first"))
    assert found["interval_95"] == pytest.approx(expected["interval_95"])
    assert found["verdict"] == expected["verdict"]


def test_seeds_are_paired_by_their_means(runs: Path) -> None:
    (compared,) = comparison_of([runs / "slow", runs / "first", runs / "second"])
    found = compared.against_first[1]
    mean = statistics.fmean([bits(runs / "first"), bits(runs / "second")])
    assert found["bits_per_byte"] == pytest.approx(mean - bits(runs / "slow"))


def test_one_result_twice_is_no_second_seed(runs: Path, tmp_path: Path) -> None:
    twin = changed(runs / "first", tmp_path / "twin")
    (compared,) = comparison_of([runs / "first", twin])
    assert [len(entry.runs) for entry in compared.entries] == [1, 1]
    assert any("one result twice" in note for note in notes(compared))


def test_gains_against_a_base_in_one_format_are_no_gains_against_its_best(runs: Path, tmp_path: Path) -> None:
    report = read_json(runs / "second" / "report.json")
    other = changed(runs / "second", tmp_path / "other", formats={"oasst": report["formats"]["oasst"]})
    words = "the gains against it do not compare"
    for second, expected in ((runs / "second", False), (other, True)):
        (compared,) = comparison_of([runs / "first", second])
        assert any(words in note for note in notes(compared)) is expected


def test_runs_scored_on_other_answers_stand_apart(runs: Path, tmp_path: Path) -> None:
    report = read_json(runs / "first" / "report.json")
    window = changed(runs / "second", tmp_path / "window", window=128)
    data = changed(runs / "second", tmp_path / "data", data={**report["data"], "validation_sha256": "0" * 64})
    answers = changed(runs / "second", tmp_path / "answers", conversations=report["conversations"][1:])
    for other in (window, data, answers):
        with pytest.raises(ValueError, match="no two of these runs were scored on the same answers") as error:
            comparison_of([runs / "first", other])
        assert str(other) in str(error.value)
        sets = comparison_of([runs / "first", other, runs / "slow"])
        assert [[entry.name for entry in one.entries] for one in sets] == [[str(runs / "first"), str(runs / "slow")], [str(other)]]
        text = markdown(sets)
        assert "2 different sets of answers" in text
        assert text.index("## Set 2") > text.index(str(runs / "slow"))
    assert "window 128 tokens" in markdown(comparison_of([runs / "first", window, runs / "slow"]))


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("first",), "name two or more runs"),
        (("first", "first"), "is named twice"),
        (("first", "prepared"), "is not a run's folder"),
        (("first", "unscored"), "has no report.json; make it first: python scripts/evaluate.py "),
    ],
)
def test_a_mistake_is_one_sentence(runs: Path, names: tuple[str, ...], complaint: str) -> None:
    if not (runs / "unscored").exists():
        shutil.copytree(runs / "first", runs / "unscored", ignore=shutil.ignore_patterns("report*", "checkpoints", "final"))
    with pytest.raises(ValueError, match=complaint):
        comparison_of([runs / name for name in names])


def test_the_command_writes_a_page_and_markdown(runs: Path, tmp_path: Path, page: Page) -> None:
    hostile = changed(runs / "slow", tmp_path / "<img src=x onerror=document.title=1> $x^ {{ 7*7 }} | b")
    done = run_script("evaluate.py", "--compare", runs / "first", runs / "second", hostile, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "2 seeds" in done.stdout
    assert done.stdout.rstrip().endswith("compare.html")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "<img" not in text
    assert "{{ 7*7 }} \\| b" in text
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "out" / "compare.html").as_uri())
    assert said == []
    assert page.title() == "Runs side by side"
    assert page.locator("img, script").count() == 0
    assert page.locator("th", has_text="<img src=x").count() == 2
    assert page.locator("figure svg").count() == 3
    for width in (400, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_goes_to_the_folder_that_the_runs_have_in_common(runs: Path) -> None:
    script("evaluate").compare_runs([runs / "first", runs / "slow"], None)
    assert (runs / "compare.html").read_text() == compare_page(comparison_of([runs / "first", runs / "slow"]))


def test_what_has_no_effect_is_refused(runs: Path) -> None:
    parse = script("evaluate").parser().parse_intermixed_args
    for line, complaint in (
        (["--compare", "a", "b", "--answers", "0"], "--answers"),
        (["--compare", "a", "b", "--lm-eval", "x"], "--lm-eval"),
        ([str(runs / "first"), "--output", "x"], "--output says where --compare writes"),
        ([str(runs / "first"), "--answers", "0", "--answer-tokens", "9"], "--answer-tokens has no effect"),
        ([str(runs / "first"), "--answers", "-1"], "0 or more"),
        ([str(runs / "first"), "--lm-eval-limit", "3"], "without --lm-eval"),
        ([], "give a recipe"),
    ):
        with pytest.raises(ValueError, match=complaint):
            script("evaluate").check(parse(line))
