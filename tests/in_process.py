"""Prepare and train in the test's own process: a start of the stack costs seconds, a run of the tiny base less than one."""

import importlib.util
import json
import signal
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT

from qlora_suite.files import read_json
from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected
from qlora_suite.subject import subject_of


@cache
def script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prepared(recipe: Path, *overrides: str) -> Path:
    """The recipe, after writing its data.prepared."""
    values = load(recipe, overrides)
    with selected(values) as selection:
        prepare(values, selection)
    return recipe


def train(recipe: Path, *overrides: str, by: str = "train") -> Path:
    """Run the loop of scripts/train.py, or of another script, on one thread. Returns the run's folder.

    Leaves no signal handler and no state behind.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values = load(recipe, overrides)
    try:
        script(by).train(values)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Path(values.output.dir)


def evaluate(target: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Run scripts/evaluate.py on a recipe or a run's folder, with few and short answers. Returns report.json; leaves no state behind."""
    subject = subject_of(target, list(overrides), *map(options.get, ("adapter", "model", "chat")))
    try:
        script("evaluate").run(target, list(overrides), **{"num_answers": 2, "answer_tokens": 12, **options})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return read_json(subject.folder / f"{subject.report}.json")


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, every line of which must be whole."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").strip("\n").split("\n")]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of the training steps; evaluations stand in the same file."""
    return [record for record in lines(run / "metrics.jsonl") if "loss" in record]


def column(records: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [record[key] for record in records]
