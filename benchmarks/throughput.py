#!/usr/bin/env python
"""How fast this training loop is beside its peers on the same work, and where each part of its speed comes from.

    python benchmarks/throughput.py                                 fp32 on this machine's CPU, some 20 minutes on two cores
    python benchmarks/throughput.py --precision nf4 --json benchmarks/throughput_nf4.json --plot benchmarks/throughput_nf4.svg
    python benchmarks/throughput.py --ladder                        ours, with each lever taken out in turn
    python benchmarks/throughput.py --arms ours trl-packed@1 --rounds 3 --steps 4

Arms: `ours`, scripts/train.py itself; TRL's SFTTrainer, padded or packed (`trl-padded@8`: eight conversations at a time; `trl-packed@1`:
one packed row at a time; `trl-default`: eight, padded, with the gradient checkpointing that it ships with); `loop@8`, the loop of
accelerate's examples. TRL is no requirement of the suite: pip install -r benchmarks/requirements.txt.

All arms train the same weights on the same conversations in the same steps, in the same precision, with the same optimiser and clipping:
the losses of every step stand side by side, and the ids and labels that went in are hashed. Each arm is a process of its own; in every
round all of them run, one after another, so that a machine that slows down slows all. What is the same at every run (FLOPs, waits for
the device, bytes kept for the backward pass) is counted in a process before, with no clock in it. Ctrl-C ends it and shows what was
measured.
"""

import datetime
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from throughput_meter import DTYPES, Job
from throughput_workload import PRECISIONS, SHAPES, compute_type, describe, make, overrides_of, steps_of, unpacked

from qlora_suite.command_line import parser_for, with_clear_errors
from qlora_suite.files import read_json, write_json
from qlora_suite.launched_runs import ROOT
from qlora_suite.recipe_file import load
from qlora_suite.run_facts import git_state, hardware
from qlora_suite.tracking import console, say

HERE = Path(__file__).resolve().parent
COUNTED_STEPS, COUNTED_WARMUP = 2, 1
LOSSES_AGREE = 1e-4
"""Largest difference of step losses in fp32 that is rounding."""


@dataclass(frozen=True)
class Arm:
    name: str
    kind: str
    """ours, trl or loop."""
    packed: bool = True
    micro_batch: int | None = None
    checkpointing: bool = False
    overrides: tuple[str, ...] = ()
    same_steps: bool = True
    """Does each of its steps hold the conversations that ours holds?"""
    draws_noise: bool = False


PLAIN = ("attention", "head", "lora", "gelu")
OURS = Arm("ours", "ours")


def ladder(folder: Path, conversations_per_step: int) -> list[Arm]:
    """Ours, and ours without each lever. The unpacked one holds the same conversations in other steps."""
    levers = [Arm(f"plain {key}", "ours", overrides=(f"speed.{key}=plain",)) for key in PLAIN]
    alone = tuple(unpacked(folder, conversations_per_step))
    return [
        OURS,
        *levers,
        Arm("dequantised in each pass", "ours", overrides=("speed.dequantize_once=false",)),
        Arm("gradient checkpointing", "ours", checkpointing=True, overrides=("train.gradient_checkpointing=true",)),
        Arm("unpacked rows", "ours", packed=False, overrides=alone, same_steps=False),
        Arm("LoRA dropout 0.05", "ours", overrides=("adapter.dropout=0.05",), draws_noise=True),
        Arm("one row at a time", "ours", micro_batch=1, overrides=("train.micro_batch=1",)),
        Arm("torch.compile", "ours", overrides=("speed.compile=true",)),
        Arm("all plain", "ours", overrides=(*(f"speed.{key}=plain" for key in PLAIN), "speed.dequantize_once=false")),
    ]


def arm_named(name: str) -> Arm:
    """`ours`, `trl-default`, `trl-padded@N`, `trl-packed@N` or `loop@N`. Raises ValueError for another."""
    kind, _, number = name.partition("@")
    known = {
        "ours": OURS,
        "trl-default": Arm(name, "trl", packed=False, micro_batch=8, checkpointing=True),
        "trl-padded": Arm(name, "trl", packed=False, micro_batch=8),
        "trl-packed": Arm(name, "trl", packed=True, micro_batch=8),
        "loop": Arm(name, "loop", packed=False, micro_batch=8),
    }
    if kind not in known or (number and (not number.isdecimal() or int(number) < 1 or kind in ("ours", "trl-default"))):
        raise ValueError(f"--arms: {name} is none; known: ours, trl-default, trl-padded@N, trl-packed@N, loop@N (N rows at a time)")
    return replace(known[kind], micro_batch=int(number)) if number else known[kind]


