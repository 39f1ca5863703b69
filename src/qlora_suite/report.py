"""The evaluation as Markdown and as a console table. report.json holds everything; these show what matters of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

COLUMNS = (
    ("base_unquantised", "base"),
    ("base_quantised", "base, as trained on"),
    ("start", "adapter at the start"),
    ("adapter", "adapter"),
)


METHODS = {"sft": "this training", "dpo": "DPO", "grpo": "GRPO"}
"""report.json's `tuning`, in words."""
NOTHING_SCORED = "No held-out conversation has an answer, so that there is nothing to score in bits per byte."


def headline(report: Mapping[str, Any]) -> str:
    """The result in a sentence or two: what the training aimed at."""
    return findings(report)[0]


def findings(report: Mapping[str, Any]) -> list[str]:
    """The result in sentences: what preference tuning aimed at, what it cost against its start, and then how far it is from the base."""
    tuned = report.get("tuning") in ("dpo", "grpo")
    aim = [*_pairs_line(report), *_rewards_line(report)]
    lines = [*_start_line(report), base_line(report)] if tuned else [base_line(report), *_start_line(report)]
    lines = [*aim, *lines] if tuned else [*lines, *aim]
    return [*lines, *_answers_line(report), *_likelier_line(report)]


def base_line(report: Mapping[str, Any]) -> str:
    """Bits per byte against the base."""
    model = report["adapter"] or report["base"]
    if model is None:
        return NOTHING_SCORED
    if report["difference"] is None:
        subject = "the model" if report["adapter"] else "the base"
        return f"{subject.capitalize()} needs {model['bits_per_byte']:.4f} bits per byte (perplexity {model['perplexity']:.2f})."
    difference, base = report["difference"], report["base"]
    at_its_best = "at its best" if base_had_a_choice(report) else f"in the same format, {base['format']},"
    verdict = f"which is {difference['verdict']}" if difference["verdict"] else _too_few(difference["trees"])
    return (
        f"The adapter needs {model['bits_per_byte']:.4f} bits per byte, the base {at_its_best} {base['bits_per_byte']:.4f}: "
        f"{difference['bits_per_byte']:+.4f}{_signed(difference['interval_95'])}, {verdict}."
    )


def base_had_a_choice(report: Mapping[str, Any]) -> bool:
    """Was the base scored in other formats, too, one of which may suit it better? For `text` there is no other."""
    asked_in = {name for name, cells in report["formats"].items() for column in cells if column.startswith("base")}
    return len(asked_in) > 1 or asked_in == {"text"}


def _start_line(report: Mapping[str, Any]) -> list[str]:
    """What became of the model that training began with. Nothing for a run that began with a new adapter."""
    if not (d := report.get("difference_from_start")):
        return []
    verdict = d["verdict"] or _too_few(d["trees"])
    return [
        f"After {METHODS.get(report.get('tuning'), 'training')}: {d['bits_per_byte']:+.4f} bits per byte{_signed(d['interval_95'])} "
        f"against the adapter at the start, which needs {report['start']['bits_per_byte']:.4f}: {verdict}."
    ]


def _answers_line(report: Mapping[str, Any]) -> list[str]:
    """What was counted of the answers before and after."""
    asked = report.get("answers")
    if not asked or not ("start" in asked["columns"] or report.get("rewards")):
        return []
    key, limit = ("stopped", "") if asked["concise_words"] is None else ("concise", f" within {asked['concise_words']} words")
    columns = asked["columns"].values()
    told = ", ".join(f"{one['label']} {one[key]:.0%} ({one['mean_words']:.0f} words in the mean)" for one in columns)
    return [f"Of {len(asked['prompts'])} answers, ended by themselves{limit}: {told}."]


