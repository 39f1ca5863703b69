"""The first command of the README, as a newcomer types it: real data, real 4-bit weights, a result that holds."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

MADE = ("prepared/quickstart/manifest.json", "runs/quickstart/report.md", "runs/quickstart/report.json", "runs/quickstart/previews.md")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project in another folder, without what earlier runs left.

    The quickstart installs that folder, editable, into the environment of these tests: afterwards it leads here again.
    """
    links = [path for path in Path(sysconfig.get_path("purelib")).glob("__editable__*qlora_suite*") if path.is_file()]
    before = {path: path.read_bytes() for path in links}
    folder = tmp_path_factory.mktemp("a checkout") / "qlora-suite"
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "prepared", "build", "data", "*cache*", "*.egg-info")
    yield Path(shutil.copytree(ROOT, folder, ignore=left_out))
    for path, content in before.items():
        path.write_bytes(content)


def quickstart(checkout: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(checkout / "scripts/quickstart.sh"), "--cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=1500)


@pytest.fixture(scope="module")
def first(checkout: Path) -> subprocess.CompletedProcess[str]:
    return quickstart(checkout)


def test_it_prepares_evaluates_trains_and_evaluates(first: subprocess.CompletedProcess[str], checkout: Path) -> None:
    assert first.returncode == 0, first.stdout + first.stderr
    shown = [line for line in first.stdout.splitlines() if line.startswith("+ ")]
    wanted = (
        "scripts/prepare_data.py recipes/quickstart.yaml",
        "scripts/evaluate.py recipes/quickstart.yaml",
        "accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train.py recipes/quickstart.yaml",
        "scripts/evaluate.py runs/quickstart",
    )
    places = [next(i for i, line in enumerate(shown) if command in line) for command in wanted]
    assert places == sorted(places)
    for path in MADE:
        assert (checkout / path).is_file()
        assert "manifest" in path or path in first.stdout


def test_the_adapter_beats_the_better_of_the_bases_scores(first: subprocess.CompletedProcess[str], checkout: Path) -> None:
    assert first.returncode == 0
    report = json.loads((checkout / "runs/quickstart/report.json").read_text())
    scores = [
        cells["bits_per_byte"] for by_format in report["formats"].values() for column, cells in by_format.items() if column != "adapter"
    ]
    assert len(scores) == 6  # three formats, unquantised and in 4 bits
    assert report["base"]["bits_per_byte"] == min(scores)
    assert report["adapter"]["bits_per_byte"] < min(scores)
    assert report["difference"]["interval_95"][1] < 0
    assert report["difference"]["trees"] >= 35
    assert json.loads((checkout / "runs/quickstart/run.json").read_text())["recipe"]["model"]["quantization"] == "nf4"


def test_the_answers_change_while_it_learns(first: subprocess.CompletedProcess[str], checkout: Path) -> None:
    assert first.returncode == 0
    previews = [json.loads(line) for line in (checkout / "runs/quickstart/previews.jsonl").read_text().splitlines()]
    before, after = previews[0], previews[-1]
    assert (before["step"], after["step"] > 0) == (0, True)
    assert all(a["text"] != b["text"] for a, b in zip(before["answers"], after["answers"], strict=True))


def test_run_again_it_shows_the_finished_result_without_working(first: subprocess.CompletedProcess[str], checkout: Path) -> None:
    assert first.returncode == 0
    run = checkout / "runs/quickstart"
    metrics, report = (run / "metrics.jsonl").read_bytes(), json.loads((run / "report.json").read_text())
    again = quickstart(checkout)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is up to date" in again.stdout
    assert "is finished" in again.stdout
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert json.loads((run / "report.json").read_text()) == report
