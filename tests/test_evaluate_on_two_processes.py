"""Processes that share out an evaluation report what one reports, and end together whatever happens to one of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_recipe
from in_process import evaluate, prepared, script, train

from qlora_suite.files import read_json

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
RUNS = ("one", "plain", "short", "too_large", "hopeless", "mistake", "elsewhere", "fsdp", "deepspeed_zero3", "stopped")
Outcomes = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """A folder with many copies of one finished run: 6 steps of QLoRA on the tiny random base."""
    folder = tmp_path_factory.mktemp("runs")
    train(prepared(write_recipe(folder, tiny_base, oasst_file, "train.max_steps=6", "data.policy=best_replies")))
    for name in RUNS:
        shutil.copytree(folder / "run", folder / name, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


@pytest.fixture(scope="module")
def one(runs: Path) -> dict[str, Any]:
    return evaluate(runs / "one")


@pytest.fixture(scope="module")
def two_ranks(runs: Path) -> tuple[Outcomes, str]:
    """What happened to two ranks that went through every case of evaluating_program.py, and what they said."""
    command = [*LAUNCH, "2", str(ROOT / "tests" / "evaluating_program.py"), str(runs)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((runs / f"outcomes-{rank}.json").read_text()) for rank in range(2)], done.stdout


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], rel: float) -> None:
    numbers = {key: value for key, value in theirs.items() if isinstance(value, float)}
    assert {key: ours[key] for key in numbers} == pytest.approx(numbers, rel=rel)
    assert {key: value for key, value in ours.items() if key not in numbers} == {k: v for k, v in theirs.items() if k not in numbers}


def assert_same_report(report: dict[str, Any], one: dict[str, Any]) -> None:
    assert report["formats"].keys() == one["formats"].keys()
    for name, cells in one["formats"].items():
        assert list(report["formats"][name]) == list(cells)
        for column, cell in cells.items():
            assert_close(report["formats"][name][column], cell, rel=1e-6)
    for ours, theirs in zip(report["conversations"], one["conversations"], strict=True):
        assert_close(ours, theirs, rel=1e-5)
    assert report["difference"]["verdict"] == one["difference"]["verdict"]
    assert (report["data"], report["cut"], report["left_out"]) == (one["data"], one["cut"], one["left_out"])


def test_two_processes_report_what_one_reports(runs: Path, one: dict[str, Any], two_ranks: tuple) -> None:
    assert_same_report(read_json(runs / "plain" / "report.json"), one)
    assert read_json(runs / "plain" / "report.json")["answers"] == one["answers"]
    pages = []
    for name in ("plain", "one"):  # in drawings, rounding shows
        page = re.sub(r"<svg.*?</svg>", "", (runs / name / "report.html").read_text(), flags=re.S).partition('<h2 id="capsule">')[0]
        pages.append(page.replace(str(runs / name), ""))
    assert "Answers, side by side" in pages[0]
    assert pages[0] == pages[1]
    text, expected = ((runs / name / "report.md").read_text() for name in ("plain", "one"))
    assert text.partition("## Made by")[0] == expected.partition("## Made by")[0]
    files = sorted(path.name for path in (runs / "plain" / "evaluation").iterdir())
    assert files == sorted(path.name for path in (runs / "one" / "evaluation").iterdir())
    for name in files:  # every score of every answer, in its place
        ours, theirs = (read_json(runs / run / "evaluation" / name) for run in ("plain", "one"))
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, rel=1e-5)


def test_each_process_has_like_work(one: dict[str, Any], two_ranks: tuple) -> None:
    first, second = (outcomes["plain"]["tokens"] for outcomes in two_ranks[0])
    cells = [cell for cells in one["formats"].values() for cell in cells.values()]
    assert first + second == sum(cell["num_tokens"] + cell["end_tokens"] for cell in cells)
    assert 0.7 < first / second < 1.4


@pytest.mark.parametrize(("config", "processes"), [("fsdp", 3), ("deepspeed_zero3", 2)])
def test_under_any_config_and_number_it_is_said_once(runs: Path, one: dict[str, Any], config: str, processes: int) -> None:
    """As a person launches it. These configs make transformers load a part of a model in places, which must not happen here."""
    launch = ["accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", str(processes)]
    command = [sys.executable, "-m", *launch, "tests/on_cpu.py", "scripts/evaluate.py", str(runs / config)]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_report(read_json(runs / config / "report.json"), one)
    assert done.stdout.count("bits per byte (perplexity)") == 1
    assert done.stdout.count("wrote ") == 1
    assert done.stdout.count("scoring ") == 7


def test_what_is_kept_is_not_scored_again(runs: Path, two_ranks: tuple) -> None:
    for outcomes in two_ranks[0]:
        assert outcomes["plain"]["loaded"] == ["base_unquantised", "base_quantised", "adapter"]
        assert (outcomes["again"]["loaded"], outcomes["again"]["error"]) == ([], None)
        assert (outcomes["adapter only"]["loaded"], outcomes["adapter only"]["error"]) == (["adapter"], None)


def test_only_the_main_process_looks_at_the_disk_for_scores(runs: Path, two_ranks: tuple) -> None:
    for outcomes in two_ranks[0]:
        assert (outcomes["own disk"]["loaded"], outcomes["own disk"]["error"]) == ([], None)
    assert not (runs / "elsewhere" / "evaluation").exists()
    assert not (runs / "elsewhere" / "report.json").exists()


def test_memory_that_is_short_on_one_rank_means_less_at_once_on_all(runs: Path, one: dict[str, Any], two_ranks: tuple) -> None:
    first, second = (outcomes["short of memory"] for outcomes in two_ranks[0])
    assert first["error"] is second["error"] is None
    assert first["limits"] == second["limits"]
    assert first["limits"][:3] == [256, 128, 64]
    assert_same_report(read_json(runs / "short" / "report.json"), one)


def test_a_base_too_large_for_one_rank_is_left_out_by_all(runs: Path, two_ranks: tuple) -> None:
    assert [outcomes["too large"]["error"] for outcomes in two_ranks[0]] == [None, None]
    report = read_json(runs / "too_large" / "report.json")
    assert [left["column"] for left in report["left_out"]] == ["base_unquantised"]
    assert "does not fit into the memory of the cpu device" in report["left_out"][0]["why"]
    assert report["difference"] is not None


def test_an_adapter_too_large_for_one_rank_ends_all_with_one_sentence(runs: Path, two_ranks: tuple) -> None:
    first, second = (outcomes["too large adapter"]["error"] for outcomes in two_ranks[0])
    assert first[0] == "ValueError"
    assert "even one row at a time" in first[1]
    assert second[0] == "EndedByAnotherRank"
    assert not (runs / "hopeless" / "report.json").exists()
    assert len(list((runs / "hopeless" / "evaluation").iterdir())) == 6  # the base's scores are kept


def test_a_mistake_of_one_rank_ends_all(runs: Path, two_ranks: tuple) -> None:
    first, second = (outcomes["mistake"] for outcomes in two_ranks[0])
    assert second["error"] == ["ValueError", "this rank cannot read it"]
    assert first["error"] == ["EndedByAnotherRank", "rank 1 failed: ValueError: this rank cannot read it"]
    assert not (runs / "mistake" / "evaluation").exists()


def test_a_mistake_that_all_ranks_find_is_said_by_the_first(two_ranks: tuple) -> None:
    assert [outcomes["a mistake of all"]["error"][0] for outcomes in two_ranks[0]] == ["ValueError", "EndedByAnotherRank"]


def test_a_mistake_on_the_command_line_is_one_sentence(runs: Path) -> None:
    command = [*LAUNCH, "2", "scripts/evaluate.py", str(runs / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("there is no run in") == 1
    assert done.stderr.count("error: ") == 1


def test_a_request_to_end_leaves_whole_files_and_what_was_scored(runs: Path, one: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs / "stopped"
    command = [sys.executable, "scripts/evaluate.py", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((run / "evaluation").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "stopped; the same command goes on" in out
    assert "Traceback" not in err
    assert not (run / "report.json").exists()
    kept = [path.name for path in (run / "evaluation").iterdir()]
    assert 1 <= len(kept) < 7
    assert all(re.fullmatch(r"base_[a-z]+-[a-z_]+-[0-9a-f]{16}\.json", name) for name in kept)

    scored = []
    evaluating = script("evaluate")
    real = evaluating.score_within_memory
    monkeypatch.setattr(evaluating, "score_within_memory", lambda *args: (scored.append(args), real(*args))[1])
    assert_same_report(evaluate(run), one)
    assert len(scored) == 7 - len(kept)