def _rewards_line(report: Mapping[str, Any]) -> list[str]:
    """What answers to held-out prompts are worth, before and after; and why a reward could not be asked."""
    r = report.get("rewards")
    if not r:
        return []
    lines = []
    if ours := r["columns"].get("adapter"):
        d, began = r["difference_from_start"], r["began"]
        against = d or r["difference"]
        other = r["columns"][began if d else "base"] if against else None
        of = ", of the rewards that could be asked," if r["left_out"] else ""
        line = f"The mean reward of answers to {r['prompts']} held-out prompts{of} is {ours['mean']:.4f} after GRPO"
        if against:
            verdict = "without a verdict, for not all were asked" if r["left_out"] else _reward_verdict(against)
            line += f", of the {other['label']} {other['mean']:.4f}: {against['reward']:+.4f}{_signed(against['interval_95'])}, {verdict}"
        if d and began == "start" and "base" in r["columns"]:
            line += f". The base's is {r['columns']['base']['mean']:.4f}"
        lines.append(f"{line}.")
    return [*lines, *(f"Not judged: {why}." for why in r["left_out"])]


def _reward_verdict(difference: Mapping[str, Any]) -> str:
    return f"which is {difference['verdict']}" if difference["verdict"] else _too_few(difference["prompts"], "prompts")


def _pairs_line(report: Mapping[str, Any]) -> list[str]:
    """Reward accuracy; nothing for a run whose data are no pairs."""
    p = report.get("preferences")
    if not p or not (r := p["rewards"]):
        return []
    accuracy = f"{r['accuracy']:.1%}{_interval(r['interval_95'], '.1%')}"
    return [
        f"Of {p['pairs']:,} held-out pairs the chosen answer's reward, against the {r['start']}, is the higher one in {accuracy}: "
        f"{accuracy_verdict(p)}. The mean margin is {r['margin']:+.4f}."
    ]


def accuracy_verdict(preferences: Mapping[str, Any]) -> str:
    """`better than chance`, or that there are too few trees to know."""
    verdict = preferences["rewards"]["verdict"]
    if verdict is None:
        return f"{_too_few(preferences['trees'])}; chance gives 50 %"
    return f"{verdict} {'from' if verdict.startswith('not') else 'than'} chance, which gives 50 %"


def _likelier_line(report: Mapping[str, Any]) -> list[str]:
    """Who finds the chosen answer of held-out pairs likelier."""
    if not (p := report.get("preferences")):
        return []
    told = ", ".join(f"{one['label']} {one['prefers_chosen']:.1%}" for one in p["columns"].values())
    left_out = f" {p['left_out']:,} more pairs do not fit." if p["left_out"] else ""
    return [f"The chosen answer is the likelier one: {told}.{left_out}"]


def pair_lines(report: Mapping[str, Any]) -> list[str]:
    """All that is said of held-out pairs."""
    return [*_pairs_line(report), *_likelier_line(report)]


def _too_few(count: int, what: str = "trees") -> str:
    return f"too few {what} ({count}) for a verdict"


def _interval(edges: Sequence[float] | None, form: str) -> str:
    return f" (95 % interval {edges[0]:{form}} to {edges[1]:{form}})" if edges else ""


def _signed(edges: Sequence[float] | None) -> str:
    return _interval(edges, "+.4f")


def reward_rows(report: Mapping[str, Any]) -> list[tuple[str, list[float], float | None]]:
    """(reward, its mean in each column, its weight) and the weighted sum of them, in the order of `reward_labels`."""
    if not (r := report.get("rewards")) or not r["columns"]:
        return []
    columns = r["columns"].values()
    rows = [(name, [one["each"][name] for one in columns], weight) for name, weight in r["weights"].items()]
    return [*rows, ("reward, the weighted sum", [one["mean"] for one in columns], None)]


def reward_facts(report: Mapping[str, Any]) -> list[str]:
    """How the answers were judged, in sentences."""
    r, asked = report["rewards"], report["answers"]
    d = r["difference_from_start"] or r["difference"]
    of = "those of the recipe's rewards that could be asked" if r["left_out"] else "the recipe's rewards"
    judged = f"Judged by {of}: {r['in_words']}." if r["weights"] else "None of the recipe's rewards could be asked."
    facts = [
        f"{judged} {r['prompts']} held-out prompts, greedy answers of up to "
        f"{asked['max_new_tokens']:,} tokens; in training they are sampled.",
    ]
    if d:
        facts.append(
            f"The interval is a paired bootstrap over the prompts, one of a tree ({d['samples']:,} samples); the reward is higher than "
            f"before on {d['higher']} of them, lower on {d['lower']}."
        )
    return [*facts, *(f"Not judged: {why}." for why in r["left_out"])]


