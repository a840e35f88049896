"""Draws the figures of an evaluation: one panel of bars per task and measure, with the models next to each other.

In: the `tasks` of evaluation.json. Out: a PNG file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.evaluation.task import NAME_LENGTH, Panel, Results, tasks

PANEL_INCHES = 2.6
INCHES_PER_GROUP = 0.55  # a group is the bars of all models at one label of the x axis


def draw(results_by_task: dict[str, Results], path: Path) -> None:
    """Write the picture."""
    picture_of(results_by_task).savefig(path, dpi=120, metadata={"Software": None})


def picture_of(results_by_task: dict[str, Results]) -> Figure:
    """The panels of all tasks, one below the other."""
    panels = [panel for name, results in results_by_task.items() for panel in tasks()[name].panels(results)]
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
    """Draw one panel. A missing value leaves a gap."""
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
