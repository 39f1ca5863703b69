#!/usr/bin/env python
"""How long scripts/prepare_data.py takes, and how much memory and disk, for any number of messages.

    python benchmarks/preparation.py                            88,838 real messages: the trees of the assets, copied under new ids
    python benchmarks/preparation.py --messages 10000000        short synthetic messages, as OASST trees and as plain chats
    python benchmarks/preparation.py --messages 1000000 --form chats --json FILE

The synthetic trees stand in the worst order there is: all first messages, then all their answers, and so on, so that the messages of a
tree are a whole file apart. Memory is RssAnon of /proc/PID/status, looked at twenty times a second: what a process holds that no file
backs, and so cannot be given back while it runs. CPU seconds are those of all processes. Results go to benchmarks/preparation.json, each
in the place of an earlier one of the same name.
"""

import copy
import datetime
import gzip
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import tokenizers
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qlora_suite.command_line import parser_for, with_clear_errors
from qlora_suite.dataset import MANIFEST, data_hash
from qlora_suite.files import read_json, write_json
from qlora_suite.launched_runs import ROOT
from qlora_suite.tracking import console, say

REPORT = ROOT / "benchmarks" / "preparation.json"
OASST1 = ROOT / "assets" / "oasst1_en_validation.jsonl.gz"
REAL = 88_838
"""Messages of OASST1, of all languages."""
OF_TREE = (("prompter", None), ("assistant", 0), ("assistant", 0), ("prompter", 2), ("assistant", 3))
"""A synthetic tree: the role of each message, and which one it answers."""


def real(count: int) -> Iterator[dict[str, Any]]:
    """The assets' trees again and again. A copy's ids are new, and so is its first text: held-out trees must not be trained on."""
    with gzip.open(OASST1, "rt", encoding="utf-8") as lines:
        messages = [json.loads(line) for line in lines]
    messages.sort(key=lambda message: message["message_tree_id"])  # stable: whole trees, as they are in the file
    for number in range(count):
        times, message = number // len(messages), dict(messages[number % len(messages)])
        for key in ("message_id", "parent_id", "message_tree_id"):
            message[key] = message[key] and f"{message[key]}-{times}"
        if times and not message["parent_id"]:
            message["text"] += f" ({times})"
        yield message


