"""How a chart of the report is drawn: style, colours, legend, and one picture each for wide pages and for phones.

In: a function that draws with matplotlib. Out: HTML with two inline SVGs, of which the style sheet shows the one that fits.
matplotlib draws with placeholder colours, which become the CSS variables of the page: a picture is right on light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# placeholder colours, all different
INK, MUTED, GRID, FAINT, GOOD, BAD = "#010001", "#010002", "#010003", "#010004", "#010005", "#010006"
COLORS = [f"#01001{number}" for number in range(6)]
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FAINT: "faint", GOOD: "good", BAD: "bad"}
VARIABLES |= {color: f"c{number}" for number, color in enumerate(COLORS)}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # of the curves after as many as there are colours
CSS_DASHES = ("solid", "dashed", "dotted")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.labelsize": "medium",
    "xtick.labelsize": "medium",
    "ytick.labelsize": "medium",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Size:
    """One of the two pictures of a chart. Its text has `font_points` and never less than 11 px where page.css shows it."""

    name: str
    width_inches: float
    font_points: float


WIDE = Size("wide", 8.0, 9.0)  # shown from 800 px on: 704 px for 576 points, so that 9 points are 11 px
NARROW = Size("narrow", 3.75, 11.5)  # 272 px for 270 points on a page of 320 px


@dataclass(frozen=True)
class Key:
    """One entry of a legend. `dash`: index into `DASHES`."""

    label: str
    color: str
    dash: int = 0
    is_area: bool = False

    def html(self) -> str:
        color = f"var(--{VARIABLES[self.color]})"
        mark = f"background:{color}" if self.is_area else f"border-top:3px {CSS_DASHES[self.dash]} {color}"
        kind = "area" if self.is_area else "line"
        return f'<li><i class="{kind}" style="{mark}"></i>{html.escape(self.label)}</li>'


def chart(draw: Callable[[Size], Figure], keys: Iterable[Key] = ()) -> str:
    """The legend, then the picture of every size. The legend is HTML, so that it wraps and its text keeps its size."""
    entries = "".join(key.html() for key in keys)
    pictures = []
    for size in (WIDE, NARROW):
        # other identifiers in each picture: a reference must not lead into the one that is hidden
        style = {**STYLE, "font.size": size.font_points, "svg.hashsalt": f"report {size.name}"}
        with matplotlib.rc_context(style):
            pictures.append(f'<div class="{size.name}">{_svg(draw(size))}</div>')
    return (f'<ul class="legend">{entries}</ul>' if entries else "") + "".join(pictures)


def new_figure(size: Size, rows: int, height_inches: float) -> tuple[Figure, list[Any]]:
    """A figure with axes one above the other, which share the x axis. `height_inches` is that of the wide picture."""
    height = height_inches if size is WIDE else 0.4 * rows + 0.75 * height_inches
    figure = Figure(figsize=(size.width_inches, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0])
    for axis in axes:
        axis.grid(visible=False, axis="x")
    return figure, axes


def plot_line(axes: Any, points: Sequence[tuple[int, float]], color: str, width: float, dash: int = 0) -> None:
    """A curve of (step, value); fewer than three points are dots too."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "." if 0 < len(points) < 3 else ""
    axes.plot(steps, values, marker=marker, color=color, linewidth=width, linestyle=DASHES[dash])


def log_axis(axes: Any) -> None:
    """A logarithmic axis with labels such as 0.5 and 2."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(visible=False, axis="y", which="minor")


def percent_axis(axes: Any) -> None:
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, symbol=" %"))


def thousands_axis(axes: Any) -> None:
    """Labels such as 1,500 and, of large figures, 1.5M, which leave room on a phone."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value:,.0f}")


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r"#01\d{4}", lambda match: f"var(--{VARIABLES[match[0]]})", svg)
