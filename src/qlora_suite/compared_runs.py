"""Finished, evaluated runs side by side: what differs in their settings, and what came of it.

    sets = comparison_of([Path("runs/a"), Path("runs/b"), Path("runs/a-seed-1")], samples=2000)
    write_text(path, markdown(sets))

Runs are comparable if they were scored on the same answers behind the same words; those that were not stand in a set of their own.
Runs that differ in their seed alone are one entry, with mean and standard deviation.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora_suite.comparison import REPORT_VERSION
from qlora_suite.evaluation import bootstrapped
from qlora_suite.files import check_version, hash_of, read_json
from qlora_suite.recipe import Recipe, curve_keys, flatten
from qlora_suite.recipe_file import load
from qlora_suite.report import base_had_a_choice
from qlora_suite.run_facts import DATA
from qlora_suite.sample_answers import CONCISE_WORDS
from qlora_suite.tracking import read_journal

LN2 = math.log(2)
PLACES = ("data.prepared", "output.dir", "output.mirror", "tracking.trackers", "tracking.project")
"""Keys that say where things stand: they always differ, and nothing follows from it."""
REWARD_FILES = "rewards' own files (hash)"


@dataclass(frozen=True)
class EvaluatedRun:
    folder: Path
    settings: dict[str, str]
    """The flattened recipe without PLACES, and beyond it what run.json knows of machine and data."""
    seed: str
    curve: frozenset[str]
    """Those settings that change what is learnt."""
    report: dict[str, Any]
    run: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def bits(self) -> float:
        return self.report["adapter"]["bits_per_byte"]


@dataclass(frozen=True)
class Entry:
    """A run, or several that differ only in their seed."""

    runs: tuple[EvaluatedRun, ...]

    @property
    def name(self) -> str:
        first = self.runs[0].name
        return first if len(self.runs) == 1 else f"{first} ({self.seeds})"

    @property
    def mean(self) -> float:
        return statistics.fmean(run.bits for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        return statistics.stdev(run.bits for run in self.runs) if len(self.runs) > 1 else None

    @property
    def seeds(self) -> str:
        return "one seed" if len(self.runs) == 1 else f"{len(self.runs)} seeds"


@dataclass(frozen=True)
class ComparedSet:
    """Runs that were scored on the same answers."""

    data: str
    """What they were scored on, in words."""
    entries: tuple[Entry, ...]
    differing: tuple[tuple[str, tuple[str, ...], bool], ...]
    """(setting, its value in each entry, does it change what is learnt)"""
    against_first: tuple[dict[str, Any] | None, ...]
    """Of each entry: bits per byte minus the first entry's, with a paired interval; None for the first."""


def read_run(folder: Path) -> EvaluatedRun:
    """Raises ValueError if this is no evaluated run, with the command that is missing."""
    for name, what in (("recipe.yaml", "is not a run's folder"), ("run.json", "is not a run that has started")):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} {what}: it has no {name}")
    if not (folder / "report.json").is_file():
        raise ValueError(f"{folder} has no report.json; make it first: python scripts/evaluate.py {folder}")
    report = read_json(folder / "report.json")
    check_version(folder / "report.json", report, REPORT_VERSION)
    if not report.get("adapter") and report.get("tuning"):
        raise ValueError(f"{folder} was scored on prompts alone: none of its held-out conversations has an answer, so there is no score")
    if not report.get("adapter"):
        raise ValueError(f"{folder}/report.json has no score of the run's own result; make it again: python scripts/evaluate.py {folder}")
    recipe, run = load(folder / "recipe.yaml"), read_json(folder / "run.json")
    settings = {**{key: _word(value) for key, value in flatten(recipe).items() if key not in PLACES}, **_beyond(run)}
    identity = read_json(folder / "status.json").get("identity") or {}
    settings["data (hash)"] = str(identity.get(DATA))[:12]  # the recipe may be the same, and what stood in its files not
    if own := {key: value for key, value in identity.items() if key.startswith("grpo.rewards.") and ".path (" in key}:
        settings[REWARD_FILES] = hash_of(own)[:12]  # as well: a file of one name may say something else
    seed = settings.pop("seed")
    metrics = read_journal(folder / "metrics.jsonl")
    return EvaluatedRun(folder, settings, seed, _curve(recipe), report, run, metrics)


def _curve(recipe: Recipe) -> frozenset[str]:
    return frozenset(curve_keys(recipe)) | {"base (hash)", "data (hash)", "precision", REWARD_FILES}


