#!/usr/bin/env python
"""The parts of benchmarks/gpu.sh: what one GPU does with this suite at Phi-2's sizes, in ten minutes and without a network.

    bash benchmarks/gpu.sh

    ceilings    rate of a large matrix product, rate of a copy within the card
    peers       20 steps each of ours and of TRL, packed, QLoRA, 8,192 tokens at a time
    fits        recipes/phi2_oasst1.yaml's sizes: rows of 2,048 tokens, rank 32, fp16, no gradient checkpointing, in 14.7 GiB
    storage     the base as NF4, as NF4 dequantised once, as bf16
    trace       a profiler's trace of one step (gpu_trace.json.gz beside the report) and its largest operations
    ladder      ours without each lever, as far as the time goes

What each part finds is written to --json at once, and joins what other parts have left there; predictions stand in benchmarks/gpu.md.
"""

import datetime
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from throughput import OURS, Arm, Bench, arm_named, in_a_process, ladder, processor
from throughput_counts import matrix_rate, wait_for
from throughput_meter import DTYPES
from throughput_workload import SHAPES, compute_type, describe, make, overrides_of, steps_of

from qlora_suite.command_line import parser_for, with_clear_errors
from qlora_suite.files import read_json, write_json
from qlora_suite.launched_runs import ROOT
from qlora_suite.model import versions
from qlora_suite.recipe_file import load
from qlora_suite.run_facts import git_state, hardware
from qlora_suite.tracking import console, say

PARTS = ("ceilings", "peers", "fits", "storage", "trace", "ladder")
"""In the order of what a person wants to know first: a rung of the ladder that finds no time is written down as not run."""
T4_GIB = 14.7
"""That a T4 leaves for tensors."""
ONE_ARM = 120.0
"""Seconds for one process at most."""
STEPS = {"peers": 20, "ladder": 8, "storage": 8, "trace": 3, "fits": 3}
WARMUP = 2


@dataclass
class Card:
    """The device, the work on disk, the time that is left, and the report so far."""

    device: str
    shape: str
    folder: Path
    json: Path
    deadline: float
    report: dict[str, Any]

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, part: str, **values: Any) -> None:
        self.report["parts"].setdefault(part, {}).update(values)
        write_json(self.json, self.report)

    def arms(self, part: str, precision: str, arms: list[Arm], counted: int = 0, **more: Any) -> None:
        """Run each once, as long as there is time, and note what it did after each; count the first `counted` before."""
        bench = Bench(self.folder, arms, self.shape, precision, self.device, self.steps(part), WARMUP)
        for arm in arms:
            if self.left() < 20:
                bench.errors[arm.name] = "not run: the time was up"
            else:
                limit = min(ONE_ARM, self.left() - 5)
                if arms.index(arm) < counted and self.left() > 120:  # another process, and Python at every operation
                    bench.measure(arm, None, limit)
                bench.measure(arm, 1, min(limit, self.left() - 5), **more)
            found = {name: done for name, done in bench.results()["arms"].items() if name == arm.name}
            self.note(part, **{f"{arm.name}, {precision}": found[arm.name]})
            say(f"{part}: {arm.name}, {precision}: {in_words(found[arm.name])}")

    def steps(self, part: str) -> int:
        return STEPS[part] if self.device == "cuda" else 2


def in_words(found: dict[str, Any]) -> str:
    if "tokens_per_second" not in found:
        return found.get("error", "nothing was measured")
    words = f"{found['tokens_per_second']['median']:,.0f} tokens/s, {found['share_of_matrix_rate']['median']:.0%} of the matrix rate"
    return f"{words}, peak {found['peak_bytes']['median'] / 2**30:.1f} GiB"


# ---- the parts --------------------------------------------------------------------------------------------------------------------


