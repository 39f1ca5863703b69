#!/usr/bin/env python
"""Walk what can be combined: quantisation x engine x precision x checkpointing x packing x DoRA, and write the table of what works.

    python scripts/compatibility.py                     every combination, some 10 minutes on two cores
    python scripts/compatibility.py --engines zero3     some

A combination works if three steps of a random Phi of two small layers give the curve of one process, and a whole adapter; it is
refused if the suite says so before anything is loaded. Anything else is a fault, and the exit code is 1. Writes
benchmarks/compatibility.md and compatibility.json, with date and versions.
"""

from argparse import Namespace
from pathlib import Path

from qlora_suite.accelerate_config import CONFIGS
from qlora_suite.command_line import parser_for, read_arguments, with_clear_errors

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    engines = [engine for engine in CONFIGS if engine != "one"]
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--folder", type=Path, default=Path("runs/compatibility"), help="where the runs go")
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "compatibility")
    parser.add_argument("--judge-again", action="store_true", help="the runs that are there, without running anything")
    args = read_arguments(parser)

import datetime
import importlib.metadata
import itertools
import math
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_suite.files import read_json, write_json, write_text
from qlora_suite.launched_runs import FAILED, Case, difference, launch
from qlora_suite.model import versions as versions_imported
from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected
from qlora_suite.tracking import console, read_journal, say

QUANTIZATIONS, PRECISIONS = ("nf4", "int8", "none"), ("fp32", "bf16", "fp16")
TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (2e-4, 5e-2), "fp16": (2e-4, math.inf)}
"""Of losses and gradient norms, relative to one process. In these three steps the loss falls by some 2e-3 of itself. In fp16 the search
for the loss scale may skip another first step on two processes, and a skipped step has no norm."""
RECIPE = ROOT / "recipes" / "quickstart.yaml"
OVERRIDES = [
    "data.max_examples=60",
    "data.max_length=256",
    "train.max_steps=3",
    "train.rows_per_step=4",
    "evaluation.every_steps=null",
    "previews.prompts=[]",
    "checkpoints.every_minutes=null",
]
TITLES = {"one": "one process", "ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP2"}


@dataclass(frozen=True)
class Cell:
    quantization: str
    precision: str
    checkpointing: bool
    packing: bool
    dora: bool

    def case(self, prepared: Path) -> Case:
        """One run of it; `prepared` holds the rows `packed` and `unpacked`."""
        flags = f"checkpointing={self.checkpointing} packing={self.packing} dora={self.dora}"
        return Case(
            f"{self.quantization} {self.precision} {flags}",
            (
                f"model.quantization={self.quantization}",
                f"train.gradient_checkpointing={str(self.checkpointing).lower()}",
                f"data.packing={str(self.packing).lower()}",
                f"data.prepared={prepared / ('packed' if self.packing else 'unpacked')}",
                f"adapter.dora={str(self.dora).lower()}",
            ),
            self.precision,
        )


EVERY = [Cell(*values) for values in itertools.product(QUANTIZATIONS, PRECISIONS, *[(False, True)] * 3)]


def pairwise(cells: Iterable[Cell] = EVERY) -> list[Cell]:
    """A few of the cells, in which every two values of every two columns meet: the next is always the one with the most new pairs."""

    def pairs(cell: Cell) -> set[tuple]:
        return set(itertools.combinations(enumerate(vars(cell).values()), 2))

    left, chosen, met = list(cells), [], set()
    while left and (best := max(left, key=lambda cell: len(pairs(cell) - met))) and pairs(best) - met:
        chosen.append(best)
        met |= pairs(best)
        left.remove(best)
    return chosen


def prepare_both(recipe: Path, overrides: list[str], folder: Path) -> None:
    """The rows of a recipe, packed and not, as `Cell.case` looks for them."""
    for name, packing in (("packed", "true"), ("unpacked", "false")):
        values = load(recipe, [*overrides, f"data.packing={packing}", f"data.prepared={folder / name}"])
        with selected(values) as selection:
            prepare(values, selection)


def outcome_of(words: str, cell: Cell, run: Path, reference: Path) -> str:
    """`works`, `refused`, or what is wrong."""
    if words:
        began = (run / "metrics.jsonl").exists()  # a refusal comes before anything is loaded
        return f"{FAILED} {words.removeprefix(FAILED).strip()}" if words.startswith(FAILED) or began else "refused"
    found = difference(reference, run)
    applied = any(record.get("applied") for record in read_journal(run / "metrics.jsonl"))
    complete = found.adapter < math.inf and applied
    of_loss, of_norm = TOLERANCE[cell.precision]
    good = found.loss <= of_loss and found.grad_norm <= of_norm and complete
    return "works" if good else f"{FAILED} losses differ by {found.loss:.1e}, norms by {found.grad_norm:.1e}"


