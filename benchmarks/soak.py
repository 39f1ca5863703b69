#!/usr/bin/env python
"""Kill a training run at random instants, start it again, and compare what comes out with a run that was left alone.

    python benchmarks/soak.py --cycles 200            some 8 seconds a cycle on two cores; Ctrl-C ends it, and what was found is kept

Every start is scripts/train.py in a fresh interpreter, as a queue starts it, on the embedded base and trees; every kill is SIGKILL: one
in five while it loads, the others after its first step. After each kill the checkpoints are verified. A run that reaches its end is
compared (adapter, curve, optimiser, byte by byte), and the next one begins. Writes benchmarks/soak.json after each cycle.
"""

import datetime
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qlora_suite import checkpoint
from qlora_suite.command_line import parser_for, with_clear_errors
from qlora_suite.files import write_json
from qlora_suite.launched_runs import ROOT
from qlora_suite.model import versions
from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.run_facts import hardware
from qlora_suite.selection import selected
from qlora_suite.tracking import console, read_journal, say

RECIPE, REPORT = ROOT / "recipes" / "quickstart.yaml", ROOT / "benchmarks" / "soak.json"
OVERRIDES = (
    "data.max_length=256",
    "data.dev_share=0.02",
    "adapter.dropout=0.05",
    "train.max_steps=16",
    "train.micro_batch=4",
    "checkpoints={every_steps: 3, keep: 2}",
    "evaluation={every_steps: 4, budget_tokens: 1000}",
    "previews={prompts: [Say hello.], every_steps: 8, max_new_tokens: 8}",
)
WHILE_LOADING = 0.2
"""Of the kills."""
VOLATILE = ("attempt", "tokens_per_second", "peak_memory_gib")


def soak(cycles: int, seed: int, folder: Path) -> None:
    if cycles < 1:
        raise ValueError(f"--cycles is {cycles}; give 1 or more")
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*OVERRIDES, f"data.prepared={folder / 'prepared'}"]
    recipe = load(RECIPE, overrides)
    with selected(recipe) as selection:
        prepare(recipe, selection)
    instants, whole = random.Random(seed), folder / "whole"  # noqa: S311 - no secret
    loading, life = measured(start(overrides, whole), whole)
    say(f"the run that is left alone took {life:.1f} s, {loading:.1f} s of them before its first step")

    found: dict[str, Any] = {
        **{"cycles": 0, "seed": seed, "kills": {}, "checkpoints_found_damaged": 0, "losses_of_data": 0},
        **{"steps_lost_and_redone": 0, "runs_finished": 0, "runs_equal": 0, "unequal": [], "failed_starts": 0},
        **{"date": datetime.date.today().isoformat(), "machine": hardware(torch.device("cpu")), "python": platform.python_version()},
        "versions": versions(),
    }
    kills: Counter[str] = Counter()
    number, had = 0, False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("kills", total=cycles)
        while found["cycles"] < cycles:
            run = folder / f"run{number}"
            before = attempts(run)
            process = start(overrides, run)
            try:
                wait_for_instant(process, run, instants, loading, life)
            finally:  # Ctrl-C, too
                process.send_signal(signal.SIGKILL)
                code = process.wait()
            if code == -signal.SIGKILL:
                kills[phase(run, began=attempts(run) > before)] += 1
                found["cycles"] += 1
                damaged, good = verified(run)
                found["checkpoints_found_damaged"] += damaged
                found["losses_of_data"] += had and not good
                had = bool(good)
                found["steps_lost_and_redone"] += max(0, newest_step(run) - max(good, default=0))
                bar.advance(task)
            elif code == 0:
                differences = differing(run, whole)
                found["runs_finished"] += 1
                found["runs_equal"] += not differences
                if differences:
                    found["unequal"].append({"run": str(run.relative_to(folder)), "differ": differences})
                else:
                    shutil.rmtree(run)
                number, had = number + 1, False
            else:
                found["failed_starts"] += 1
                raise RuntimeError(f"a start of {run} ended with {code}: see {log_of(run)}")
            write_json(REPORT, {**found, "kills": dict(sorted(kills.items()))})
    say(
        f"{found['cycles']} kills {dict(kills)}, {found['runs_finished']} runs finished, {found['runs_equal']} of them equal, "
        f"{found['losses_of_data']} losses of data, {found['checkpoints_found_damaged']} checkpoints damaged; wrote {REPORT}"
    )
    if found["losses_of_data"] or found["unequal"]:
        sys.exit(1)


