"""Small charts as inline SVG: matplotlib draws them, and the page's style sheet colours them, for light, dark and paper.

    svg = lines([Series("loss", steps, losses, "adapter")], label="loss")

An SVG made here has no style attribute, no script and no link, so that it stands in a page with a strict Content-Security-Policy.
"""

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "line": "#010205",
    "base": "#010206",
    "adapter": "#010207",
    "good": "#010208",
    "bad": "#010209",
    "warm": "#01020a",
    "violet": "#01020b",
}
"""Stand-ins that nothing else has; each becomes the page's var(--NAME)."""
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora-suite",
    "text.parse_math": False,  # a run may be named $x
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.6,
    "grid.color": COLOURS["line"],
    "axes.edgecolor": COLOURS["line"],
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "axes.axisbelow": True,
}
MOST_POINTS = 400
"""Of a line; what is longer is drawn as means of so many stretches."""
WIDTH, HEIGHT = 4.3, 2.05
"""Inches; a page scales it."""


@dataclass(frozen=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    """None leaves a gap."""
    colour: str = "adapter"
    points: bool = False
    """Few and exact: drawn as points on the line."""
    faint: bool = False


def lines(series: Sequence[Series], label: str, percent: bool = False, from_zero: bool = False, width: float = 3.6) -> Markup:
    """Curves over the steps. `label` is read to those who do not see it."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(width * 0.51, width)
        for one in series:
            x, y = _thinned(one)
            style = {"marker": "o", "markersize": 3.2} if one.points else {}
            axes.plot(x, y, color=COLOURS[one.colour], linewidth=1.0 if one.faint else 1.6, alpha=0.55 if one.faint else 1.0, **style)
        axes.set_xlabel("step", loc="right", fontsize=7.5, labelpad=3)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if percent:
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        else:
            _plain_numbers(axes)
            if from_zero:
                axes.set_ylim(bottom=0)
        return _svg(figure, label)


def histogram(values: Sequence[float], label: str, unit: str, more_is_better: bool = False) -> Markup:
    """How many differences of which size: those below zero, where less is better, in one colour, those above in another."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(HEIGHT)
        # a few conversations of three words differ by much; the last bar of either side holds what lies beyond
        reach = max(1e-9, float(np.percentile(np.abs(values), 97)))
        edges = np.linspace(-reach, reach, 41)
        counts, _ = np.histogram(np.clip(values, -reach, reach), edges)
        colours = [COLOURS["good" if ((a + b) / 2 < 0) != more_is_better else "bad"] for a, b in pairwise(edges)]
        axes.bar((edges[1:] + edges[:-1]) / 2, counts, width=(edges[1] - edges[0]) * 0.86, color=colours)
        axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
        axes.set_xlabel(unit, loc="right", fontsize=7.5, labelpad=3)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, label)


def strips(rows: Sequence[tuple[str, Sequence[float], str]], label: str, unit: str, mark: float | None = None) -> Markup:
    """A row of points for each (name, values, colour): all values of a small sample, and a line at `mark`."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(0.62 + 0.3 * len(rows))
        axes.grid(visible=False)
        for place, (_, values, colour) in enumerate(reversed(rows)):
            axes.axhline(place, color=COLOURS["line"], linewidth=0.6)
            axes.plot(values, [place] * len(values), "o", color=COLOURS[colour], markersize=4.4, alpha=0.6, markeredgewidth=0)
        if mark is not None:
            axes.axvline(mark, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_yticks(range(len(rows)), [_short(name) for name, _, _ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit, loc="right", fontsize=7.5, labelpad=3)
        return _svg(figure, label)


@dataclass(frozen=True)
class Interval:
    name: str
    centre: float
    low: float | None = None
    high: float | None = None
    dots: Sequence[float] = ()
    """The single values behind the centre."""
    colour: str = "adapter"


def intervals(rows: Sequence[Interval], label: str, unit: str, mark: float | None = None, width: float = WIDTH) -> Markup:
    """A line for each row with its centre, its interval and its single values."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(0.6 + 0.3 * len(rows), width)
        axes.grid(visible=False)
        for place, row in enumerate(reversed(rows)):
            colour = COLOURS[row.colour]
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.6, alpha=0.45, solid_capstyle="round")
            if row.dots:
                axes.plot(row.dots, [place] * len(row.dots), "o", color=colour, markersize=3.4, alpha=0.5, markeredgewidth=0)
            axes.plot(
                [row.centre], [place], "o" if not row.dots else "|", color=colour, markersize=5 if not row.dots else 11, markeredgewidth=1.6
            )
        if mark is not None:
            axes.axvline(mark, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel(unit, loc="right", fontsize=7.5, labelpad=3)
        return _svg(figure, label)


def _short(name: str, most: int = 28) -> str:
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)  # XML holds no control characters
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    return figure, figure.subplots()


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    formatter = ScalarFormatter(useOffset=False, useMathText=False)
    formatter.set_powerlimits((-3, 6))
    axes.yaxis.set_major_formatter(formatter)


def _thinned(one: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(one.x, float), np.asarray([np.nan if v is None else v for v in one.y], float)
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    # a stretch without a number is a gap; nanmean would warn of it
    means = [np.mean(found) if len(found := y[part][~np.isnan(y[part])]) else np.nan for part in parts]
    return np.array([x[part].mean() for part in parts]), np.array(means)


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an <svg> element whose colours are the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(recoloured(buffer.getvalue(), label))  # noqa: S704  texts in it were escaped by matplotlib and are again here


def recoloured(svg: str, label: str) -> str:
    """matplotlib's SVG without header, style attributes and fixed size. Its ids are made unlike those of the page's other charts."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)  # noqa: S314  matplotlib's own, no foreign document
    prefix = f"c{zlib.crc32(svg.encode()):x}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        for name, value in _presentation(element.attrib.pop("style", "")).items():
            element.set(name, value)
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, prefix + value)
            elif name.endswith("href"):
                element.set(name, f"#{prefix}{value.removeprefix('#')}")
            elif value.startswith("url(#"):
                element.set(name, f"url(#{prefix}{value.removeprefix('url(#')}")
            else:
                element.set(name, _coloured(value))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _presentation(style: str) -> dict[str, str]:
    """`fill: #010203; font: 8px 'X'` -> attributes; the font's family is left to the page."""
    found = {}
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            found["font-size"] = re.search(r"([\d.]+)px", value).group(1)
        elif name not in ("font-family", "font-weight", "font-style", "font-stretch", "font-variant"):
            found[name] = value
    return found


def _coloured(value: str) -> str:
    return next((f"var(--{name})" for name, stand_in in COLOURS.items() if value == stand_in), value)


def legend(*entries: tuple[str, str]) -> Markup:
    """(colour, name) pairs as they stand under a chart."""
    return Markup(" ").join(Markup('<span class="key {}">{}</span>').format(escape(colour), escape(name)) for colour, name in entries)
