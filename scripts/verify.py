#!/usr/bin/env python
"""Prove on your own hardware that every engine learns the same curve: one process, DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2.

    python scripts/verify.py                            all of them, on two processes each (with GPUs: one a GPU)
    python scripts/verify.py --engines ddp fsdp         some
    python scripts/verify.py --processes 8

A few steps of recipes/quickstart.yaml in fp32, on a 4-bit base with trained token rows, by each engine in several ways: the rows of a
step at once, or one by one with checkpointing; in one go, or killed and resumed from a checkpoint; and one run that is handed from
engine to engine. Losses, gradient norms, development losses and adapters are compared with one process. Prints a table of the largest
differences, and exits with 1 if one is too large. Everything is written below --folder.
"""

from argparse import Namespace
from pathlib import Path

from qlora_suite.accelerate_config import CONFIGS
from qlora_suite.command_line import parser_for, read_arguments, with_clear_errors

ENGINES = [engine for engine in CONFIGS if engine != "one"]

if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--processes", type=int, help="of DDP, ZeRO and FSDP2 (default: one a GPU, or 2)")
    parser.add_argument("--cpu", action="store_true", help="on the CPU although there are GPUs")
    parser.add_argument("--folder", type=Path, default=Path("runs/verify"))
    args = read_arguments(parser)

import shutil
import sys
import time
from dataclasses import asdict

import torch
from rich.progress import track
from rich.table import Table

from qlora_suite.launched_runs import EQUAL, ROOT, Case, Difference, difference, launch
from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected
from qlora_suite.tracking import console, say

TOLERANCE = 1e-5
"""Of losses and norms, relative; of the adapter's weights, absolute."""
RECIPE = ROOT / "recipes" / "quickstart.yaml"
OVERRIDES = [
    "data.max_examples=120",
    "data.max_length=256",
    "train.max_steps=10",
    "optim.warmup_steps=2",
    # AdamW divides by sqrt(v) + eps: at 1e-8 a gradient that is zero but for rounding still moves its weight by the whole rate
    "optim.eps=1e-6",
    "evaluation.every_steps=5",
    "previews.prompts=[Hello]",
    "previews.every_steps=5",
    "previews.max_new_tokens=8",
    "checkpoints.every_steps=4",
    "checkpoints.every_minutes=null",
]
STRAIGHT = Case("at once", ("train.micro_batch=4",))
BY_ROW = Case("row by row", ("train.micro_batch=1", "train.gradient_checkpointing=true"))
RESUMED = Case("killed, resumed", ("train.micro_batch=4",), killed_after=7)
GRID = (STRAIGHT, BY_ROW, RESUMED)
RELAY = "handed on"


def verify(engines: list[str], folder: Path, processes: int, gpu: bool) -> bool:
    """Everything that the page's head says. True if all differences are small enough."""
    began = time.monotonic()
    complaints = run_everything(engines, folder, processes, gpu)
    results = judged(engines, folder, complaints, gpu)
    table = Table("engine", "way", "loss", "norm", "dev loss", "adapter", "", box=None, pad_edge=False)
    table.title = f"largest difference to one process ({TOLERANCE:g} is allowed)"
    for engine, way, found, ok in results:
        table.add_row(engine, way, *(f"{value:.1e}" for value in asdict(found).values()), "[green]pass[/]" if ok else "[red]FAIL[/]")
    console.print(table)
    for (engine, way), words in complaints.items():
        say(f"{engine}, {way}: {words}")
    good, minutes = sum(ok for *_, ok in results), (time.monotonic() - began) / 60
    where = f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else 'CPU'}, {processes} processes, {minutes:.1f} min"
    say(f"verify: {'one curve' if good == len(results) else 'NOT one curve'}: {good} of {len(results)} pass ({where})")
    return good == len(results)


def run_everything(engines: list[str], folder: Path, processes: int, gpu: bool) -> dict[tuple[str, str], str]:
    """All the runs, below `folder`. Returns what went wrong, by engine and way."""
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*OVERRIDES, f"data.prepared={folder / 'prepared'}", f"train.rows_per_step={4 * max(2, processes)}"]
    recipe = load(RECIPE, overrides)
    with selected(recipe) as selection:
        prepare(recipe, selection)
    # one run that each engine takes two steps further, and one process ends
    relay = {engine: Case(RELAY, stopped_after=2 * (i + 1), folder="../handed-on") for i, engine in enumerate(engines)}
    complaints: dict[tuple[str, str], str] = {}

    def run(engine: str, cases: list[Case], where: str) -> None:
        try:
            outcomes = launch(engine, cases, folder / where, str(RECIPE), overrides, processes, gpu)
        except RuntimeError as error:
            outcomes = {case.name: str(error) for case in cases}
        complaints.update({(where, name): words for name, words in outcomes.items() if words})

    for engine in track(["one", *engines], description="verifying", console=console, disable=not console.is_terminal):
        cases = [*GRID, relay[engine]] if engine in relay else list(GRID)
        say(f"{engine}: {len(cases)} runs on {1 if engine == 'one' else processes} processes")
        run(engine, cases, engine)
    run("one", [Case(RELAY, folder="../handed-on")], "end")
    return complaints


def judged(
    engines: list[str], folder: Path, complaints: dict[tuple[str, str], str], gpu: bool = False
) -> list[tuple[str, str, Difference, bool]]:
    """(engine, way, difference to one process, is it small enough) of every run below `folder`."""
    runs = [(engine, case.name, case.path(folder / engine)) for engine in ["one", *engines] for case in GRID]
    results = []
    for engine, way, path in [*runs, ("all in turn", RELAY, folder / "handed-on")]:
        found = difference(STRAIGHT.path(folder / "one"), path)
        ok = found.within(TOLERANCE) and (engine, way) not in complaints
        if way == RESUMED.name and not gpu:  # at one world size not close, but equal; a GPU's kernels may not even equal themselves
            ok = ok and difference(STRAIGHT.path(folder / engine), path) == EQUAL
        results.append((engine, way, found, ok))
    return results


def main(args: Namespace) -> None:
    gpus = torch.cuda.device_count()
    if gpus == 1 and not args.cpu:
        say("one GPU, and these engines want two: on the CPU (scripts/verify.py is worth most where several GPUs are)")
    gpu = gpus > 1 and not args.cpu
    processes = args.processes or (gpus if gpu else 2)
    if gpu and processes > gpus:
        raise ValueError(f"--processes {processes} are more than the {gpus} GPUs here; use at most {gpus}, or --cpu")
    if not verify(args.engines, args.folder.resolve(), processes, gpu):
        sys.exit(1)


if __name__ == "__main__":
    with_clear_errors(lambda: main(args), debug=args.debug)
