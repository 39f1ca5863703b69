"""The page that scripts/preflight.py shows: modules, memory, and a line for each check, green, yellow or red."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora_suite.memory_estimate import Estimate
from qlora_suite.micro_batch import HEADROOM
from qlora_suite.module_table import Row
from qlora_suite.preflight_checks import Finding

WIDTH = 100
MARKS = {"ok": ("green", "ok  "), "look": ("yellow", "look"), "fail": ("red", "FAIL")}
MODULES_SHOWN = 14
BAR = 16


def page_console() -> Console:
    """100 columns, or what a smaller terminal has."""
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    return console


def show(console: Console, title: str, rows: Sequence[Row], estimate: Estimate | None, memory: int | None, measured: str) -> None:
    """Title, modules, memory."""
    console.print(f"[bold]{escape(title)}[/]")
    if rows:
        console.print()
        _modules(console, rows)
    if estimate is not None:
        console.print()
        _memory(console, estimate, memory, measured)


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """A line each, the remedy of what is not green below it, and the verdict."""
    console.print()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(ratio=1)
    for finding in findings:
        colour, mark = MARKS[finding.level]
        text = Text(finding.text)
        if finding.level != "ok" and finding.remedy:
            text.append(f"\n-> {finding.remedy}", style=colour)
        table.add_row(Text(mark, style=f"bold {colour}"), finding.what, text)
    console.print(table)
    console.print()
    console.print(verdict(findings))


def verdict(findings: Sequence[Finding]) -> Text:
    """What it all comes to."""
    fails, looks = (sum(f.level == level for f in findings) for level in ("fail", "look"))
    if fails:
        return Text(f"red: {fails} {_things(fails)} will fail, {looks} to look at", style="bold red")
    if looks:
        return Text(f"yellow: it can start; {looks} {_things(looks)} to look at", style="bold yellow")
    return Text("green: it can start", style="bold green")


def _things(count: int) -> str:
    return "thing" if count == 1 else "things"


def _modules(console: Console, rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("module", no_wrap=True)
    for name in ("shape", "count", "parameters", "stored as", "size", "adapter"):
        table.add_column(name, justify="left" if name == "stored as" else "right", no_wrap=True)
    for row in rows[:MODULES_SHOWN]:
        shape = " x ".join(map(str, row.shape))
        how = {"nf4": "4-bit nf4", "int8": "8-bit"}.get(row.stored, row.stored)
        added = Text(f"+{row.adapted:,}", style="green") if row.adapted else Text("-", style="dim")
        table.add_row(row.pattern, shape, str(row.count), f"{row.parameters:,}", how, size(row.bytes), added)
    left = rows[MODULES_SHOWN:]
    if left:
        table.add_row(f"{len(left)} other kinds", "", str(sum(r.count for r in left)), f"{sum(r.parameters for r in left):,}", "", "", "")
    console.print(table)


def _memory(console: Console, estimate: Estimate, memory: int | None, measured: str) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"peak memory ({measured})", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("how it comes about", overflow="fold")
    against = memory or estimate.total
    for component in estimate.components:
        table.add_row(component.name, size(component.bytes), _bar(component.bytes / against), Text(component.how, style="dim"))
    table.add_row(Text("together", style="bold"), Text(size(estimate.total), style="bold"), _bar(estimate.total / against, memory), "")
    if memory:
        left = f"{1 - HEADROOM:.0%} for context, fragments"
        table.add_row("may be used", size(int(HEADROOM * memory)), "", Text(f"of {size(memory)}: {left}", style="dim"))
    console.print(table)


def _bar(share: float, memory: int | None = None) -> Text:
    filled = min(BAR, round(share * BAR))
    colour = "red" if memory and share > HEADROOM else "green" if memory else "blue"
    return Text("█" * filled, style=colour) + Text("·" * (BAR - filled), style="dim")


def size(count: int) -> str:
    """In GiB, or in smaller units where that would be 0.0."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor / (10 if unit == "GiB" else 1):
            return f"{count / factor:.2f} {unit}" if unit == "GiB" else f"{count / factor:.1f} {unit}"
    return f"{count} B"
