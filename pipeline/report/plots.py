"""The plots of the report as inline SVG. In: the points of `metrics.jsonl`. Out: SVG text.

matplotlib draws with placeholder colours, which are then replaced by the CSS variables of the page, so that one picture
works on light and dark pages.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipeline.report.timeline import Events, Points, series

# placeholder colours, all different
INK, MUTED, GRID, FAINT, GOOD, BAD = "#010001", "#010002", "#010003", "#010004", "#010005", "#010006"
COLORS = [f"#01001{number}" for number in range(6)]
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FAINT: "faint", GOOD: "good", BAD: "bad"}
VARIABLES |= {color: f"c{number}" for number, color in enumerate(COLORS)}
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "report",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": MUTED,
        "axes.titlelocation": "left",
        "axes.titlesize": 9,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "text.color": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "lines.solid_capstyle": "round",
    }
)
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # of the students after as many as there are colours
WIDTH_INCHES = 9.0
SHORT_RUN_HOURS = 2.0
NAMED_LANGUAGES = 3  # with the lowest and with the highest held-out losses
HEALTH = {
    "optimizer/learning_rate": "learning rate",
    "optimizer/gradient_norm": "gradient norm before clipping",
    "speed/data_wait_share": "share of the time spent waiting for data",
}

TIME_SHARES = {
    "speed/teacher_share": "teacher",
    "speed/student_share": "student",
    "speed/loss_share": "relation loss",
    "speed/optimizer_share": "optimizer",
    "speed/data_wait_share": "waiting for data",
}


def loss_curves(metrics: Points) -> str:
    """Total loss and its parts against the step."""
    tags = sorted({tag for point in metrics for tag in point if tag.startswith("loss/")} - {"loss/spike_sigmas"})
    if not tags:
        return ""
    figure, (axes,) = _figure(1, 3.1)
    colors = itertools.cycle(COLORS)
    for tag in sorted(tags, key=lambda tag: tag != "loss/total"):
        total = tag == "loss/total"
        color = INK if total else next(colors)
        _line(axes, series(metrics, tag), color, 2.0 if total else 1.4, tag.removeprefix("loss/"))
    _plain_log(axes)
    axes.set_xlabel("step")
    axes.legend(ncols=6, loc="lower left", bbox_to_anchor=(0, 1), labelcolor=INK, handlelength=1.2)
    return _svg(figure)


def heldout_curves(metrics: Points) -> str:
    """One thin line per language, with the lowest and highest languages named, and the mean on top."""
    tags = sorted({tag for point in metrics for tag in point if tag.startswith("heldout/")})
    if not tags:
        return ""
    figure, (axes,) = _figure(1, 3.3)
    last = {tag: points[-1] for tag in tags if (points := series(metrics, tag)) and tag != "heldout/mean"}
    order = sorted(last, key=lambda tag: last[tag][1])
    named = dict(zip([*order[:NAMED_LANGUAGES], *order[NAMED_LANGUAGES:][-NAMED_LANGUAGES:]], COLORS, strict=False))
    for tag in order:
        _line(axes, series(metrics, tag), named.get(tag, FAINT), 1.5 if tag in named else 0.8)
    _line(axes, series(metrics, "heldout/mean"), INK, 2.2, "mean of all languages")
    for tag, color in reversed(named.items()):
        _line(axes, [], color, 1.5, f"{tag.removeprefix('heldout/')} {last[tag][1]:.3f}")
    _plain_log(axes)
    axes.set_xlabel("step")
    axes.legend(ncols=7, loc="lower left", bbox_to_anchor=(0, 1), labelcolor=INK, handlelength=1.0, columnspacing=1.2)
    return _svg(figure)


def overlaid(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], is_log: bool = False) -> str:
    """One panel per measure, one curve per student; a student has one colour and dash in every panel.

    Args:
        panels: title -> name of the student -> its points; all panels have the same names
    """
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not panels:
        return ""
    figure, rows = _figure(len(panels), (3.1 if len(panels) == 1 else 2.0) * len(panels) + 0.3)
    for axes, (title, curves) in zip(rows, panels.items(), strict=True):
        for number, (name, points) in enumerate(curves.items()):
            dash = DASHES[number // len(COLORS) % len(DASHES)]
            _line(axes, points, COLORS[number % len(COLORS)], 1.6, name)
            axes.lines[-1].set_linestyle(dash)
        if is_log:
            _plain_log(axes)
        else:
            axes.set_ylim(bottom=0)
        if len(panels) > 1:
            axes.set_title(title)
    rows[-1].set_xlabel("step")
    figure.legend(
        *rows[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, labelcolor=INK, handlelength=1.8
    )
    return _svg(figure)


def throughput(metrics: Points, events: Events) -> str:
    """Tokens per second against the step, with checkpoints and restarts."""
    points = series(metrics, "speed/tokens_per_second")
    if not points:
        return ""
    figure, (axes,) = _figure(1, 2.2)
    _line(axes, points, COLORS[0], 1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    _mark(axes, events)
    axes.set_xlabel("step")
    return _svg(figure)


def time_shares(metrics: Points) -> str:
    """The parts of a step as shares of the training time, one above the other. What they leave is time between steps."""
    points = [point for point in metrics if TIME_SHARES.keys() <= point.keys()]
    if not points:
        return ""
    figure, (axes,) = _figure(1, 2.2)
    shares = [[point[tag] for point in points] for tag in TIME_SHARES]
    steps = [point["step"] for point in points]
    if len(points) == 1:  # an area needs two
        steps, shares = [0, *steps], [share * 2 for share in shares]
    axes.stackplot(steps, shares, labels=list(TIME_SHARES.values()), colors=COLORS, alpha=0.8)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, symbol=" %"))
    axes.set_xlabel("step")
    axes.legend(ncols=5, loc="lower left", bbox_to_anchor=(0, 1), labelcolor=INK, handlelength=1.0, handleheight=0.9)
    return _svg(figure)


def health(metrics: Points, events: Events) -> str:
    """Learning rate, gradient norm and waiting time, one above the other."""
    shown = {tag: title for tag, title in HEALTH.items() if series(metrics, tag)}
    if not shown:
        return ""
    figure, rows = _figure(len(shown), 1.5 * len(shown) + 0.3)
    for axes, (tag, title), color in zip(rows, shown.items(), COLORS, strict=False):
        _line(axes, series(metrics, tag), color, 1.5)
        axes.set_title(title)
        if tag == "speed/data_wait_share":
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, symbol=" %"))
        axes.set_ylim(bottom=0)
        _mark(axes, events)
    rows[-1].set_xlabel("step")
    return _svg(figure)


def time_line(events: Events) -> str:
    """Finished steps against time: one line per attempt, a dot per checkpoint, a dashed line per restart."""
    if not events.attempts:
        return ""
    unit, factor = ("minutes", 60.0) if events.attempts[-1].progress[-1][0] < SHORT_RUN_HOURS else ("hours", 1.0)
    figure, (axes,) = _figure(1, 2.2)
    for attempt in events.attempts:
        axes.plot(*_scaled(attempt.progress, factor), color=COLORS[0], linewidth=2)
    for attempt in events.attempts[1:]:
        axes.axvline(attempt.progress[0][0] * factor, color=BAD, linewidth=1, linestyle=(0, (4, 3)))
    if events.saved:
        axes.plot(*_scaled(events.saved, factor), "o", color=GOOD, markersize=5)
    axes.set_xlabel(f"{unit} since the first start")
    axes.set_ylabel("step")
    axes.set_ylim(bottom=0)
    return _svg(figure)


def _scaled(points: Sequence[tuple[float, int]], factor: float) -> tuple[list[float], list[int]]:
    return [hours * factor for hours, _ in points], [step for _, step in points]


def retrieval_bars(results: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Mean accuracy per pooling, one bar per model."""
    figure, (axes,) = _figure(1, 2.2)
    colors = dict(zip(results, (FAINT, COLORS[1], COLORS[0]) if len(results) > 2 else (FAINT, COLORS[0]), strict=False))
    for offset, (stage, result) in enumerate(results.items()):
        places = [index + 0.27 * (offset - (len(results) - 1) / 2) for index in range(len(names))]
        bars = axes.bar(places, [result["mean"][pooling] for pooling in names], 0.25, label=stage, color=colors[stage])
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 1.08)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), labelcolor=INK, handlelength=1.0, handleheight=0.9)
    return _svg(figure)


def _mark(axes: Any, events: Events) -> None:
    """Mark the steps at which checkpoints were written and the run was restarted."""
    for step in events.saved_steps:
        axes.axvline(step, color=GOOD, alpha=0.45, linewidth=1, zorder=0.5)
    for step in events.restarts:
        axes.axvline(step, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=0.6)


def _plain_log(axes: Any) -> None:
    """A logarithmic axis with labels such as 0.5 and 2."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(visible=False, axis="y", which="minor")


def _figure(rows: int, height_inches: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0])
    for axis in axes:
        axis.grid(visible=False, axis="x")
    return figure, axes


def _line(axes: Any, points: Sequence[tuple[int, float]], color: str, width: float, label: str | None = None) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "." if 0 < len(points) < 3 else ""
    axes.plot(steps, values, label=label, marker=marker, color=color, linewidth=width)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r"#01\d{4}", lambda match: f"var(--{VARIABLES[match[0]]})", svg)
