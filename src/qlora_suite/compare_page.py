"""Runs side by side as one page, with the same look and the same rules as report_page.py."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from qlora_suite import charts
from qlora_suite.charts import Interval, Series
from qlora_suite.compared_runs import ComparedSet, notes, result_rows
from qlora_suite.loss_unit import loss_unit
from qlora_suite.report_page import rendered

LINES = ("adapter", "warm", "good", "violet", "bad", "base")
"""Colours of the entries' curves; no more entries than this get curves."""
OTHER_SAMPLES = 4
"""Prompts of which all entries' answers are shown."""


def compare_page(sets: Sequence[ComparedSet]) -> str:
    """The page's HTML."""
    runs = [run.name for compared in sets for entry in compared.entries for run in entry.runs]
    return rendered("compare.html", title="Runs side by side", runs=runs, sets=[_shown(compared) for compared in sets])


def _shown(compared: ComparedSet) -> dict[str, Any]:
    rows = result_rows(compared)
    return {
        "data": compared.data,
        "heads": [head for head in rows[0] if head != "run" and any(row[head] for row in rows)],
        "rows": rows,
        "names": [entry.name for entry in compared.entries],
        "notes": notes(compared),
        "differing": compared.differing,
        "charts": [chart for chart in (_scores(compared), _differences(compared), *_curves(compared)) if chart],
        "answers": _answers(compared),
    }


def _scores(compared: ComparedSet) -> dict[str, Any]:
    rows = [
        Interval(entry.name, entry.mean, dots=[run.bits for run in entry.runs] if len(entry.runs) > 1 else ()) for entry in compared.entries
    ]
    svg = charts.intervals(rows, "bits per byte of each run", "bits per byte, lower is better")
    return {
        "title": "Bits per byte",
        "svg": svg,
        "keys": Markup(),
        "note": "Points are single seeds, the bar is their mean." if any(row.dots for row in rows) else "",
    }


def _differences(compared: ComparedSet) -> dict[str, Any] | None:
    rows = []
    for entry, against in zip(compared.entries, compared.against_first, strict=True):
        if against and against["interval_95"]:
            low, high = against["interval_95"]
            colour = {"better": "good", "worse": "bad"}.get(against["verdict"], "base")
            rows.append(Interval(entry.name, against["bits_per_byte"], low, high, colour=colour))
    if not rows:
        return None
    svg = charts.intervals(rows, "difference to the first run, with its 95 % interval", "bits per byte, against the first", mark=0.0)
    return {
        "title": f"Against {compared.entries[0].name}",
        "svg": svg,
        "keys": Markup(),
        "note": "95 % intervals of a paired bootstrap over trees.",
    }


def _curves(compared: ComparedSet) -> list[dict[str, Any]]:
    if len(compared.entries) > len(LINES):
        return []
    found = []
    unit, *others = dict.fromkeys(loss_unit(run.metrics) for entry in compared.entries for run in entry.runs)
    if others:  # losses of different kinds in one picture say nothing
        return []
    for title, key, points in ((f"Development loss, {unit}", "dev_loss", True), (f"Training loss, {unit}", "loss", False)):
        series = []
        for colour, entry in zip(LINES, compared.entries, strict=False):
            for run in entry.runs:
                records = [record for record in run.metrics if key in record]
                series.append(Series(key, [r["step"] for r in records], [r[key] for r in records], colour, points, faint=not points))
        series = [one for one in series if any(value is not None for value in one.y)]
        if series:
            keys = charts.legend(*zip(LINES, (entry.name for entry in compared.entries), strict=False))
            found.append({"title": title, "svg": charts.lines(series, title, width=charts.WIDTH), "keys": keys, "note": ""})
    return found


def _answers(compared: ComparedSet) -> list[dict[str, Any]]:
    """Prompts that all entries have answered, of each entry's first run."""
    columns = []
    for entry in compared.entries:
        asked = entry.runs[0].report.get("answers")
        if not asked:
            return []
        columns.append({p["prompt"]: a for p, a in zip(asked["prompts"], asked["columns"]["adapter"]["answers"], strict=True)})
    shared = [prompt for prompt in columns[0] if all(prompt in column for column in columns)]
    # the fixed prompts stand last
    return [{"prompt": prompt, "answers": [column[prompt] for column in columns]} for prompt in shared[-OTHER_SAMPLES:]]