def preference_facts(report: dict[str, Any]) -> list[str]:
    """How the pairs were compared, in sentences."""
    p = report["preferences"]
    choice = base_had_a_choice(report)
    asked = "A base is asked in the format in which it is at its best, all others" if choice else "All are asked"
    facts = [
        f"{p['pairs']:,} pairs under {p['trees']} trees; {p['left_out']:,} were left out, because an answer does not fit into "
        f"{report['window']:,} tokens behind as much of the conversation as the other one.",
        f"{asked} in the trained {'one' if choice else 'format'}. Ties count half.",
    ]
    if r := p["rewards"]:
        kind = ", of means over an answer's tokens" if r["length_normalized"] else ""
        facts += [
            f"A reward is beta = {r['beta']:g} times by how much likelier an answer has become than it was for the {r['start']}{kind}; the "
            f"margin of a pair is the chosen answer's less the rejected one's.{_how_drawn(p)}",
            f"Likelier than at the start, in nats a token: chosen answers {r['log_ratio_chosen']:+.4f}, rejected ones "
            f"{r['log_ratio_rejected']:+.4f}.",
        ]
    return facts


def _how_drawn(preferences: Mapping[str, Any]) -> str:
    """Where the interval of the reward accuracy comes from (`preferences.at_the_edge` or a bootstrap); nothing where there is none."""
    r = preferences["rewards"]
    if r["interval_95"] is None:
        return ""
    if r["accuracy"] in (0, 1):
        return (
            f" The interval is Clopper's and Pearson's, for a share of {r['accuracy']:.0%} of {preferences['trees']} trees: "
            "a bootstrap takes what is the same in all of them for certain."
        )
    return f" The interval is a bootstrap over trees ({r['samples']:,} samples)."


def left_out_lines(report: dict[str, Any]) -> list[str]:
    """A line for each model that should have been compared and was not."""
    return [f"left out: {left['why']}" for left in report["left_out"]]


def benchmark_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Task, metric and the models' cells (`value`, `stderr`; None where a model has none) of the lm-evaluation-harness, if it ran."""
    if not report.get("lm_eval"):
        return []
    columns = report["lm_eval"]["columns"].values()
    first = next(iter(columns))["results"]
    return [
        {"task": task, "metric": metric, "cells": [column["results"].get(task, {}).get(metric) for column in columns]}
        for task, metrics in first.items()
        for metric in metrics
    ]


def benchmark_cell(cell: dict[str, float | None] | None) -> str:
    """`0.7000 ± 0.0100`, with one standard error."""
    if not cell or cell["value"] is None:
        return "-"
    return f"{cell['value']:.4f}" + (f" ± {cell['stderr']:.4f}" if cell["stderr"] is not None else "")


def benchmark_lines(report: dict[str, Any]) -> list[str]:
    """For the console: a line for each task and metric."""
    labels = [column["label"] for column in report["lm_eval"]["columns"].values()] if report.get("lm_eval") else []
    return [
        f"lm-eval {row['task']}, {row['metric']}: "
        + ", ".join(f"{label} {benchmark_cell(cell)}" for label, cell in zip(labels, row["cells"], strict=True))
        for row in benchmark_rows(report)
    ]


def cut_line(report: dict[str, Any]) -> str:
    cut = report["cut"]
    return f"cut, because they do not fit in every format: {cut['answers']} answers, {cut['tokens']:,} tokens, {cut['bytes']:,} bytes"


