"""The evaluation as Markdown and as a console table. report.json holds everything; these show what matters of it."""

from typing import Any

from rich.table import Table

COLUMNS = (
    ("base_unquantised", "base"),
    ("base_quantised", "base, as trained on"),
    ("start", "adapter at the start"),
    ("adapter", "adapter"),
)


def headline(report: dict[str, Any]) -> str:
    """The result in a sentence or two."""
    model = report["adapter"] or report["base"]
    if report["difference"] is None:
        subject = "the model" if report["adapter"] else "the base"
        return f"{subject.capitalize()} needs {model['bits_per_byte']:.4f} bits per byte (perplexity {model['perplexity']:.2f})."
    difference, base = report["difference"], report["base"]
    verdict = f"which is {difference['verdict']}" if difference["verdict"] else f"too few trees ({difference['trees']}) for a verdict"
    interval = (
        f" (95 % interval {difference['interval_95'][0]:+.4f} to {difference['interval_95'][1]:+.4f})" if difference["interval_95"] else ""
    )
    return (
        f"The adapter needs {model['bits_per_byte']:.4f} bits per byte, the base at its best {base['bits_per_byte']:.4f}: "
        f"{difference['bits_per_byte']:+.4f}{interval}, {verdict}."
    )


def start_lines(report: dict[str, Any]) -> list[str]:
    """What became of the model that training began with: its scores and its answers. Nothing for a run that began with a new adapter."""
    lines = []
    if d := report.get("difference_from_start"):
        interval = f" (95 % interval {d['interval_95'][0]:+.4f} to {d['interval_95'][1]:+.4f})" if d["interval_95"] else ""
        trained = "this training" if report["tuning"] == "sft" else "the preference tuning"
        verdict = d["verdict"] or f"too few trees ({d['trees']}) for a verdict"
        lines.append(
            f"After {trained}: {d['bits_per_byte']:+.4f} bits per byte{interval} against the adapter at the start, which needs "
            f"{report['start']['bits_per_byte']:.4f}: {verdict}."
        )
    if (asked := report.get("answers")) and "start" in asked["columns"]:
        columns = asked["columns"].values()
        told = ", ".join(f"{one['label']} {one['concise']:.0%} ({one['mean_words']:.0f} words in the mean)" for one in columns)
        lines.append(f"Of {len(asked['prompts'])} answers, ended by themselves within {asked['concise_words']} words: {told}.")
    return lines


def pair_lines(report: dict[str, Any]) -> list[str]:
    """Who prefers the chosen answer of held-out pairs; nothing for a run whose data are no pairs."""
    lines = []
    if p := report.get("preferences"):
        if r := p["rewards"]:
            interval = f" (95 % interval {r['interval_95'][0]:.1%} to {r['interval_95'][1]:.1%})" if r["interval_95"] else ""
            lines.append(
                f"Of {p['pairs']:,} held-out pairs the chosen answer's reward is the higher one in {r['accuracy']:.1%}{interval}; "
                f"chance gives 50 %. The mean margin is {r['margin']:+.4f}."
            )
        told = ", ".join(f"{one['label']} {one['prefers_chosen']:.1%}" for one in p["columns"].values())
        left_out = f" {p['left_out']:,} more pairs do not fit." if p["left_out"] else ""
        lines.append(f"The chosen answer is the likelier one: {told}.{left_out}")
    return lines


def preference_facts(report: dict[str, Any]) -> list[str]:
    """How the pairs were compared, in sentences."""
    p = report["preferences"]
    facts = [
        f"{p['pairs']:,} pairs under {p['trees']} trees; {p['left_out']:,} were left out, because an answer does not fit into "
        f"{report['window']:,} tokens behind as much of the conversation as the other one.",
        "A base is asked in the format in which it is at its best, all others in the trained one. Ties count half.",
    ]
    if r := p["rewards"]:
        kind = ", of means over an answer's tokens" if r["length_normalized"] else ""
        facts += [
            f"A reward is beta = {r['beta']:g} times by how much likelier an answer has become than it was for the {r['start']}{kind}; the "
            f"margin of a pair is the chosen answer's less the rejected one's. The intervals are a bootstrap over trees "
            f"({r['samples']:,} samples).",
            f"Likelier than at the start, in nats a token: chosen answers {r['log_ratio_chosen']:+.4f}, rejected ones "
            f"{r['log_ratio_rejected']:+.4f}.",
        ]
    return facts


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
    lines = ["# Evaluation", "", headline(report), ""]
    for line in [*start_lines(report), *pair_lines(report)]:
        lines += [line, ""]
    lines += ["| format | " + " | ".join(label for _, label in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, cells in report["formats"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get(column)) for column, _ in columns) + " |")
    lines += ["", "Bits per byte of the answers' content (perplexity per token in brackets). Lower is better.", ""]
    lines += [f"**{line[0].upper()}{line[1:]}**\n" for line in left_out_lines(report)]
    lines += ["## What was measured", "", *(f"- {line}" for line in facts(report)), ""]
    if report["slices"]:
        with_base = "base" in report["slices"][0]
        lines += ["## Slices", "", "| by | slice | answers | base | adapter | difference |", "|---|---|---:|---:|---:|---:|"]
        for row in report["slices"]:
            base = f"{row['base']:.4f} | " if with_base else "- | "
            difference = f"{row['adapter'] - row['base']:+.4f}" if with_base else "-"
            lines.append(f"| {row['by']} | {row['slice']} | {row['answers']} | {base}{row['adapter']:.4f} | {difference} |")
        lines += ["", "Bits per byte. Small slices say little: the interval above is for all answers together.", ""]
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
        within = f"end within {report['answers']['concise_words']} words"
        for name, key in (("end by themselves", "stopped"), (within, "concise"), ("repetition", "repetition")):
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
    chosen = " chosen" if report.get("preferences") else ""
    facts = [
        f"Data: {data['name']}; {data['answers']:,}{chosen} answers in {data['conversations']:,} conversations of {data['trees']} trees, "
        f"{scored['num_tokens']:,} tokens, {scored['num_bytes']:,} bytes.",
        f"Each answer is scored once, behind as much of its conversation as fits into {report['window']:,} tokens; {cut_line(report)}.",
    ]
    if report["base"]:
        facts.append(
            f"The base is scored in the trained format and in plain-text formats; the adapter is compared with the base's best score, "
            f"{report['base']['format']} with {report['labels'][report['base']['column']]}."
        )
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