def trees(count: int) -> Iterator[dict[str, Any]]:
    num_trees = -(-count // len(OF_TREE))
    everything = ((place, tree) for place in range(len(OF_TREE)) for tree in range(num_trees))
    for place, tree in itertools.islice(everything, count):
        role, parent = OF_TREE[place]
        yield {
            "message_id": f"{tree:08x}-0000-4000-8000-{place:012x}",
            "parent_id": None if parent is None else f"{tree:08x}-0000-4000-8000-{parent:012x}",
            "message_tree_id": f"{tree:08x}-0000-4000-8000-{0:012x}",
            "text": f"What is {tree} and {place}?" if role == "prompter" else f"It is {tree + place}, as you know.",
            **{"role": role, "lang": "en", "rank": 0 if role == "assistant" else None, "deleted": False, "synthetic": False},
            **{"review_result": True, "created_date": "2023-02-07T17:29:24.727400+00:00"},
        }


def chats(count: int) -> Iterator[dict[str, Any]]:
    """Two messages each."""
    for number in range(count // 2):
        question, answer = f"What is {number} and 1?", f"It is {number + 1}, as you know."
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FORMS: dict[str, tuple[Callable[[int], Iterator[dict[str, Any]]], int]] = {"real": (real, 1), "trees": (trees, 1), "chats": (chats, 2)}
"""Rows of a source, and the messages in each."""


def measured(form: str, count: int, folder: Path, num_workers: int) -> dict[str, Any]:
    """Make the source and prepare it. What was written is gone afterwards, but for the preparation's words when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    source, prepared, log = folder / "source.jsonl", folder / "prepared", folder / "log"
    rows, of_row = FORMS[form]
    try:
        with source.open("w", encoding="utf-8") as file:
            for row in watched(rows(count), f"writing {count:,} messages ({form})", count // of_row):
                file.write(json.dumps(row) + "\n")
        overrides = [f"data.source={source}", f"data.prepared={prepared}", "data.dev_share=0.01"]
        overrides += ["data.policy=null"] if form == "chats" else []
        script = [str(ROOT / "scripts" / "prepare_data.py"), str(ROOT / "recipes" / "quickstart.yaml"), *overrides]
        began = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, *script, "--num-workers", str(num_workers)],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                usage = Usage(process.pid, folder)
                while process.poll() is None:
                    usage.look()
                    time.sleep(0.05)
            finally:  # Ctrl-C, too
                process.terminate()
                process.wait()
        seconds = time.monotonic() - began
        if process.returncode != 0:
            raise ValueError(f"the preparation ended with {process.returncode}: see {log}")
        manifest = read_json(prepared / MANIFEST)
        train, size = manifest["counts"]["train"], sum(file["bytes"] for file in manifest["files"].values())
        result = {
            **{"messages": count, "num_workers": num_workers, "seconds": round(seconds, 1), "cpu_seconds": round(usage.cpu_seconds, 1)},
            **{"messages_per_second": round(count / seconds), "rows": train["rows"], "tokens": train["tokens"]},
            "peak_rss_anon_mb": {"parent": usage.parent // 10**6, "worker": usage.worker // 10**6, "together": usage.together // 10**6},
            "disk_mb": {
                **{"source": source.stat().st_size // 10**6, "prepared": size // 10**6, "most_beside": usage.disk // 10**6},
            },
            "data_hash": data_hash(manifest),
        }
    except BaseException:
        for path in (source, prepared):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    shutil.rmtree(folder)
    return result


class Usage:
    """The most that a process and its children have used. Bytes."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder
        self.parent = self.worker = self.together = self.disk = 0
        self.looked_at_disk = 0.0
        self.ticks: dict[int, int] = {}

    def look(self) -> None:
        found = {pid: size for pid in (self.pid, *descendants(self.pid)) if (size := rss_anon(pid)) is not None}
        for pid in found:
            self.ticks[pid] = max(self.ticks.get(pid, 0), ticks(pid))
        own = found.get(self.pid, 0)
        self.parent, self.together = max(self.parent, own), max(self.together, sum(found.values()))
        self.worker = max([self.worker, *(size for pid, size in found.items() if pid != self.pid)])
        if time.monotonic() - self.looked_at_disk > 1:
            self.looked_at_disk = time.monotonic()
            paths = (path for path in self.folder.glob(".*/**/*") if path.is_file())
            self.disk = max(self.disk, sum(size_of(path) for path in paths))

    @property
    def cpu_seconds(self) -> float:
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def rss_anon(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


def ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it has just been cleared away
        return 0


def watched(items: Iterator[Any], description: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=description)


def show(results: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("", "seconds", "CPU seconds", "messages/s", "parent", "a worker", "together", "disk beside", "prepared"):
        table.add_column(name, justify="right" if name else "left")
    for name, one in results.items():
        memory, disk = one["peak_rss_anon_mb"], one["disk_mb"]
        sizes = (memory["parent"], memory["worker"], memory["together"], disk["most_beside"], disk["prepared"])
        numbers = (f"{one['seconds']:,.0f}", f"{one['cpu_seconds']:,.0f}", f"{one['messages_per_second']:,}")
        table.add_row(name, *numbers, *(f"{size:,} MB" for size in sizes))
    console.print(table)


def run(forms: list[str], count: int, folder: Path, num_workers: int, report: Path) -> None:
    if count < 1000:
        raise ValueError(f"--messages is {count}; give 1000 or more, for a part of them is held out")
    about = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
    results = {}
    for form in forms:
        name = f"{count:,} messages, {form}"
        results[name] = {**measured(form, count, folder / form, num_workers), **copy.deepcopy(about)}
        write_json(report, {**(read_json(report) if report.is_file() else {}), name: results[name]})
    show(results)
    say(f"wrote {report}")


def machine() -> str:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"{model or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    modules = (numpy, pyarrow, tokenizers, transformers)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


if __name__ == "__main__":
    parser = parser_for(__doc__)
    parser.add_argument("--messages", type=int, metavar="N", help="so many synthetic ones, instead of real ones")
    parser.add_argument("--form", choices=["trees", "chats"], help="of synthetic messages (both, one after the other)")
    parser.add_argument("--num-workers", type=int, metavar="N", default=len(os.sched_getaffinity(0)), help="processes that tokenise")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "preparation", help="where it is done (build/preparation)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=REPORT, help="where results go (benchmarks/preparation.json)")
    args = parser.parse_args()
    wanted = ["real"] if args.messages is None else [args.form] if args.form else ["trees", "chats"]
    if args.messages is None and args.form:
        parser.error("--form has no effect on real messages; give --messages too")
    with_clear_errors(
        lambda: run(wanted, args.messages or REAL, args.folder.absolute(), args.num_workers, args.json.absolute()),
        debug=args.debug,
        interrupted="what was made is cleared away, and results of before are kept",
    )
