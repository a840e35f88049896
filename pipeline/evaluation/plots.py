"""One picture of an evaluation: a panel of bars per task and measure, the models side by side in each.

In: the `tasks` of evaluation.json. Out: a PNG beside it. Used by `pipeline evaluate` after the last task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Results = dict[str, dict[str, Any]]
PANEL_INCHES = 2.6
INCHES_PER_GROUP = 0.55  # a group is the bars of all models at one place of the axis
NAME_LENGTH = 40


@dataclass(frozen=True)
class Panel:
    """`values`: model -> label on the axis -> height."""

    title: str
    values: dict[str, dict[str, float]]


def draw(tasks: dict[str, Results], path: Path) -> None:
    """Write the picture."""
    picture_of(tasks).savefig(path, dpi=120, metadata={"Software": None})


def picture_of(tasks: dict[str, Results]) -> Figure:
    """One panel below the other, in the tasks' order."""
    panels = [panel for task, results in tasks.items() for panel in PANELS[task](results)]
    groups = max(len(next(iter(panel.values.values()))) for panel in panels)
    models = len(panels[0].values)
    width = max(7.0, groups * max(INCHES_PER_GROUP, 0.25 * models))
    figure = Figure(figsize=(width, PANEL_INCHES * len(panels) + 0.5), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _bars(axes, panel)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False)
    return figure


def _bars(axes: Any, panel: Panel) -> None:
    """Missing values leave a gap."""
    labels = list(dict.fromkeys(label for values in panel.values.values() for label in values))
    share = 0.8 / len(panel.values)
    for number, (model, values) in enumerate(panel.values.items()):
        places = [place + share * (number - (len(panel.values) - 1) / 2) for place in range(len(labels))]
        heights = [values.get(label, float("nan")) for label in labels]
        axes.bar(places, heights, width=share, label=model[-NAME_LENGTH:])
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=90 if max(map(len, labels)) > 8 else 0)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _heldout(results: Results) -> list[Panel]:
    values = {model: {**result["per_language"], "mean": result["mean"]} for model, result in results.items()}
    return [Panel("held-out relation loss (lower is better)", values)]


def _retrieval(results: Results) -> list[Panel]:
    panels = []
    for pooling in next(iter(results.values()))["mean"]:
        values = {
            model: {
                **{x: pair[pooling]["mean"] for x, pair in result["per_pair"].items()},
                "mean": result["mean"][pooling],
            }
            for model, result in results.items()
        }
        panels.append(Panel(f"retrieval accuracy, pooled from {pooling}", values))
    return panels


def _sts(results: Results) -> list[Panel]:
    values = {
        model: {
            f"{Path(file).stem}: {pooling}": figure
            for file, poolings in {**result["per_file"], "mean": result["mean"]}.items()
            for pooling, figure in poolings.items()
        }
        for model, result in results.items()
    }
    return [Panel("semantic textual similarity, Spearman correlation", values)]


def _xnli(results: Results) -> list[Panel]:
    return [
        Panel(
            "XNLI accuracy in per cent, zero-shot but for the language of training", _by_language(results, "accuracy")
        )
    ]


def _mlqa(results: Results) -> list[Panel]:
    titles = {"f1": "F1", "exact_match": "exact match"}
    return [Panel(f"MLQA, {title} in per cent", _by_language(results, key)) for key, title in titles.items()]


def _by_language(results: Results, measure: str) -> dict[str, dict[str, float]]:
    return {
        model: {**{x: scores[measure] for x, scores in result["test"].items()}, "average": result["mean"][measure]}
        for model, result in results.items()
    }


def _speed(results: Results) -> list[Panel]:
    first = next(iter(results))
    return [
        Panel(f"sentences per second, times {first[-NAME_LENGTH:]}", {m: r["times_first"] for m, r in results.items()}),
        Panel("megabytes of weights", {model: {"": result["megabytes"]} for model, result in results.items()}),
    ]


PANELS: dict[str, Callable[[Results], list[Panel]]] = {
    "heldout": _heldout,
    "retrieval": _retrieval,
    "sts": _sts,
    "xnli": _xnli,
    "mlqa": _mlqa,
    "speed": _speed,
}
