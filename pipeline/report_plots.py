"""The report's plots as inline SVG. In: the points of `metrics.jsonl`. Out: SVG text. Used by report.py alone."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams.update({"svg.hashsalt": "report", "svg.fonttype": "none", "font.size": 9, "axes.grid": True})
matplotlib.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
WIDTH_INCHES = 9.0
GAP_IN_INTERVALS = 10  # a pause this many times the usual one between two lines is a restart

Points = list[dict[str, Any]]


def series(metrics: Points, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every point that has the tag."""
    return [(point["step"], point[tag]) for point in metrics if tag in point]


def loss_curves(metrics: Points) -> str:
    """Total loss and its parts against the step."""
    tags = sorted({tag for point in metrics for tag in point if tag.startswith("loss/")})
    if not tags:
        return ""
    figure, (axes,) = _figure(1, 3.4)
    for tag in sorted(tags, key=lambda tag: tag != "loss/total"):
        _line(axes, series(metrics, tag), tag.removeprefix("loss/"), bold=tag == "loss/total")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend(ncols=4)
    return _svg(figure)


def heldout_curves(metrics: Points) -> str:
    """One thin line per language, the mean on top."""
    tags = sorted({tag for point in metrics for tag in point if tag.startswith("heldout/")})
    if not tags:
        return ""
    figure, (axes,) = _figure(1, 3.4)
    for tag in tags:
        if tag != "heldout/mean":
            _line(axes, series(metrics, tag), None, bold=False)
    _line(axes, series(metrics, "heldout/mean"), "mean of all languages", bold=True)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend()
    return _svg(figure)


def speed_and_health(metrics: Points, checkpoints: Sequence[int]) -> str:
    """Throughput with checkpoints and restarts, share of waiting, learning rate, gradient norm."""
    figure, axes = _figure(4, 6.4)
    for axis, tag in zip(
        axes,
        (
            "speed/tokens_per_second",
            "speed/data_wait_share",
            "optimizer/learning_rate",
            "optimizer/gradient_norm",
        ),
        strict=True,
    ):
        _line(axis, series(metrics, tag), None, bold=False)
        axis.set_ylabel(tag.partition("/")[2].replace("_", " "), rotation=0, ha="right")
    for step in checkpoints:
        axes[0].axvline(step, color="tab:green", alpha=0.5, linewidth=1)
    for step in restarts(metrics):
        for axis in axes:
            axis.axvline(step, color="tab:red", alpha=0.6, linestyle="--", linewidth=1)
    axes[0].set_title("green: a checkpoint that is on disk; red, dashed: a pause or restart", fontsize=9)
    axes[-1].set_xlabel("step")
    return _svg(figure)


def restarts(metrics: Points) -> list[int]:
    """Steps after which nothing was reported for much longer than usual: the run was down, or saving for very long."""
    lines = [point for point in metrics if "loss/total" in point]
    gaps = [(after["time_s"] - before["time_s"], before["step"]) for before, after in itertools.pairwise(lines)]
    if not gaps:
        return []
    usual = sorted(gap for gap, _ in gaps)[len(gaps) // 2]
    return [step for gap, step in gaps if gap > GAP_IN_INTERVALS * usual]


def retrieval_bars(results: dict[str, dict[str, Any]]) -> str:
    """Mean accuracy per pooling, one bar per model."""
    figure, (axes,) = _figure(1, 2.4)
    poolings = list(next(iter(results.values()))["mean"])
    for offset, (name, result) in enumerate(results.items()):
        positions = [index + 0.27 * (offset - (len(results) - 1) / 2) for index in range(len(poolings))]
        bars = axes.bar(positions, [result["mean"][pooling] for pooling in poolings], width=0.25, label=name)
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(poolings)), poolings)
    axes.set_ylim(0, 1.12)
    axes.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, 1.25))
    return _svg(figure)


def _figure(rows: int, height_inches: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0])


def _line(axes: Any, points: list[tuple[int, float]], label: str | None, bold: bool) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    style: dict[str, Any] = {"color": "black", "linewidth": 2} if bold else {"linewidth": 1}
    axes.plot(steps, values, label=label, marker="." if len(points) < 3 else "", **style)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
