"""The evaluation as one page: report.html holds its style and its charts, opens from the disk and asks nobody for anything.

    write_text(path, report_page(report, subject, manifest, conversations, journals_of(subject)))

What a subject does not have (a base alone has no curves) is left out. All text goes through Jinja2's escaping; the page has no
script, and its Content-Security-Policy allows nothing but its own style sheet.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qlora_suite import charts
from qlora_suite.charts import Interval, Series
from qlora_suite.conversations import Conversation
from qlora_suite.files import read_json
from qlora_suite.funnel import reading_rows, split_rows
from qlora_suite.loss_unit import loss_unit
from qlora_suite.recipe_file import to_yaml
from qlora_suite.report import (
    METHODS,
    base_had_a_choice,
    before_of,
    benchmark_cell,
    benchmark_rows,
    compared_columns,
    facts,
    findings,
    left_out_lines,
    pair_lines,
    preference_facts,
    reward_facts,
    reward_rows,
    shown_columns,
)
from qlora_suite.sample_answers import words
from qlora_suite.selection import SPLITS
from qlora_suite.subject import Subject
from qlora_suite.tracking import read_journal

LN2 = math.log(2)
MOST_SHOWN = 10
"""Conversations of either kind: improved, worsened."""
QUANTILES = (
    ("lowest", 0.0),
    ("10 % are below", 0.1),
    ("25 % are below", 0.25),
    ("median", 0.5),
    ("75 % are below", 0.75),
    ("90 % are below", 0.9),
    ("highest", 1.0),
)
SHOWN_PAIRS = 3
"""Of either kind: right, wrong."""
OPEN_PROMPTS = 9
"""With their answers; where there are more, the others are a click away."""
MOST_CHARS = 1500
"""Of one turn."""
MOST_PREVIEWS = 12
"""Steps of the preview timeline: the first, the last and some between."""
_UNSEEN = dict.fromkeys({*range(32), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF} - {9, 10}, "\N{REPLACEMENT CHARACTER}")
"""Control characters and halves of surrogate pairs, which HTML cannot hold; tab and line feed can stay."""


def environment() -> Environment:
    """Escapes everything; a name that is not there is an error."""
    made = Environment(
        loader=PackageLoader("qlora_suite", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.finalize = lambda value: value if isinstance(value, Markup) else _printable(value)
    made.filters["clipped"] = clipped
    made.globals["before_of"] = before_of
    return made


def rendered(template: str, **values: Any) -> str:
    """A page of its own: with the style sheet inside, and a policy that allows this one by its hash."""
    made = environment()
    style = (made.loader.get_source(made, "style.css")[0]).strip()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return made.get_template(template).render(style=Markup(style), policy=policy, **values)  # noqa: S704  our own file


def _printable(value: Any) -> Any:
    """Text without control characters and halves of surrogate pairs, which HTML cannot hold."""
    return value.translate(_UNSEEN) if isinstance(value, str) else value


def clipped(text: str, most: int = MOST_CHARS) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} … ({len(text) - most:,} more characters)"


def journals_of(subject: Subject) -> dict[str, Any]:
    """What a run wrote while it learnt: its metrics, previews and run.json. Empty for everything that is no run's result."""
    if subject.report != "report":
        return {}
    folder = subject.folder
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    return {"metrics": read_journal(folder / "metrics.jsonl"), "previews": read_journal(folder / "previews.jsonl"), "run": run}