def _beyond(run: Mapping[str, Any]) -> dict[str, str]:
    """What differs although the recipes are the same."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    git = run.get("git") or {}
    return {
        "base (hash)": str(run.get("base"))[:12],
        "precision": run["precision"],
        "engine": f"{run['engine']}, {run['processes']} processes" if run["processes"] > 1 else run["engine"],
        "hardware": str(run["hardware"].get("device")),
        "versions": versions,
        "git": f"{str(git.get('commit'))[:10]}{' and changed files' if git.get('changed_files') else ''}" if git else "none",
    }


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_word, value)) or "none"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, int | float) or isinstance(value, bool)
        else f"{value:g}"
    )


def scored_on(run: EvaluatedRun) -> tuple[str, int, str]:
    """What must be equal: the validation file, the window, and which answers were scored (formats differ in what fits)."""
    report = run.report
    answers = [[row["key"], row["tree"], row["answers"], row["bytes"]] for row in report["conversations"]]
    return report["data"]["validation_sha256"], report["window"], hash_of(answers)


def comparison_of(folders: Sequence[Path], samples: int = 2000) -> list[ComparedSet]:
    """The sets, in the order in which their runs were named.

    Raises ValueError if a folder is named twice or is no evaluated run, or if no two runs can be compared.
    """
    if len(folders) < 2:
        raise ValueError(f"there is nothing to compare {folders[0] if folders else ''} with; name two or more runs")
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise ValueError(f"{folders[place]} is named twice")
    sets: dict[tuple[str, int, str], list[EvaluatedRun]] = {}
    for run in map(read_run, folders):
        sets.setdefault(scored_on(run), []).append(run)
    if all(len(runs) == 1 for runs in sets.values()):
        raise ValueError(_why_not([runs[0] for runs in sets.values()]))
    return [_compared(runs, samples) for runs in sets.values()]


def _why_not(runs: Sequence[EvaluatedRun]) -> str:
    """What differs of what they were scored on, and what can be done."""
    first, *others = runs
    names = [run.report["data"]["name"].split("; ") for run in runs]
    parts = {
        "data": ["; ".join(p for p in own if any(p not in other for other in names)) or "nothing more" for own in names],
        "window (data.max_length)": [f"{run.report['window']:,} tokens" for run in runs],
        "held-out data": [run.report["data"]["validation_sha256"][:10] for run in runs],
        "answers that fit": [f"{run.report['data']['answers']:,} of {run.report['data']['trees']} trees" for run in runs],
    }
    if len(set(parts["data"])) > 1:
        del parts["held-out data"]  # of course
    differing = [f"{name}: {' | '.join(values)}" for name, values in parts.items() if len(set(values)) > 1]
    began = [
        f"{run.name} began with {start}: its own report compares the two"
        for run in runs
        if (start := run.settings.get("adapter.start_from", "null")) != "null" and run.report.get("difference_from_start")
    ]
    other = next((run for run in others if (run.folder / "final" / "adapter_config.json").is_file()), None)
    score = f"python scripts/evaluate.py {first.name}/recipe.yaml --adapter {other.name}/final" if other else ""
    ways = [*began, *([f"to score a run on another one's data: {score}"] if score else [])]
    told = "; ".join([*(differing or ["which answers of the same data fit"]), *ways])
    named = ", ".join(run.name for run in runs)
    return f"no two of these runs were scored on the same answers, so their scores cannot be compared ({named}). What differs: {told}"


def _data(run: EvaluatedRun) -> str:
    data = run.report["data"]
    return (
        f"{data['answers']:,} answers of {data['trees']} trees, window {run.report['window']:,} tokens, "
        f"validation data {data['validation_sha256'][:10]}, {data['name']}"
    )


def _compared(runs: Sequence[EvaluatedRun], samples: int) -> ComparedSet:
    entries = _folded(runs)
    first = entries[0]
    keys = dict.fromkeys(key for entry in entries for key in entry.runs[0].settings)
    rows = []
    for key in keys:
        values = tuple(" / ".join(dict.fromkeys(run.settings.get(key, "null") for run in entry.runs)) for entry in entries)
        if len(set(values)) > 1:
            rows.append((key, values, key in first.runs[0].curve))
    rows.sort(key=lambda row: not row[2])
    seeds = tuple(", ".join(run.seed for run in entry.runs) for entry in entries)
    if len(set(seeds)) > 1 or any(len(entry.runs) > 1 for entry in entries):
        rows.insert(0, ("seed", seeds, True))
    against = tuple(None if entry is first else paired(first, entry, samples) for entry in entries)
    return ComparedSet(_data(runs[0]), entries, tuple(rows), against)


def _folded(runs: Sequence[EvaluatedRun]) -> tuple[Entry, ...]:
    """Runs of equal curve settings and unequal seeds together. Two of one seed are one result twice, and stay apart."""
    groups: list[list[EvaluatedRun]] = []
    for run in runs:
        own = {key: value for key, value in run.settings.items() if key in run.curve}
        for group in groups:
            theirs = {key: value for key, value in group[0].settings.items() if key in group[0].curve}
            if own == theirs and run.seed not in [other.seed for other in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    return tuple(Entry(tuple(group)) for group in groups)


def paired(first: Entry, other: Entry, samples: int) -> dict[str, Any]:
    """Bits per byte, `other` minus `first`, each the mean of its seeds, over the same drawn trees.

    The interval is about the data: what other seeds would do is not in it.
    """
    trees = [row["tree"] for row in first.runs[0].report["conversations"]]
    sizes = [row["bytes"] for row in first.runs[0].report["conversations"]]
    nats = [b - a for a, b in zip(_mean_nats(first), _mean_nats(other), strict=True)]
    return bootstrapped(trees, nats, sizes, samples)


def _mean_nats(entry: Entry) -> list[float]:
    columns = [[row["adapter_nats"] for row in run.report["conversations"]] for run in entry.runs]
    return [statistics.fmean(of_all) for of_all in zip(*columns, strict=True)]


# --- in words


def notes(compared: ComparedSet) -> list[str]:
    """What must be said beside the numbers."""
    found = []
    alone = [entry.name for entry in compared.entries if len(entry.runs) == 1]
    if alone:
        found.append(f"{', '.join(alone)}: one seed. A difference between single seeds may be the seed's; train with other seeds to know.")
    if any(len(entry.runs) > 1 for entry in compared.entries):
        found.append("± is the sample standard deviation over the seeds (n as stated).")
    if len(compared.entries) > 1:
        found.append(
            f"The interval against {compared.entries[0].name} is a paired bootstrap over trees, of the means over the seeds; "
            "it is about the data, and knows nothing of other seeds."
        )
    if len(judged := _judged_by(compared)) > 1:
        words = list(dict.fromkeys(judged.values()))
        why = f"were judged by different rewards: {' | '.join(words)}"
        if len(words) == 1:
            why = "were judged by other versions of a reward's file, or answered other prompts, or at another length"
        found.append(f"The mean reward is left out, for the runs {why}.")
    if len({base_had_a_choice(run.report) for entry in compared.entries for run in entry.runs}) > 1:
        found.append("The base was scored in other formats for some (evaluation.base_formats): the gains against it do not compare.")
    twice = [e.name for e in compared.entries for o in compared.entries if e is not o and _same(e, o)]
    if twice:
        found.append(f"{', '.join(twice)} have the same settings and the same seed: one result twice, no second seed.")
    return found


def _same(a: Entry, b: Entry) -> bool:
    curve = a.runs[0].curve
    return {r.seed for r in a.runs} == {r.seed for r in b.runs} and all(
        a.runs[0].settings.get(key) == b.runs[0].settings.get(key) for key in curve
    )


def result_rows(compared: ComparedSet) -> list[dict[str, str]]:
    """A row of strings for each entry; "" where a run does not have it."""
    alike = len(_judged_by(compared)) == 1
    return [_row(entry, against, alike) for entry, against in zip(compared.entries, compared.against_first, strict=True)]


def _judged_by(compared: ComparedSet) -> dict[tuple[Any, ...], str]:
    """What the runs' answers were judged by, and which answers: a mean is compared with means of the same alone. Each with the rewards in
    words.
    """
    found = {}
    for run in (run for entry in compared.entries for run in entry.runs):
        if _worth(run) is not None:
            r, answers = run.report["rewards"], run.report["answers"]
            of_what = hash_of(answers["prompts"]), answers["max_new_tokens"]
            found[r["in_words"], tuple(r["weights"].items()), run.settings.get(REWARD_FILES), of_what] = r["in_words"]
    return found


def _worth(run: EvaluatedRun) -> float | None:
    """The mean reward of its answers, if it was judged."""
    r = run.report.get("rewards")
    return r["columns"]["adapter"]["mean"] if r and "adapter" in r["columns"] else None


def _row(entry: Entry, against: Mapping[str, Any] | None, alike: bool) -> dict[str, str]:
    """`alike`: all runs that were judged were judged by the same rewards."""
    deviation = f" ± {entry.deviation:.4f}" if entry.deviation is not None else ""
    differences = [run.report["difference"]["bits_per_byte"] for run in entry.runs if run.report["difference"]]
    spread = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
    asked = [run.report["answers"]["columns"]["adapter"] for run in entry.runs if run.report.get("answers")]

    def share(key: str) -> str:
        counted = [column[key] for column in asked if column[key] is not None]
        return f"{statistics.fmean(counted):.0%}" if counted else ""

    limits = {run.report["answers"].get("concise_words", CONCISE_WORDS) for run in entry.runs if run.report.get("answers")} - {None}
    worth = [mean for run in entry.runs if alike and (mean := _worth(run)) is not None]
    rewards = [p["rewards"]["accuracy"] for run in entry.runs if (p := run.report.get("preferences")) and p["rewards"]]
    interval = against and against["interval_95"]
    return {
        "run": entry.name,
        "seeds": entry.seeds,
        "bits per byte": f"{entry.mean:.4f}{deviation}",
        "against its base": f"{statistics.fmean(differences):+.4f}{spread}" if differences else "",
        "against the first": f"{against['bits_per_byte']:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else "")
        if against
        else "",
        "perplexity": f"{statistics.fmean(run.report['adapter']['perplexity'] for run in entry.runs):.2f}",
        "answers ended": share("stopped"),
        "ended within the limit": f"{share('concise')} ({', '.join(map(str, sorted(limits)))} words)" if limits else "",
        "mean reward": f"{statistics.fmean(worth):.4f}" if worth else "",
        "reward accuracy": f"{statistics.fmean(rewards):.1%}" if rewards else "",
        "tokens per second": _rate(entry),
        "trained parameters": f"{entry.runs[0].run['parameters']['trainable']:,}",
    }


def _rate(entry: Entry) -> str:
    rates = [record["tokens_per_second"] for run in entry.runs for record in run.metrics if record.get("tokens_per_second")]
    return f"{statistics.median(rates):,.0f}" if rates else ""


def tables(compared: ComparedSet) -> list[Table]:
    """For the console: what came of the runs, and the settings that differ, a column for each."""
    rows = result_rows(compared)
    results = [(head, [row[head] for row in rows]) for head in rows[0] if head != "run" and any(row[head] for row in rows)]
    settings = [(key if learnt else f"{key} *", values) for key, values, learnt in compared.differing]
    found = []
    for title, lines in (
        ("results (bits per byte: lower is better)", results),
        ("settings that differ (*: not of what is learnt)", settings),
    ):
        if lines:
            table = Table(title=title, title_justify="left", box=None, pad_edge=False)
            table.add_column("")
            for entry in compared.entries:
                table.add_column(Text(entry.name), justify="right", overflow="fold")
            for name, values in lines:
                table.add_row(name, *(Text(value or "-") for value in values))
            found.append(table)
    return found


def markdown(sets: Sequence[ComparedSet]) -> str:
    """compare.md."""
    lines = ["# Runs side by side", ""]
    if len(sets) > 1:
        lines += [f"**These runs were scored on {len(sets)} different sets of answers. Scores of different sets cannot be compared.**", ""]
    for number, compared in enumerate(sets, 1):
        lines += [f"## Set {number}" if len(sets) > 1 else "## Results", "", f"Scored on {_cell(compared.data)}.", ""]
        rows = result_rows(compared)
        heads = [head for head in rows[0] if any(row[head] for row in rows)]
        lines += ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        lines += ["| " + " | ".join(_cell(row[head]) or "-" for head in heads) + " |" for row in rows]
        lines += [
            "",
            "Bits per byte of the same held-out answers; lower is better.",
            "",
            *(f"- {_cell(note)}" for note in notes(compared)),
            "",
        ]
        if compared.differing:
            lines += ["### Settings that differ", ""]
            lines += [
                "| setting | " + " | ".join(_cell(entry.name) for entry in compared.entries) + " |",
                "|---|" + "---|" * len(compared.entries),
            ]
            for key, values, learnt in compared.differing:
                lines.append(f"| {key}{'' if learnt else ' (not of what is learnt)'} | " + " | ".join(map(_cell, values)) + " |")
        elif len(compared.entries) > 1:
            lines += ["No setting differs."]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """In one line, and without what would end a table's cell or start HTML."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 300 else f"{text[:300]} …"
