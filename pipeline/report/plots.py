"""The plots of the report as inline SVG. In: the points of `metrics.jsonl`. Out: HTML with a legend and the pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from pipeline.comparison.students import LOSS
from pipeline.report.charts import (
    BAD,
    COLORS,
    DASHES,
    FAINT,
    GOOD,
    INK,
    WIDE,
    Key,
    Size,
    chart,
    log_axis,
    new_figure,
    percent_axis,
    plot_line,
    thousands_axis,
)
from pipeline.report.loss_parts import Part
from pipeline.report.timeline import Events, Points, series

SHORT_RUN_HOURS = 2.0
NAMED_LANGUAGES = 3  # with the lowest and with the highest held-out losses
WAITING = "speed/data_wait_share"
HEALTH = {
    "optimizer/learning_rate": "learning rate",
    "optimizer/gradient_norm": "gradient norm before clipping",
    WAITING: "share of the time spent waiting for data",
}
TIME_SHARES = {
    "speed/teacher_share": "teacher",
    "speed/student_share": "student",
    "speed/loss_share": "relation loss",
    "speed/optimizer_share": "optimizer",
    WAITING: "waiting for data",
}


def loss_curves(metrics: Points, parts: Sequence[Part]) -> str:
    """Total loss and its parts, each times its weight, against the step."""
    curves = [(part.label, part.weighted(metrics)) for part in parts]
    total = series(metrics, LOSS)
    if not total and not curves:
        return ""
    colors = list(itertools.islice(itertools.cycle(COLORS), len(curves)))
    dashes = [number // len(COLORS) % len(DASHES) for number in range(len(curves))]

    def draw(size: Size) -> Figure:
        figure, (axes,) = new_figure(size, 1, 3.1)
        plot_line(axes, total, INK, 2.0)
        for (_, points), color, dash in zip(curves, colors, dashes, strict=True):
            plot_line(axes, points, color, 1.4, dash)
        log_axis(axes)
        axes.set_xlabel("step")
        return figure

    keys = [Key(label, color, dash) for (label, _), color, dash in zip(curves, colors, dashes, strict=True)]
    return chart(draw, [Key("total", INK), *keys])


def heldout_curves(metrics: Points) -> str:
    """One thin line per language, with the lowest and highest languages named, and the mean on top."""
    tags = sorted({tag for point in metrics for tag in point if tag.startswith("heldout/")})
    if not tags:
        return ""
    last = {tag: points[-1] for tag in tags if (points := series(metrics, tag)) and tag != "heldout/mean"}
    order = sorted(last, key=lambda tag: last[tag][1])
    named = dict(zip([*order[:NAMED_LANGUAGES], *order[NAMED_LANGUAGES:][-NAMED_LANGUAGES:]], COLORS, strict=False))

    def draw(size: Size) -> Figure:
        figure, (axes,) = new_figure(size, 1, 3.3)
        for tag in order:
            plot_line(axes, series(metrics, tag), named.get(tag, FAINT), 1.5 if tag in named else 0.8)
        plot_line(axes, series(metrics, "heldout/mean"), INK, 2.2)
        log_axis(axes)
        axes.set_xlabel("step")
        return figure

    languages = [
        Key(f"{tag.removeprefix('heldout/')} {last[tag][1]:.3f}", color) for tag, color in reversed(named.items())
    ]
    return chart(draw, [Key("mean of all languages", INK), *languages])


def overlaid(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], is_log: bool = False) -> str:
    """One panel per measure, one curve per student; a student has one colour and dash in every panel.

    Args:
        panels: title -> name of the student -> its points; all panels have the same names
    """
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not panels:
        return ""
    names = next(iter(panels.values()))
    keys = [
        Key(name, COLORS[number % len(COLORS)], number // len(COLORS) % len(DASHES))
        for number, name in enumerate(names)
    ]

    def draw(size: Size) -> Figure:
        figure, rows = new_figure(size, len(panels), (3.1 if len(panels) == 1 else 2.0) * len(panels) + 0.3)
        for axes, (title, curves) in zip(rows, panels.items(), strict=True):
            for key in keys:
                plot_line(axes, curves[key.label], key.color, 1.6, key.dash)
            if is_log:
                log_axis(axes)
            else:
                axes.set_ylim(bottom=0)
            if max((value for points in curves.values() for _, value in points), default=0) >= 1000:
                thousands_axis(axes)
            if len(panels) > 1:
                axes.set_title(title)
        rows[-1].set_xlabel("step")
        return figure

    return chart(draw, keys)


def throughput(metrics: Points, events: Events) -> str:
    """Tokens per second against the step, with checkpoints and restarts."""
    points = series(metrics, "speed/tokens_per_second")
    if not points:
        return ""

    def draw(size: Size) -> Figure:
        figure, (axes,) = new_figure(size, 1, 2.2)
        plot_line(axes, points, COLORS[0], 1.6)
        axes.set_ylim(bottom=0)
        thousands_axis(axes)
        _mark(axes, events)
        axes.set_xlabel("step")
        return figure

    return chart(draw)


def time_shares(metrics: Points) -> str:
    """The parts of a step as shares of the training time, one above the other. What they leave is time between steps."""
    points = [point for point in metrics if TIME_SHARES.keys() <= point.keys()]
    if not points:
        return ""
    shares = [[point[tag] for point in points] for tag in TIME_SHARES]
    steps = [point["step"] for point in points]
    if len(points) == 1:  # an area needs two
        steps, shares = [0, *steps], [share * 2 for share in shares]

    def draw(size: Size) -> Figure:
        figure, (axes,) = new_figure(size, 1, 2.2)
        axes.stackplot(steps, shares, colors=COLORS, alpha=0.8)
        axes.set_ylim(0, 1)
        percent_axis(axes)
        axes.set_xlabel("step")
        return figure

    return chart(
        draw, [Key(title, color, is_area=True) for title, color in zip(TIME_SHARES.values(), COLORS, strict=False)]
    )


def health(metrics: Points, events: Events) -> str:
    """Learning rate, gradient norm and waiting time, one above the other."""
    shown = {tag: title for tag, title in HEALTH.items() if series(metrics, tag)}
    if not shown:
        return ""

    def draw(size: Size) -> Figure:
        figure, rows = new_figure(size, len(shown), 1.5 * len(shown) + 0.3)
        for axes, (tag, title), color in zip(rows, shown.items(), COLORS, strict=False):
            plot_line(axes, series(metrics, tag), color, 1.5)
            axes.set_title(title)
            if tag == WAITING:
                percent_axis(axes)
            axes.set_ylim(bottom=0)
            _mark(axes, events)
        rows[-1].set_xlabel("step")
        return figure

    return chart(draw)


def time_line(events: Events) -> str:
    """Finished steps against time: one line per attempt, a dot per checkpoint, a dashed line per restart."""
    if not events.attempts:
        return ""
    unit, factor = ("minutes", 60.0) if events.attempts[-1].progress[-1][0] < SHORT_RUN_HOURS else ("hours", 1.0)

    def draw(size: Size) -> Figure:
        figure, (axes,) = new_figure(size, 1, 2.2)
        for attempt in events.attempts:
            axes.plot(*_scaled(attempt.progress, factor), color=COLORS[0], linewidth=2)
        for attempt in events.attempts[1:]:
            axes.axvline(attempt.progress[0][0] * factor, color=BAD, linewidth=1, linestyle=(0, (4, 3)))
        if events.saved:
            axes.plot(*_scaled(events.saved, factor), "o", color=GOOD, markersize=5)
        axes.set_xlabel(f"{unit} since the first start")
        axes.set_ylabel("step")
        axes.set_ylim(bottom=0)
        thousands_axis(axes)
        return figure

    return chart(draw)


def _scaled(points: Sequence[tuple[float, int]], factor: float) -> tuple[list[float], list[int]]:
    return [hours * factor for hours, _ in points], [step for _, step in points]


def retrieval_bars(results: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Mean accuracy per pooling, one bar per model."""
    colors = dict(zip(results, (FAINT, COLORS[1], COLORS[0]) if len(results) > 2 else (FAINT, COLORS[0]), strict=False))

    def draw(size: Size) -> Figure:
        figure, (axes,) = new_figure(size, 1, 2.2)
        for offset, (stage, result) in enumerate(results.items()):
            places = [index + 0.27 * (offset - (len(results) - 1) / 2) for index in range(len(names))]
            bars = axes.bar(places, [result["mean"][pooling] for pooling in names], 0.25, color=colors[stage])
            axes.bar_label(bars, fmt="%.3f" if size is WIDE else _short_share, fontsize=size.font_points, padding=2)
        axes.set_xticks(range(len(names)), [_on_lines(name, size) for name in names.values()])
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 1.08)
        return figure

    return chart(draw, [Key(stage, color, is_area=True) for stage, color in colors.items()])


def _short_share(value: float) -> str:
    """ ".73": a bar on a phone is narrower than four characters."""
    return f"{value:.2f}".removeprefix("0")


def _on_lines(name: str, size: Size) -> str:
    """A name below a group of bars: on a phone two words to a line."""
    words = name.split()
    pairs = [" ".join(words[start : start + 2]) for start in range(0, len(words), 2)]
    return name if size is WIDE else "\n".join(pairs)


def _mark(axes: Any, events: Events) -> None:
    """Mark the steps at which checkpoints were written and the run was restarted."""
    for step in events.saved_steps:
        axes.axvline(step, color=GOOD, alpha=0.45, linewidth=1, zorder=0.5)
    for step in events.restarts:
        axes.axvline(step, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=0.6)