def report_page(
    report: Mapping[str, Any],
    subject: Subject,
    manifest: Mapping[str, Any],
    conversations: Sequence[Conversation],
    journals: Mapping[str, Any],
) -> str:
    """The page's HTML."""
    return rendered(
        "report.html",
        title=str(subject.folder) if subject.report == "report" else subject.report.removeprefix("report-"),
        kind="run" if subject.report == "report" else "base" if subject.report == "report-base" else "trained elsewhere",
        base_name=subject.recipe.model.base,
        report=report,
        findings=findings(report),
        heroes=heroes(report),
        left_out=left_out_lines(report),
        facts=facts(report),
        scales=[scale for scale in (_aim_scale(report), _scale(report)) if scale],
        formats=_formats(report),
        tiles=_tiles(report),
        curves=curves(journals.get("metrics", []), journals.get("previews", [])),
        incidents=report.get("incidents") or [],
        differences=differences(report, conversations),
        compared=compared_columns(report),
        preferences=preferences(report, conversations),
        rewards=rewards(report),
        previews=_timeline(journals.get("previews", [])),
        answers=answers(report),
        end_tokens=_end_tokens(report),
        lm_eval=[{**row, "cells": list(map(benchmark_cell, row["cells"]))} for row in benchmark_rows(report)],
        reading=reading_rows(manifest["counts"]),
        splits=SPLITS,
        funnel=split_rows(manifest["counts"], subject.recipe.data.packing),
        capsule=_capsule(report, journals.get("run", {}), manifest),
        recipe=to_yaml(subject.recipe),
    )


# --- parts


def heroes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The large numbers, what the training aimed at first: a line above them, (kind, number) pairs, badges (verdict, words), a line below.

    A badge says what it compares with: a run may be better than its base and worse than what it began with.
    """
    return [one for one in (_accuracy_hero(report), _reward_hero(report), _bits_hero(report)) if one]


def _accuracy_hero(report: Mapping[str, Any]) -> dict[str, Any] | None:
    p = report["preferences"]
    if not p or not (r := p["rewards"]):
        return None
    of = f"{METHODS[report['tuning']]} · r" if report.get("tuning") else "R"
    return {
        "unit": f"{of}eward accuracy on {p['pairs']:,} held-out pairs (chance: 50 %)",
        "numbers": [("to", f"{r['accuracy']:.1%}")],
        "badges": _badge(r["verdict"], "chance") or (("", f"too few trees ({p['trees']})"),),
        "note": f"By how much likelier the chosen and the rejected answer have become than for the {r['start']}.",
    }


def _reward_hero(report: Mapping[str, Any]) -> dict[str, Any] | None:
    r = report.get("rewards")
    if not r or "adapter" not in r["columns"]:
        return None
    to_start = r["difference_from_start"] if r["began"] == "start" else None
    badges = [_badge(d["verdict"], other) for d, other in ((to_start, "the start"), (r["difference"], "the base")) if d]
    some = ", of the rewards that could be asked" if r["left_out"] else ""
    few = (("", "no verdict: not all rewards were asked" if r["left_out"] else f"too few prompts ({r['prompts']})"),)
    return {
        "unit": f"GRPO · mean reward of answers to {r['prompts']:,} held-out prompts{some}, higher is better",
        "numbers": [(_KINDS[name], f"{one['mean']:.3f}") for name, one in r["columns"].items()],
        "badges": [one for of_each in badges for one in of_each] if all(badges) else few,
        "note": f"{' → '.join(one['label'] for one in r['columns'].values()).capitalize()}.",
    }


def _bits_hero(report: Mapping[str, Any]) -> dict[str, Any] | None:
    sides = {name: report[name] for name in _KINDS if report[name]}
    if not sides:
        return None
    to_start, to_base, base = report["difference_from_start"], report["difference"], report["base"]
    note = ""
    if base and report["adapter"]:
        labels = report["labels"]
        between = f" → {labels['start']}" if report["start"] else ""
        chosen = " Of the pairs' chosen answers." if report["preferences"] else ""
        ours = f"{labels['adapter']} ({report['adapter']['format']})"
        at_its_best = " at its best" if base_had_a_choice(report) else ""
        note = f"Base{at_its_best} ({base['format']}, {labels[base['column']]}){between} → {ours}.{chosen}"
    return {
        "unit": "Bits per byte of held-out answers, lower is better",
        "numbers": [(_KINDS[name] if report["adapter"] else "to", f"{side['bits_per_byte']:.4f}") for name, side in sides.items()],
        "badges": [*_badge(to_start and to_start["verdict"], "the start"), *_badge(to_base and to_base["verdict"], "the base")],
        "note": note,
    }


_KINDS = {"base": "from", "start": "start", "adapter": "to"}
"""Of the numbers, for the style sheet."""
_COLOURS = {"start": "violet"}
"""Of the columns whose name is no colour."""


def _badge(verdict: str | None, other: str) -> tuple[tuple[str, str], ...]:
    """(class of its colour, words), or none."""
    return ((verdict, f"{verdict} {'from' if verdict.startswith('not') else 'than'} {other}"),) if verdict else ()


def rewards(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a run of GRPO: each reward of base, start and run, and what it was before and is now, prompt by prompt."""
    if not (r := report.get("rewards")):
        return None
    rows, names = reward_rows(report), list(r["columns"])
    shown = {
        "labels": [one["label"] for one in r["columns"].values()],
        "rows": [
            (name if weight in (None, 1) else f"{weight:g} × {name}, before its weight", [f"{value:.4f}" for value in values])
            for name, values, weight in rows
        ],
        "facts": reward_facts(report),
        "strips": None,
    }
    if names:
        places = [place for place, prompt in enumerate(report["answers"]["prompts"]) if prompt["held_out"]]
        answers = {name: report["answers"]["columns"][name]["answers"] for name in names}
        strips = [(r["columns"][n]["label"], [answers[n][place]["reward"] for place in places], _COLOURS.get(n, n)) for n in names]
        shown["strips"] = charts.strips(strips, "reward of each answer", "reward")
    return shown