def table(outcomes: dict[str, dict[str, str]], cells: Iterable[Cell]) -> list[str]:
    """Quantisation and DoRA by engine: how many of the combinations with the other three work."""
    engines = list(outcomes)
    lines = [f"| quantisation, DoRA | {' | '.join(TITLES[e] for e in engines)} |", "|---|" + "---|" * len(engines)]
    for quantization, dora in itertools.product(QUANTIZATIONS, (False, True)):
        names = [cell.case(Path()).name for cell in cells if (cell.quantization, cell.dora) == (quantization, dora)]
        words = []
        for engine in engines:
            of_row = [outcomes[engine][name] for name in names]
            works, refused = of_row.count("works"), of_row.count("refused")
            words.append("refused" if refused == len(of_row) else "works" if works == len(of_row) else f"{works} of {len(of_row)}")
        lines.append(f"| `{quantization}`{', DoRA' if dora else ''} | {' | '.join(words)} |")
    return lines


def small_base(folder: Path) -> Path:
    """A random Phi of two small layers, with the tokenizer of assets/tiny_phi: what is combined does not depend on what it knows."""
    source = ROOT / "assets" / "tiny_phi"
    config = AutoConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads = 64, 128, 2, 2
    config.num_key_value_heads = 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def run(engines: list[str], folder: Path) -> None:
    """Walk every cell on CPU processes; the runs stay in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*OVERRIDES, f"model.base={small_base(folder / 'base')}"]
    prepare_both(RECIPE, overrides, folder)
    for engine in track(["one", *engines], description="combinations", console=console, disable=not console.is_terminal):
        say(f"{TITLES[engine]}: {len(EVERY)} combinations")
        launch(engine, [cell.case(folder) for cell in EVERY], folder / engine, str(RECIPE), overrides, processes=2, gpu=False)


def write_report(engines: list[str], folder: Path, report: Path) -> bool:
    """Judge the runs in `folder`. True if each works or is refused."""
    outcomes: dict[str, dict[str, str]] = {}
    for engine in ["one", *engines]:
        words = read_json(folder / engine / "outcomes.json")
        cases = {cell: cell.case(folder) for cell in EVERY}
        outcomes[engine] = {
            case.name: outcome_of(words[case.name], cell, *(case.path(folder / name) for name in (engine, "one")))
            for cell, case in cases.items()
        }
    faults = [f"{TITLES[e]}, {name}: {what}" for e, found in outcomes.items() for name, what in found.items() if what.startswith(FAILED)]
    versions = {**versions_imported(), "deepspeed": importlib.metadata.version("deepspeed")}
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = [
        "# What can be combined",
        "",
        f"`python scripts/compatibility.py`, {datetime.date.today().isoformat()}, 2 processes on a CPU; {made_by}.",
        "",
        "Each cell stands for 12 runs: fp32, bf16, fp16, with and without gradient checkpointing, with and without packing. `works`: the",
        "losses and gradient norms of one process (to 1e-5 in fp32, 2e-4 and 5e-2 in bf16; in fp16 the losses to 2e-4, for the search for",
        "the loss scale may skip another first step) and a whole adapter. `refused`: one sentence before anything is loaded.",
        "",
    ]
    write_text(
        report.with_suffix(".md"), "\n".join([*head, *table(outcomes, EVERY), "", *(f"- {fault}" for fault in faults)]).strip() + "\n"
    )
    write_json(report.with_suffix(".json"), {"date": datetime.date.today().isoformat(), "versions": versions, "outcomes": outcomes})
    for line in [*table(outcomes, EVERY), *faults]:
        say(line)
    say(f"compatibility: {len(faults)} faults in {len(EVERY) * len(outcomes)} combinations; wrote {report.with_suffix('.md')}")
    return not faults


def main(args: Namespace) -> None:
    folder = args.folder.resolve()
    if not args.judge_again:
        run(args.engines, folder)
    if not write_report(args.engines, folder, args.report):
        sys.exit(1)


if __name__ == "__main__":
    with_clear_errors(lambda: main(args), debug=args.debug)