def default_arms(shape: str, device: str) -> list[str]:
    rows = SHAPES[shape].rows_per_step
    arms = ["ours", "trl-default", "trl-padded@8", "trl-padded@1", f"trl-packed@{rows}", "trl-packed@1", "loop@8"]
    return [arm for arm in arms if device == "cpu" or arm not in ("trl-padded@1",)]


# ---- one process after another ----------------------------------------------------------------------------------------------------


class Bench:
    """The work on disk, and what its processes have said so far."""

    def __init__(self, folder: Path, arms: Sequence[Arm], shape: str, precision: str, device: str, steps: int, warmup: int) -> None:
        self.folder, self.arms, self.device = folder, list(arms), device
        self.precision, self.dtype, self.warmup = precision, compute_type(precision, device), warmup
        self.recipe = folder / "recipe.yaml"
        made = list(steps_of(load(self.recipe)))
        self.steps, self.num_made = made[: steps + warmup], len(made)
        _check_divides(self.arms, self.steps)
        self.counted: dict[str, dict[str, Any]] = {}
        self.rounds: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in self.arms}
        self.errors: dict[str, str] = {}
        recipe = load(self.recipe)
        self.report: dict[str, Any] = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
            "command": " ".join(["python benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
            "hardware": {**hardware(torch.device(device)), "processor": processor(), "python": platform.python_version()},
            "suite": git_state(),
            "precision": {"name": precision, "computes_in": self.dtype},
            "shape_name": shape,
            "work": describe(SHAPES[shape], recipe.adapter.rank, self.steps),
            "warmup_steps": warmup,
        }

    def job(self, arm: Arm, out: Path, counted: bool, **more: Any) -> Job:
        steps = min(COUNTED_STEPS + COUNTED_WARMUP, self.num_made) if counted else len(self.steps)
        return Job(
            arm=arm.name,
            kind=arm.kind,
            overrides=[*overrides_of(self.precision), f"train.max_steps={steps}", *arm.overrides],
            packed=arm.packed,
            micro_batch=arm.micro_batch,
            checkpointing=arm.checkpointing,
            recipe=str(self.recipe),
            device=self.device,
            dtype=self.dtype,
            warmup=COUNTED_WARMUP if counted else self.warmup,
            counted=counted,
            out=str(out),
            **more,
        )

    def measure(self, arm: Arm, number: int | None, timeout: float | None = None, **more: Any) -> dict[str, Any]:
        """Run an arm in a process of its own: its steps are counted (None), or timed in a round. What it said, or its `error`."""
        where = "counted" if number is None else f"round{number}"
        out = self.folder / f"{arm.name.replace(' ', '-')}.{where}.json"
        done = in_a_process(self.job(arm, out, number is None, **more), timeout)
        if "error" in done:
            self.errors[arm.name] = done["error"]
        elif number is None:
            self.counted[arm.name] = done
        else:
            self.rounds[arm.name].append(done)
        return done

    def run(self, rounds: int, note: Any = lambda: None) -> None:
        """Count each arm, then time all of them in every round; one that fails is left out from there on. `note` is called after each."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("arms", total=len(self.arms) * (rounds + 1))
            for number in [None, *range(1, rounds + 1)]:
                # every second round goes the other way, so that none always runs behind the same neighbour
                for arm in self.arms if number is None or number % 2 else reversed(self.arms):
                    what = f"{arm.name}: {'counting' if number is None else f'round {number} of {rounds}'}"
                    bar.update(task, description=what)
                    if arm.name not in self.errors:
                        done = self.measure(arm, number)
                        if "error" in done:
                            say(f"{arm.name} failed: {done['error']}")
                        elif not console.is_terminal:
                            say(f"{what}  {self.rate(done):,.0f} tokens/s" if number else what)
                        note()
                    bar.advance(task)

    # -- what follows from it

    def tokens(self, done: dict[str, Any]) -> list[int]:
        return done.get("step_tokens") or self.report["work"]["tokens"]

    def rate(self, done: dict[str, Any]) -> float:
        """Real tokens a second over the measured steps of one round."""
        return sum(self.tokens(done)[self.warmup : len(done["seconds"])]) / sum(done["seconds"][self.warmup :])

    def summary(self, arm: Arm) -> dict[str, Any]:
        """Of one arm: medians over the rounds with the smallest and the largest, and its counts."""
        done, ours, work = self.rounds[arm.name], self.rounds[self.arms[0].name], self.report["work"]
        counted = self.counted.get(arm.name, {})
        found: dict[str, Any] = {"settings": {**asdict(arm), "overrides": list(arm.overrides)}, **counted.get("counts", {})}
        for key in ("threads", "versions", "trained_parameters", "trained_in", "adapter_sha256"):
            found[key] = (counted or (done or [{}])[0]).get(key)
        if arm.name in self.errors:
            found["error"] = self.errors[arm.name]
        first = next((run for run in (done or [counted]) if run.get("losses")), None)
        reference = next((run for run in (ours or [self.counted.get(self.arms[0].name, {})]) if run.get("losses")), None)
        if first:
            found["losses"] = first["losses"]
            if reference and arm.same_steps:
                found["largest_loss_difference"] = max(abs(a - b) for a, b in zip(first["losses"], reference["losses"], strict=False))
        if not done:
            return found
        rates = [self.rate(run) for run in done]
        share = sum(work["supervised_tokens"]) / sum(work["tokens"])
        seconds = [s for run in done for s in run["seconds"][self.warmup :]]
        memory = [run["memory"]["peak"] for run in done]
        found |= {
            "tokens_per_second": spread(rates),
            "supervised_tokens_per_second": spread([rate * share for rate in rates]),
            "step_seconds": {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))},
            "peak_bytes": spread(memory),
            "peak_bytes_above_imports": spread(
                [run["memory"]["peak"] - (run["rss_after_imports"] if self.device == "cpu" else 0) for run in done]
            ),
            "reserved_bytes": spread([run["memory"].get("reserved", 0) for run in done]),
            "matrix_rate": spread([run["matrix_rate"] for run in done]),
            "share_of_matrix_rate": spread([self.rate(run) * work["needed_flops_per_token"] / run["matrix_rate"] for run in done]),
            "seconds": [run["seconds"] for run in done],
            "matrix_rates": [run["matrix_rate"] for run in done],
        }
        pairs = list(zip(ours, done, strict=False))
        if arm.name != self.arms[0].name and pairs:
            found["ours_to_this"] = spread([self.rate(a) / self.rate(b) for a, b in pairs])
        return found

    def results(self) -> dict[str, Any]:
        arms = {arm.name: self.summary(arm) for arm in self.arms}
        hashes = {name: found["labels_sha256"] for name, found in arms.items() if "labels_sha256" in found}
        return {**self.report, "arms": arms, "same_work": self._same_work(hashes)}

    def _same_work(self, hashes: dict[str, str]) -> dict[str, Any]:
        same = {arm.name: hashes[arm.name] for arm in self.arms if arm.same_steps and arm.name in hashes}
        adapters = {name: found.get("adapter_sha256") for name, found in self.counted.items()}
        return {
            "labels_sha256": next(iter(same.values()), None),
            "labels_are_the_same": len(set(same.values())) <= 1,
            "first_adapters_are_the_same": len(set(adapters.values())) <= 1,
        }


def in_a_process(job: Job, timeout: float | None = None) -> dict[str, Any]:
    """Run the job and read what it wrote; a process that dies or takes longer than `timeout` seconds gives its `error`."""
    out = Path(job.out)
    out.unlink(missing_ok=True)
    description = out.with_suffix(".job.json")
    write_json(description, asdict(job))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), str(HERE), os.environ.get("PYTHONPATH")]))
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, HF's Trainer would use all at once
    with out.with_suffix(".output").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, str(HERE / "throughput_arm.py"), str(description)], env=environment, stdout=log, stderr=log, cwd=ROOT
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"arm": job.arm, "error": f"it took longer than {timeout:.0f} s"}
        finally:  # Ctrl-C, too
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
            shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    said = read_json(out) if out.exists() else {}
    if not said.get("finished") and "error" not in said:
        said["error"] = f"the process ended with {process.returncode}: {last_line(out.with_suffix('.output'))}"
    return said


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}


def processor() -> str:
    """The CPU's name, which platform does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _check_divides(arms: Sequence[Arm], steps: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Raises ValueError if a peer's micro-batch does not divide a step, which its accumulation cannot do."""
    for arm in arms:
        rows = len(steps[0]) if arm.packed else sum(len(row["lengths"]) for row in steps[0])
        if arm.kind != "ours" and rows % arm.micro_batch:
            raise ValueError(
                f"--arms: {arm.name}: a step has {rows} {'packed rows' if arm.packed else 'conversations'}; N must divide them"
            )


# ---- what is shown ----------------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    """Two tables: what was timed, and what is the same at every run; then the losses."""
    work, machine = results["work"], results["hardware"]
    tokens, supervised = np.mean(work["tokens"]), sum(work["supervised_tokens"]) / sum(work["tokens"])
    say(
        f"{results['precision']['name']}, computed in {results['precision']['computes_in']}, on {machine['device']}, "
        f"{machine['processor']}\n"
        f"a step: {work['conversations_per_step']} conversations in {work['rows_per_step']} packed rows, {tokens:,.0f} tokens, "
        f"{supervised:.0%} supervised; needed {work['needed_flops_per_token'] / 1e6:,.1f} MFLOP a token "
        f"(attention {work['share_of_attention']:.0%}, head {work['share_of_head']:.0%})"
    )
    cuda = "count" in machine
    timed = {name: arm for name, arm in results["arms"].items() if "tokens_per_second" in arm}
    if timed:
        peak = "peak_bytes" if cuda else "peak_bytes_above_imports"
        table = _table("timed", "arm", "tokens/s", "ours to it", "step p50", "p95", "peak", "of rate")
        for name, arm in timed.items():
            rate, ratio = arm["tokens_per_second"], arm.get("ours_to_this")
            table.add_row(
                name,
                f"{rate['median']:,.0f} ({rate['smallest']:,.0f}-{rate['largest']:,.0f})",
                f"{ratio['median']:.2f} ({ratio['smallest']:.2f}-{ratio['largest']:.2f})" if ratio else "",
                *(f"{arm['step_seconds'][key]:.2f} s" for key in ("p50", "p95")),
                f"{arm[peak]['median'] / 2**20:,.0f} MiB",
                f"{arm['share_of_matrix_rate']['median']:.1%}",
            )
        console.print(table)
        say(
            "tokens/s: real tokens, median of the rounds (smallest-largest); ours to it: of the same round; peak: "
            + ("the allocator's" if cuda else "resident while stepping, above what the imports take")
            + "; of rate: needed FLOPs, of a large product's in the same process"
        )
    table = _table("counted", "arm", "padding", "FLOP/token", "kept/token", "live peak", "waits", "loss diff")
    for name, arm in results["arms"].items():
        if "flops_per_token" in arm:
            difference = arm.get("largest_loss_difference")
            table.add_row(
                name,
                f"{arm['padding_share']:.1%}",
                f"{arm['flops_per_token'] / 1e6:,.2f} M",
                f"{arm['saved_bytes_per_token'] / 1024:,.1f} KiB",
                f"{arm['live_peak_bytes'] / 2**20:,.0f} MiB",
                f"{arm['syncs_per_step']:,.0f}",
                "other steps" if difference is None else f"{difference:.1e}",
            )
    console.print(table)
    say(
        "FLOP/token: executed for a real token; kept: for the backward pass; live peak: of all that a step makes; waits: of the host for "
        "the device, a step; loss diff: largest of a step to ours"
    )
    for name, arm in results["arms"].items():
        if "error" in arm:
            say(f"{name} failed: {arm['error']}")
    same = results["same_work"]
    agree, adapters = ("the same" if same[key] else "NOT THE SAME" for key in ("labels_are_the_same", "first_adapters_are_the_same"))
    say(f"ids and labels that went in (sha256 {(same['labels_sha256'] or '-')[:16]}): {agree} in all arms; first adapters: {adapters}")
    show_losses(results)


def _table(title: str, first: str, *names: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show_losses(results: dict[str, Any]) -> None:
    """The losses of the steps, side by side: ours, and by how much the others differ."""
    arms = {name: arm for name, arm in results["arms"].items() if arm.get("losses")}
    if not arms:
        return
    first, *others = arms
    ours = arms[first]["losses"]
    table = _table("loss of each step, and by how much the others differ", "arm", *(str(step + 1) for step in range(len(ours))))
    table.add_row(first, *(f"{loss:.4f}" for loss in ours))
    for name in others:
        table.add_row(name, *(f"{theirs - loss:+.0e}" for theirs, loss in zip(arms[name]["losses"], ours, strict=False)))
    console.print(table)
    if results["precision"]["computes_in"] == "fp32":
        for name, arm in arms.items():
            if arm.get("largest_loss_difference", 0.0) > LOSSES_AGREE and not arm["settings"]["draws_noise"]:
                say(f"{name}: its losses differ by more than rounding ({LOSSES_AGREE:g}): it is not the same work")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="which (default: ours, TRL in five ways, the plain loop)")
    parser.add_argument("--ladder", action="store_true", help="ours, and ours with each lever taken out")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all arms in turn (5); 0 counts only")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="measured in each round (6)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them (2)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="nf4 computes in fp32 on a CPU, in bf16 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="small on a CPU, phi2 on a GPU")
    parser.add_argument("--rows", type=int, metavar="N", help="packed rows in a step (8; phi2: 4)")
    parser.add_argument("--hidden", type=int, metavar="N", help="another width; the FFN is four times as wide")
    parser.add_argument("--layers", type=int, metavar="N", help="another number of layers")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="another vocabulary, below 4,096 the tokenizer's, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, after each arm")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.svg or .png)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "throughput", help="where the work is made anew (build/throughput)")
    args = parser.parse_args()
    with_clear_errors(lambda: bench(args), debug=args.debug, interrupted="what was measured is shown above")


def bench(args: Any) -> None:
    for key, least in (("rounds", 0), ("steps", 1), ("warmup", 1)):
        if getattr(args, key) < least:
            raise ValueError(f"--{key} is {getattr(args, key)}; give {least} or more")
    if args.ladder and args.arms:
        raise ValueError("--arms has no effect beside --ladder, whose arms are ours; remove one of them")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot {args.plot}: give a file that ends in .svg or .png")
    if args.plot and not args.rounds:
        raise ValueError("--plot draws times, and --rounds 0 measures none; remove one of them")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    name = args.shape or ("phi2" if args.device == "cuda" else "small")
    asked = {"rows_per_step": args.rows, "hidden": args.hidden, "layers": args.layers, "vocabulary": args.vocabulary}
    SHAPES[name] = shape = replace(SHAPES[name], **{key: value for key, value in asked.items() if value is not None})
    if args.hidden:
        SHAPES[name] = shape = replace(shape, intermediate=4 * args.hidden)
    if shape.hidden % shape.heads:
        raise ValueError(f"--hidden {shape.hidden} does not divide into {shape.heads} heads")
    chosen = [arm_named(arm) for arm in args.arms or default_arms(name, args.device)]
    folder, total = args.folder.absolute(), max(args.steps + args.warmup, COUNTED_STEPS + COUNTED_WARMUP)
    say(f"making the work in {folder}")
    stored = torch.float32 if args.device == "cpu" else DTYPES[compute_type(args.precision, args.device)]
    recipe = make(folder, shape, total, args.device, stored=stored)
    if args.ladder:
        chosen = ladder(folder, sum(len(row["lengths"]) for row in next(steps_of(load(recipe)))))
        if args.precision != "nf4":
            chosen = [arm for arm in chosen if arm.overrides != ("speed.dequantize_once=false",)]
    measured = Bench(folder, chosen, name, args.precision, args.device, args.steps, args.warmup)

    def note() -> None:
        if args.json:
            args.json.write_text(json.dumps(measured.results(), indent=1) + "\n", encoding="utf-8")

    try:
        measured.run(args.rounds, note)
    finally:  # Ctrl-C, too
        results = measured.results()
        show(results)
        if args.plot and any("tokens_per_second" in arm for arm in results["arms"].values()):
            from throughput_chart import draw

            draw(results, args.plot)
    if measured.errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