def _aim_scale(report: Mapping[str, Any]) -> Markup | None:
    """Of what preference tuning aimed at: reward accuracy against chance, or the differences of the mean reward against none."""
    if (p := report["preferences"]) and (r := p["rewards"]) and r["interval_95"]:
        low, high = (100 * edge for edge in r["interval_95"])
        row = Interval("reward accuracy", 100 * r["accuracy"], low, high, colour=_colour(r["verdict"]))
        return charts.intervals([row], "reward accuracy and its 95 % interval, against chance", "% of the pairs", mark=50.0)
    if r := report.get("rewards"):
        to_start = r["difference_from_start"] if r["began"] == "start" else None
        sides = (("against the base", r["difference"]), ("against the start", to_start))
        found = [
            Interval(name, d["reward"], *d["interval_95"], colour=_colour(d["verdict"])) for name, d in sides if d and d["interval_95"]
        ]
        label = "the difference of the mean reward and its 95 % interval, against zero"
        return charts.intervals(found, label, "mean reward, adapter − other", mark=0.0) if found else None
    return None


def _scale(report: Mapping[str, Any]) -> Markup | None:
    """The differences, to the base and to the start, and their intervals, against none."""
    rows = []
    for name, d in (("against the base", report["difference"]), ("against the start", report["difference_from_start"])):
        if d and d["interval_95"]:
            rows.append(Interval(name, d["bits_per_byte"], *d["interval_95"], colour=_colour(d["verdict"])))
    if len(rows) == 1:
        rows = [replace(rows[0], name="" if report["difference"] else rows[0].name)]
    label = "the difference and its 95 % interval, against zero"
    return charts.intervals(rows, label, "bits per byte, adapter − other", mark=0.0) if rows else None


def _formats(report: Mapping[str, Any]) -> dict[str, Any]:
    columns = shown_columns(report)
    rows = [
        (name, [cells.get(column) for column, _ in columns], [_is_compared(report, name, column) for column, _ in columns])
        for name, cells in report["formats"].items()
    ]
    return {"labels": [label for _, label in columns], "rows": rows}


def _is_compared(report: Mapping[str, Any], name: str, column: str) -> bool:
    sides = [
        report["base"] and (report["base"]["format"], report["base"]["column"]),
        report["start"] and (report["start"]["format"], "start"),
        report["adapter"] and (report["adapter"]["format"], "adapter"),
    ]
    return (name, column) in sides