def ceilings(card: Card) -> None:
    device, cuda = torch.device(card.device), card.device == "cuda"
    rates = {name: matrix_rate(device, dtype) for name, dtype in DTYPES.items() if cuda or name != "fp16"}
    source = torch.empty((2**30 if cuda else 2**26), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    wait_for(device)
    began, times = time.perf_counter(), 20
    for _ in range(times):
        target.copy_(source)
    wait_for(device)
    copied = 2 * source.numel() * times / (time.perf_counter() - began)  # it is read, and it is written
    card.note("ceilings", matrix_rate=rates, copy_bytes_per_second=copied)
    say(f"ceilings: {', '.join(f'{name} {rate / 1e12:,.2f} TFLOP/s' for name, rate in rates.items())}; copy {copied / 1e12:.2f} TB/s")


def peers(card: Card) -> None:
    rows = SHAPES[card.shape].rows_per_step
    ours = replace(OURS, overrides=(f"train.micro_batch={rows}",))
    card.arms("peers", "nf4", [ours, arm_named(f"trl-packed@{rows}"), arm_named("trl-packed@1"), arm_named("trl-default")], counted=2)


def levers(card: Card) -> None:
    recipe = load(card.folder / "recipe.yaml")
    rungs = ladder(card.folder, sum(len(row["lengths"]) for row in next(steps_of(recipe))))
    whole = (f"train.micro_batch={SHAPES[card.shape].rows_per_step}",)
    keeps_its_own = ("one row at a time", "unpacked rows")  # how much goes through at once is what they are about
    card.arms(
        "ladder",
        "nf4",
        [
            arm if arm.name in keeps_its_own else replace(arm, overrides=(*whole, *arm.overrides))
            for arm in rungs
            if arm.overrides != ("speed.dequantize_once=false",)  # which is a row of `storage`
        ],
    )


def storage(card: Card) -> None:
    whole = f"train.micro_batch={SHAPES[card.shape].rows_per_step}"
    for name, precision, more in (
        ("NF4", "nf4", ("speed.dequantize_once=false",)),
        ("NF4, dequantised once", "nf4", ("speed.dequantize_once=true",)),
        ("16 bit", "bf16", ()),
    ):
        card.arms("storage", precision, [Arm(name, "ours", overrides=(whole, *more))])


def trace(card: Card) -> None:
    arm = replace(OURS, name="traced", overrides=(f"train.micro_batch={SHAPES[card.shape].rows_per_step}",))
    bench = Bench(card.folder, [arm], card.shape, "nf4", card.device, card.steps("trace"), WARMUP)
    path = card.json.with_name(card.json.stem + "_trace.json.gz")
    done = bench.measure(arm, 1, min(ONE_ARM, card.left() - 5), trace=str(path))
    lines = done.get("top_operations", [])
    card.note("trace", file=path.name, top_operations=lines, **({"error": done["error"]} if "error" in done else {}))
    say("\n".join(line[:160] for line in lines[:14]) or f"trace: {done.get('error')}")


def fits(card: Card) -> None:
    """recipes/phi2_oasst1.yaml's adapter and rows, one row at a time, on a card that has no more than a T4."""
    reference = load(ROOT / "recipes" / "phi2_oasst1.yaml")
    adapter, targets = reference.adapter, list(reference.adapter.targets)
    overrides = (
        f"adapter.rank={adapter.rank}",
        f"adapter.alpha={adapter.alpha}",
        f"adapter.targets=[{','.join(targets)}]",
        "train.micro_batch=1",
        "train.gradient_checkpointing=false",
        "speed.dequantize_once=false",
    )
    arm = replace(OURS, name="as on a T4", overrides=overrides)
    bench = Bench(card.folder, [arm], card.shape, "nf4", card.device, card.steps("fits"), WARMUP)
    job = bench.job(arm, card.folder / "fits.json", counted=False, cap_gib=T4_GIB)
    done = in_a_process(replace(job, dtype="fp16" if card.device == "cuda" else "fp32"), min(ONE_ARM, card.left() - 5))
    memory = done.get("memory", {})
    found = {"fits": "error" not in done, "cap_gib": T4_GIB, "row": SHAPES[card.shape].row, "losses": done.get("losses")}
    found |= {f"{key}_gib": value / 2**30 for key, value in memory.items()}
    card.note("fits", **found, **({"error": done["error"]} if "error" in done else {}))
    peak = f", peak {memory['peak'] / 2**30:.2f} GiB" if memory else ""
    say(f"fits: {'yes' if found['fits'] else 'NO: ' + done['error']}{peak}, of {T4_GIB} GiB")


DO = {"ceilings": ceilings, "peers": peers, "ladder": levers, "storage": storage, "trace": trace, "fits": fits}


# ---- all of them ------------------------------------------------------------------------------------------------------------------


def measure(device: str, shape: str, parts: list[str], folder: Path, json: Path, seconds: float) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; --device cpu --shape tiny runs the same code without one")
    began = time.monotonic()
    report: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "hardware": {**hardware(torch.device(device)), "processor": processor(), "python": platform.python_version()},
        "versions": versions(),
        "suite": git_state(),
        "shape": shape,
        "parts": parts_before(json, shape),
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        report["hardware"] |= {"driver_cuda": torch.version.cuda, "free_gib": free / 2**30, "total_gib": total / 2**30}
    card = Card(device, shape, folder, json, began + seconds, report)
    card.json.parent.mkdir(parents=True, exist_ok=True)
    if parts != ["ceilings"]:
        say(f"making the work in {folder}")
        stored = DTYPES[compute_type("nf4", device)]
        make(folder, SHAPES[shape], max(STEPS.values()) + WARMUP if device == "cuda" else 4, device, stored=stored)
        steps = list(steps_of(load(folder / "recipe.yaml", overrides_of("nf4"))))
        report["work"] = describe(SHAPES[shape], 16, steps)
    for part in parts:
        if card.left() < 25:
            report["parts"].pop(part, None)
            card.note(part, error="not run: the time was up")
            continue
        part_began = time.monotonic()
        report["parts"].pop(part, None)
        try:
            DO[part](card)
        except Exception as error:  # the other parts still have something to say
            card.note(part, error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            say(f"{part} failed: {error}")
        if device == "cuda":
            torch.cuda.empty_cache()
        card.note(part, took_seconds=round(time.monotonic() - part_began, 1))
    show(report)
    say(f"wrote {json} after {time.monotonic() - began:.0f} s")


def parts_before(json: Path, shape: str) -> dict[str, Any]:
    """What an earlier call with other parts has left in the report."""
    before = read_json(json) if json.exists() else {}
    return before.get("parts", {}) if before.get("shape") == shape else {}


def show(report: dict[str, Any]) -> None:
    """Rows for benchmarks/gpu.md."""
    table = Table("part", "arm", "tokens/s", "of rate", "peak GiB", "loss diff", box=None, pad_edge=False)
    for part, values in report["parts"].items():
        for name, found in values.items():
            if not isinstance(found, dict) or "settings" not in found:
                continue
            if "tokens_per_second" not in found:
                table.add_row(part, name, f"failed: {found.get('error', '')[:60]}")
                continue
            difference = found.get("largest_loss_difference")
            table.add_row(
                part,
                name,
                f"{found['tokens_per_second']['median']:,.0f}",
                f"{found['share_of_matrix_rate']['median']:.1%}",
                f"{found['peak_bytes']['median'] / 2**30:.2f}",
                "-" if difference is None else f"{difference:.1e}",
            )
    console.print(table)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="phi2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="where the work is made anew (build/gpu)")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts (570)")
    args = parser.parse_args()
    with_clear_errors(
        lambda: measure(args.device, args.shape, args.parts, args.folder.absolute(), args.json, args.seconds),
        debug=args.debug,
        interrupted=f"what was measured is in {args.json}",
    )


if __name__ == "__main__":
    main()
