"""The bars of benchmarks/throughput.py: real tokens a second of each arm, with the spread of the rounds."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

OURS, OTHERS, INK, MUTED = "#2f6f4e", "#a9b4bd", "#1f2933", "#66727d"
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "qlora-suite", "font.family": "sans-serif", "font.size": 9.5, "text.parse_math": False}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the bars to a .svg or .png file: one for each arm, its rounds as points, and how ours compares in the same rounds."""
    arms = {name: arm for name, arm in results["arms"].items() if "tokens_per_second" in arm}
    names, most = list(arms), max(arm["tokens_per_second"]["largest"] for arm in arms.values())
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(7.6, 1.25 + 0.38 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for place, arm in enumerate(arms.values()):
            rate = arm["tokens_per_second"]
            # a ladder's arms are all ours: the whole version stands out
            axes.barh(place, rate["median"], height=0.62, color=OURS if place == 0 else OTHERS)
            axes.plot([rate["smallest"], rate["largest"]], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
            for end in ("smallest", "largest"):
                axes.plot([rate[end]] * 2, [place - 0.13, place + 0.13], color=INK, linewidth=1.1)
            words = f"{rate['median']:,.0f}"
            if ratio := arm.get("ours_to_this"):
                words += f"   {names[0]}: {ratio['median']:.2f} x"
            axes.annotate(words, (rate["largest"], place), xytext=(6, 0), textcoords="offset points", va="center", color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, most * 1.3)  # room for the words behind the longest bar
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("real tokens a second; line: smallest and largest round", color=MUTED)
        axes.tick_params(length=0, colors=INK)
        axes.tick_params(axis="x", colors=MUTED)
        axes.grid(axis="x", color="#e3e7ea", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        machine, rounds = results["hardware"], max(len(arm["seconds"]) for arm in arms.values())
        title = f"{results['precision']['name']}, {machine['processor']}, {machine['device']}"
        axes.set_title(f"{title}; {rounds} round{'s'[: rounds != 1]}, {results['date'][:10]}", loc="left", color=INK, fontsize=9.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