def _tiles(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Small numbers under the headline: what, and its value of base -> start -> adapter."""
    sides = [report[name] for name in ("base", "start", "adapter")]
    asked = report.get("answers") or {"columns": {}, "concise_words": None}
    answered = [asked["columns"].get(name) for name in ("base", "start", "adapter")]
    tiles: list[dict[str, Any]] = []

    def add(label: str, values: Sequence[Mapping[str, Any] | None], key: str, write: Any) -> None:
        if found := [write(of_side[key]) for of_side in values if of_side]:
            tiles.append({"label": label, "values": found})

    than_base = " than the base" if report["start"] else ""
    for d, other in ((report["difference_from_start"], " than at the start"), (report["difference"], than_base)):
        if d:
            tiles.append({"label": f"Trees on which the adapter is better{other}", "values": [f"{d['better_trees']} of {d['trees']}"]})
    if (p := report["preferences"]) and p["rewards"]:
        tiles.append({"label": "Mean margin of a pair", "values": [f"{p['rewards']['margin']:+.4f}"]})
    if (r := report.get("rewards")) and r["columns"]:
        sides_of = [r["columns"].get(name) for name in ("base", "start", "adapter")]
        for name in r["weights"] if len(r["weights"]) > 1 else ():
            add(f"Reward {name}, mean", [side and side["each"] for side in sides_of], name, lambda v: f"{v:.3f}")
    add("Perplexity per token", sides, "perplexity", lambda v: f"{v:,.2f}")
    count, limit = len(asked.get("prompts", ())), asked["concise_words"]
    add(f"Of {count} answers, ended by themselves", answered, "stopped", lambda v: f"{v * count:.0f}")
    if limit is not None:
        add(f"Of {count}, ended within {limit} words", answered, "concise", lambda v: f"{v * count:.0f}")
    if report["start"]:
        add("Words of an answer, mean", answered, "mean_words", lambda v: f"{v:.0f}")
    add("Repetition in answers", answered, "repetition", lambda v: f"{v:.0%}")
    return tiles


def preferences(report: Mapping[str, Any], conversations: Sequence[Conversation]) -> dict[str, Any] | None:
    """Of held-out pairs: who prefers what, the picture of the margins, and the pairs at its ends with their text."""
    p = report["preferences"]
    if not p:
        return None
    shown = {"facts": preference_facts(report), "sentence": " ".join(pair_lines(report)), "margins": None, "ends": []}
    if p["rewards"]:
        shown["ends"] = _ends(p["rows"], conversations)
        margins = [row["margin"] for row in p["rows"]]
        label = "pairs by their margin"
        shown["margins"] = charts.histogram(margins, label, "margin: reward of the chosen − of the rejected answer", more_is_better=True)
        rows = [Interval("", 100 * p["rewards"]["accuracy"], colour=_colour(p["rewards"]["verdict"]))]
        if edges := p["rewards"]["interval_95"]:
            rows = [replace(rows[0], low=100 * edges[0], high=100 * edges[1])]
        shown["accuracy"] = charts.intervals(rows, "reward accuracy and its 95 % interval, against chance", "% of the pairs", mark=50.0)
    return shown


def _ends(rows: Sequence[Mapping[str, Any]], conversations: Sequence[Conversation]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The pairs of the largest margins and of the smallest: a title, the class of its colour, the pairs with their texts."""
    texts = {(c.key, c.group): c for c in conversations if c.rejected is not None}
    known = [{**row, "of": texts[row["key"], row["tree"]]} for row in rows if (row["key"], row["tree"]) in texts]
    ordered = sorted(known, key=lambda row: row["margin"])
    right = [row for row in ordered[::-1][:SHOWN_PAIRS] if row["margin"] > 0]
    wrong = [row for row in ordered[:SHOWN_PAIRS] if row["margin"] < 0]
    both = (("Most clearly right", "better-text", right), ("Most clearly wrong", "worse-text", wrong))
    return [one for one in both if one[2]]


def _colour(verdict: str | None) -> str:
    return {"better": "good", "worse": "bad"}.get(verdict, "base")


def curves(metrics: Sequence[Mapping[str, Any]], previews: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Charts of a run's journals; none for a key that it does not have."""
    steps = [r for r in metrics if "loss" in r]
    found: list[dict[str, Any]] = []

    def add(title: str, series: Sequence[Series], keys: Sequence[tuple[str, str]] = (), **style: Any) -> None:
        series = [one for one in series if any(value is not None for value in one.y)]
        if series:
            svg = charts.lines(series, title, **style)
            found.append({"title": title, "svg": svg, "legend": charts.legend(*keys) if len(series) > 1 else ""})

    def of(key: str, colour: str = "adapter", **style: Any) -> Series:
        rows = [r for r in steps if key in r]
        return Series(key, [r["step"] for r in rows], [r[key] for r in rows], colour, **style)

    def with_dev(title: str, key: str, **style: Any) -> None:
        rows = [r for r in metrics if f"dev_{key}" in r]
        dev = Series(f"dev_{key}", [r["step"] for r in rows], [r[f"dev_{key}"] for r in rows], "adapter", points=True)
        add(title, [of(key, "base", faint=True) if rows else of(key), dev], [("base", "training"), ("adapter", "development")], **style)

    with_dev(f"Loss, {loss_unit(metrics)}", "loss")
    if any("accuracy" in r for r in steps):  # DPO
        with_dev("Reward accuracy", "accuracy", percent=True)
        with_dev("Margin between the rewards", "margin")
        rewards = [of("reward_chosen", "good"), of("reward_rejected", "bad")]
        add("Rewards", rewards, [("good", "chosen"), ("bad", "rejected")])
        with_dev("Log-ratio of both answers, nats per token", "log_ratio")
    if any("reward" in r for r in steps):  # GRPO
        add("Reward of an answer", [of("reward")])
        add("Answers that end by themselves", [of("finished")], percent=True)
        add("Words of an answer", [of("words")], from_zero=True)
        add("KL divergence from the start, nats per token", [of("kl")])
    add("Learning rate", [of("learning_rate")], from_zero=True)
    add("Gradient norm, before clipping", [of("grad_norm")], from_zero=True)
    add("Tokens per second", [of("tokens_per_second")], from_zero=True)
    add("Peak memory, GiB", [of("peak_memory_gib")], from_zero=True)
    asked = [r["step"] for r in previews]
    stops = Series("stopped", asked, [r["stopped"] for r in previews], "adapter", points=True)
    again = Series("repetition", asked, [r["repetition"] for r in previews], "base", points=True)
    add("Preview answers", [stops, again], [("adapter", "end by themselves"), ("base", "repetition")], percent=True)
    return found


def differences(report: Mapping[str, Any], conversations: Sequence[Conversation]) -> dict[str, Any] | None:
    """The histogram, and the conversations at its ends with their text: of the run against its start, which is what its training did,
    or, of a new adapter, against the base.
    """
    before = "start" if report["difference_from_start"] else "base"
    rows = [
        {**row, "change": (row["adapter_nats"] - row[f"{before}_nats"]) / LN2 / row["bytes"]}
        for row in report["conversations"]
        if "adapter_nats" in row and f"{before}_nats" in row and row["bytes"]
    ]
    if not rows:
        return None
    texts = {(c.key, c.group): c for c in conversations}
    ordered = sorted(rows, key=lambda row: row["change"])
    changes = [row["change"] for row in rows]

    def shown(chosen: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                **row,
                **{side: row[f"{side}_nats"] / LN2 / row["bytes"] for side in ("base", "start", "adapter") if f"{side}_nats" in row},
                "turns": texts[row["key"], row["tree"]].turns if (row["key"], row["tree"]) in texts else (),
            }
            for row in chosen
        ]

    improved = [row for row in ordered if row["change"] < 0]
    worsened = [row for row in reversed(ordered) if row["change"] > 0]
    return {
        "svg": charts.histogram(changes, "conversations by their difference in bits per byte", f"bits per byte, adapter − {before}"),
        "before": before,
        "count": len(rows),
        "num_improved": len(improved),
        "num_worsened": len(worsened),
        "median": float(np.median(changes)),
        "quantiles": [(name, float(np.quantile(changes, share))) for name, share in QUANTILES],
        "improved": shown(improved[:MOST_SHOWN]),
        "worsened": shown(worsened[:MOST_SHOWN]),
    }


def _timeline(previews: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each prompt with its answers over the steps."""
    if not previews:
        return None
    many = len(previews)
    chosen = sorted({round(i * (many - 1) / max(1, min(many, MOST_PREVIEWS) - 1)) for i in range(min(many, MOST_PREVIEWS))})
    prompts: dict[str, list[dict[str, Any]]] = {}
    for place in chosen:
        for one in previews[place]["answers"]:
            prompts.setdefault(one["prompt"], []).append({"step": previews[place]["step"], **one})
    return {"prompts": prompts, "shown": len(chosen), "all": many}


def answers(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Base, start and adapter side by side, with the table of what can be counted of them."""
    asked = report.get("answers")
    if not asked or not asked["prompts"]:
        return None
    columns, limit = asked["columns"], asked["concise_words"]
    names = list(columns)
    rows = [{**prompt, "answers": [columns[name]["answers"][i] for name in names]} for i, prompt in enumerate(asked["prompts"])]
    references = [words(prompt["reference"]) for prompt in asked["prompts"] if prompt["reference"]]
    strips = [(columns[n]["label"], [words(one["text"]) for one in columns[n]["answers"]], _COLOURS.get(n, n)) for n in names]
    if references:
        strips.append(("people", references, "muted"))
    measured = [
        ("End by themselves", [f"{columns[n]['stopped']:.0%}" for n in names]),
        *([(f"End by themselves within {limit} words", [f"{columns[n]['concise']:.0%}" for n in names])] if limit is not None else []),
        ("Mean length, words", [f"{columns[n]['mean_words']:,.0f}" for n in names]),
        ("Median length, words", [f"{columns[n]['median_words']:,.0f}" for n in names]),
        ("Repetition: 4-token windows that stood there before", [f"{columns[n]['repetition']:.0%}" for n in names]),
    ]
    return {
        "labels": [columns[n]["label"] for n in names],
        "names": names,
        "rows": rows,
        "measured": measured,
        "held_out": sum(prompt["held_out"] for prompt in asked["prompts"]),
        "max_new_tokens": asked["max_new_tokens"],
        "open": OPEN_PROMPTS if len(rows) > OPEN_PROMPTS + 2 else len(rows),
        "concise_words": limit,
        "lengths": charts.strips(strips, "words of each answer" + (f", with a line at {limit}" if limit else ""), "words", mark=limit),
        "of_base": "base" in names,
    }


def _end_tokens(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How likely an end token is where a reference answer ends, of the models that the headline compares."""
    sides = [(name, report[name]) for name in ("base", "start", "adapter")]
    return [
        {"name": n, "log_probability": -s["end_nll"], "probability": s["end_probability"], "count": s["end_tokens"]}
        for n, s in sides
        if s and s["end_tokens"]
    ]


def _capsule(report: Mapping[str, Any], run: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What it takes to make the same again, in groups of (name, value)."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    if run:
        git = run.get("git")
        changed = f", {git['changed_files']} files changed since" if git and git["changed_files"] else ""
        sizes = run["parameters"]
        training = [
            ("command", " ".join(run["command"])),
            ("git", f"{git['commit']}{changed}" if git else ""),
            ("engine", f"{run['engine']}, {run['processes']} process{'es' if run['processes'] > 1 else ''}, {run['precision']}"),
            ("trained parameters", f"{sizes['trainable']:,} beside {sizes['base']:,}"),
            ("servable as", f"{run['servable_as']}: {run['servable_because']}"),
            *_flat(run["hardware"]),
            *_flat(run["versions"]),
        ]
        groups.append(("Training", [pair for pair in training if pair[1]]))
    groups.append(("Evaluation", _flat(report["made_by"])))
    hashes = [
        ("validation.arrow", report["data"]["validation_sha256"]),
        *manifest.get("sources", {}).items(),
        *report.get("weights", {}).items(),
    ]
    if run.get("base"):
        hashes.append(("base: commit, or hash of its files", run["base"]))
    groups.append(("Hashes, SHA-256", [(name, str(value)) for name, value in hashes]))
    return groups


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), str(value)) for name, value in values.items()]