def result_table(report: dict[str, Any]) -> Table:
    """Formats by models, bits per byte and perplexity."""
    table = Table(
        title="bits per byte (perplexity) of the answers' content (lower is better)", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("format")
    for _, label in shown_columns(report):
        table.add_column(label, justify="right")
    for name, cells in report["formats"].items():
        table.add_row(name, *(_cell(cells.get(column)) for column, _ in shown_columns(report)))
    return table


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    columns = shown_columns(report)
    lines = ["# Evaluation", ""]
    for line in findings(report):
        lines += [line, ""]
    lines += scores_section(report, columns) if columns else []
    lines += [f"**{line[0].upper()}{line[1:]}**\n" for line in left_out_lines(report)]
    lines += ["## What was measured", "", *(f"- {line}" for line in facts(report)), ""]
    if report["slices"]:
        lines += slices_section(report)
    if report.get("rewards"):
        lines += rewards_section(report)
    if report.get("preferences"):
        lines += preference_section(report)
    if rows := benchmark_rows(report):
        labels = [column["label"] for column in report["lm_eval"]["columns"].values()]
        lines += [f"## Benchmarks (lm-evaluation-harness {report['lm_eval']['version']})", ""]
        lines += ["| task | metric | " + " | ".join(labels) + " |", "|---|---|" + "---:|" * len(labels)]
        lines += [f"| {row['task']} | {row['metric']} | " + " | ".join(map(benchmark_cell, row["cells"])) + " |" for row in rows]
        limit = f" The first {report['lm_eval']['limit']} examples of each." if report["lm_eval"]["limit"] else ""
        lines += ["", f"As plain text, without a chat template; ± one standard error.{limit}", ""]
    if report.get("answers"):
        columns = report["answers"]["columns"].values()
        lines += ["## Answers", "", "| | " + " | ".join(column["label"] for column in columns) + " |", "|---|" + "---:|" * len(columns)]
        within = [(f"end within {limit} words", "concise")] if (limit := report["answers"]["concise_words"]) is not None else []
        for name, key in (("end by themselves", "stopped"), *within, ("repetition", "repetition")):
            lines.append(f"| {name} | " + " | ".join(f"{column[key]:.0%}" for column in columns) + " |")
        for name, key in (("words, mean", "mean_words"), ("words, median", "median_words")):
            lines.append(f"| {name} | " + " | ".join(f"{column[key]:.0f}" for column in columns) + " |")
        lines.append("")
        count, longest = len(report["answers"]["prompts"]), report["answers"]["max_new_tokens"]
        lines += [f"{count} greedy answers of up to {longest} tokens; report.html has them side by side.", ""]
    if report.get("incidents"):
        lines += ["## What went wrong in training and did not end it", "", "| what | times | when | the last one |", "|---|---:|---|---|"]
        lines += [f"| {one['what']} | {one['count']} | {one['steps']} | {one['last'].replace('|', ' ')} |" for one in report["incidents"]]
        lines.append("")
    lines += ["## Made by", "", *(f"- {key}: {value}" for key, value in report["made_by"].items()), ""]
    return "\n".join(lines)


def scores_section(report: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Of report.md."""
    lines = ["| format | " + " | ".join(label for _, label in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, cells in report["formats"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get(column)) for column, _ in columns) + " |")
    return [*lines, "", "Bits per byte of the answers' content (perplexity per token in brackets). Lower is better.", ""]


def compared_columns(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, label) of a slice's columns: base, start and adapter, whichever there are."""
    labels = (("base", "base"), ("start", "start"), ("adapter", "adapter"))
    return [(name, label) for name, label in labels if report["slices"] and name in report["slices"][0]]


def before_of(row: Mapping[str, Any]) -> float | None:
    """What a slice's adapter is compared with: the start, where training began with an adapter, else the base."""
    return row["start"] if "start" in row else row.get("base")


def slices_section(report: Mapping[str, Any]) -> list[str]:
    """Of report.md."""
    columns = compared_columns(report)
    to = "difference to the start" if "start" in dict(columns) else "difference"
    lines = ["## Slices", "", f"| by | slice | answers | {' | '.join(label for _, label in columns)} | {to} |"]
    lines.append("|---|---|---:|" + "---:|" * (len(columns) + 1))
    for row in report["slices"]:
        cells = " | ".join("-" if row[name] is None else f"{row[name]:.4f}" for name, _ in columns)
        difference = "-" if (before := before_of(row)) is None else f"{row['adapter'] - before:+.4f}"
        lines.append(f"| {row['by']} | {row['slice']} | {row['answers']} | {cells} | {difference} |")
    return [*lines, "", "Bits per byte. Small slices say little: the interval above is for all answers together.", ""]


def rewards_section(report: Mapping[str, Any]) -> list[str]:
    """Of report.md."""
    labels = [one["label"] for one in report["rewards"]["columns"].values()]
    lines = ["## Rewards", ""]
    if rows := reward_rows(report):
        lines += ["| reward | weight | " + " | ".join(labels) + " |", "|---|---:|" + "---:|" * len(labels)]
        for name, values, weight in rows:
            shown = "" if weight is None else f"{weight:g}"
            lines.append(f"| {name.replace('|', ' ')} | {shown} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
        lines.append("")
    return [*lines, *(f"- {line}" for line in reward_facts(report)), ""]


def preference_section(report: dict[str, Any]) -> list[str]:
    """Of report.md."""
    p = report["preferences"]
    lines = ["## Held-out pairs", "", "| model | format | prefers the chosen answer | per token |", "|---|---|---:|---:|"]
    for one in p["columns"].values():
        lines.append(f"| {one['label']} | {one['format']} | {one['prefers_chosen']:.1%} | {one['prefers_chosen_per_token']:.1%} |")
    lines.append("")
    if p["slices"]:
        lines += ["| the chosen answer is | pairs | reward accuracy | mean margin |", "|---|---:|---:|---:|"]
        lines += [f"| {row['slice']} | {row['pairs']} | {row['accuracy']:.1%} | {row['margin']:+.4f} |" for row in p["slices"]]
        lines.append("")
    return [*lines, *(f"- {line}" for line in preference_facts(report)), ""]


def shown_columns(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, label) of the models that were scored, in the order in which they are shown."""
    present = {column for cells in report["formats"].values() for column in cells}
    labels = dict(COLUMNS) | report["labels"]
    return [(column, labels[column]) for column, _ in COLUMNS if column in present]


def _cell(scores: dict[str, float] | None) -> str:
    return f"{scores['bits_per_byte']:.4f} ({scores['perplexity']:.2f})" if scores else "-"


def facts(report: dict[str, Any]) -> list[str]:
    """What was measured, in sentences."""
    data = report["data"]
    scored = report["adapter"] or report["base"]
    if scored is None:
        return [f"Data: {data['name']}. {NOTHING_SCORED}"]
    chosen = " chosen" if report.get("preferences") else ""
    facts = [
        f"Data: {data['name']}; {data['answers']:,}{chosen} answers in {data['conversations']:,} conversations of {data['trees']} trees, "
        f"{scored['num_tokens']:,} tokens, {scored['num_bytes']:,} bytes.",
        f"Each answer is scored once, behind as much of its conversation as fits into {report['window']:,} tokens; {cut_line(report)}.",
    ]
    if report["base"]:
        best = f"{report['base']['format']} with {report['labels'][report['base']['column']]}"
        if len(report["formats"]) > 1:
            compared = "in plain-text formats; the adapter is compared with its best score"
            facts.append(f"The base is scored in the trained format and {compared}, {best}.")
        else:
            facts.append(f"The base is scored in the trained format alone: {best}.")
            if not base_had_a_choice(report):
                facts[-1] += " It may do better in another."
    if report["adapter"]:
        facts.append(f"The checkpoint was chosen by: {report['chosen_by']}.")
    if report["difference"]:
        d = report["difference"]
        facts.append(
            f"The interval is a paired bootstrap over {d['trees']} trees ({d['samples']:,} samples), for the replies of one tree are not "
            f"independent; the adapter is better on {d['better_trees']} of them."
        )
    if d := report.get("difference_from_start"):
        facts.append(f"The adapter at the start is compared in the same way; the run's own is better on {d['better_trees']} trees.")
    for name in ("base", "start", "adapter"):
        if report.get(name) and report[name]["end_tokens"]:
            facts.append(
                f"End tokens ({name}), not part of the headline: {report[name]['end_nll']:.3f} nats each, "
                f"a probability of {report[name]['end_probability']:.1%} in the geometric mean; bits per byte with them "
                f"{report[name]['bits_per_byte_with_end']:.4f}."
            )
    return facts
