"""A run of two processes in which one hangs, dies or raises ends soon, as failed, with a reason, under every engine."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_recipe
from in_process import metrics, prepared

from qlora_suite import checkpoint

ENGINES = ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp")
HUNG_AFTER = 6.0
"""Seconds, which no step of the tiny base takes, and a launcher's poll, the reports and their pause on top."""
SECONDS = {"hangs": HUNG_AFTER + 14, "is killed": 15.0, "raises": 15.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = ("train.max_steps=8", "checkpoints.every_steps=1", "previews={prompts: [Hello], every_steps: 100, max_new_tokens: 4}")
    return prepared(write_recipe(tmp_path_factory.mktemp("dying"), tiny_base, oasst_file, *overrides))


@pytest.mark.parametrize("fault", ["hangs", "is killed", "raises"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_ends(recipe: Path, tmp_path: Path, engine: str, fault: str) -> None:
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{engine}.yaml"]
    script = ["tests/on_cpu.py", "tests/faults/faulty.py", fault, "scripts/train.py", str(recipe), f"output.dir={run}"]
    done = subprocess.run(
        [*launch, "--num_processes", "2", "--main_process_port", "0", *script, f"stop.hung_after_minutes={HUNG_AFTER / 60}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    seconds = time.time() - float(re.search(r"FAULT (\S+)", done.stdout + "FAULT nan")[1])
    assert done.returncode != 0
    assert seconds < SECONDS[fault], done.stdout + done.stderr

    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    reports = sorted(path.name for path in run.glob("hung-rank*.txt"))
    if fault == "hangs":
        assert reports == ["hung-rank0.txt", "hung-rank1.txt"], done.stderr
        assert re.fullmatch(r"hung: nothing for \d+ s since step 4, micro-batch 1; stacks in hung-rank\*.txt", status["reason"])
        assert " in fail\n" in (run / "hung-rank1.txt").read_text()
        assert "/train.py" in (run / "hung-rank0.txt").read_text()
    else:
        assert reports == []
        assert "another process of this run died" in status["reason"]
        assert "error: another process of this run died" in done.stderr
        assert "scripts/train.py" not in done.stderr.replace("scripts/train.py FAILED", ""), "a traceback"
    if fault == "raises":
        assert "error: rank 1 has found a mistake" in done.stderr
    assert [record["step"] for record in metrics(run)] == [1, 2, 3]
    saved = list((run / "checkpoints").iterdir())
    assert saved
    assert not [complaint for folder in saved if (complaint := checkpoint.complaint_about_checkpoint(folder))]