def start(overrides: list[str], run: Path) -> subprocess.Popen[bytes]:
    """scripts/train.py in an interpreter of its own, on one thread: another number would give other bits."""
    run.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(RECIPE), *overrides, f"output.dir={run}"]
    with log_of(run).open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603


def log_of(run: Path) -> Path:
    return run.with_suffix(".log")


def newest_step(run: Path) -> int:
    return max((record["step"] for record in read_journal(run / "metrics.jsonl")), default=0)


def num_records(run: Path) -> int:
    return len(read_journal(run / "metrics.jsonl"))


def measured(process: subprocess.Popen[bytes], run: Path) -> tuple[float, float]:
    """(seconds before its first step, seconds of its whole life)"""
    began, loading = time.monotonic(), 0.0
    while process.poll() is None:
        if not loading and num_records(run):
            loading = time.monotonic() - began
        time.sleep(0.02)
    if process.returncode != 0:
        raise ValueError(f"the run that is left alone ended with {process.returncode}: see {log_of(run)}")
    return loading, time.monotonic() - began


def wait_for_instant(process: subprocess.Popen[bytes], run: Path, instants: random.Random, loading: float, life: float) -> None:
    """Until it is to be killed, or has ended."""
    if instants.random() < WHILE_LOADING:
        seconds = instants.uniform(0, loading)
    else:
        seconds, before = instants.uniform(0, life - loading), attempts(run)
        while process.poll() is None and attempts(run) <= before:  # its first step
            time.sleep(0.01)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def attempts(run: Path) -> int:
    """Of those that have made a step; a start without a step to make ends by itself."""
    return max((record["attempt"] for record in read_journal(run / "metrics.jsonl")), default=0)


def phase(run: Path, began: bool) -> str:
    """What it was doing when it was killed, by what it has left; `began`: it had made a step."""
    if (run / ".final.tmp").exists():
        return "writing the result"
    if any((run / "checkpoints").glob(".step-*.tmp")):
        return "saving or pruning"
    return "training, evaluating or answering" if began else "loading"


def verified(run: Path) -> tuple[int, list[int]]:
    """How many checkpoints do not verify, and the steps of those that do."""
    steps = checkpoint.steps(run / "checkpoints")
    folders = {step: run / "checkpoints" / f"step-{step:06d}" for step in steps}
    good = [s for s, f in folders.items() if not (checkpoint.complaint_about_checkpoint(f) or checkpoint.complaint_about_contents(f))]
    return len(steps) - len(good), good


def differing(run: Path, whole: Path) -> list[str]:
    """What of a finished run is not as in the one that was left alone."""

    def curve(of: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k not in VOLATILE} for record in read_journal(of / "metrics.jsonl")]

    last = Path("checkpoints") / f"step-{checkpoint.steps(whole / 'checkpoints')[-1]:06d}"
    files = (Path("final") / checkpoint.ADAPTER, Path("final") / "chosen.json", last / checkpoint.OPTIMIZER, Path("previews.jsonl"))
    found = [str(name) for name in files if not (run / name).is_file() or (run / name).read_bytes() != (whole / name).read_bytes()]
    return found + ["metrics.jsonl"] * (curve(run) != curve(whole))


if __name__ == "__main__":
    parser = parser_for(__doc__)
    parser.add_argument("--cycles", type=int, default=200, metavar="N", help="kills (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (0)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "soak", help="where the runs are made anew (build/soak)")
    args = parser.parse_args()
    with_clear_errors(
        lambda: soak(args.cycles, args.seed, args.folder.absolute()), debug=args.debug, interrupted=f"what was found is in {REPORT}"
    )
