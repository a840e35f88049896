"""What an evaluation task is, and where the list of tasks comes from.

A task is one module in this package or in `finetuning/` that defines `TASK`. The command line, the figures in
`evaluation.json`, the plots and the model card are made from it, so a new module is a new task.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pipeline.evaluation

NAME_LENGTH = 40  # characters of a model's name in a plot
Results = dict[str, dict[str, Any]]  # name of the model -> its figures, as in evaluation.json


@dataclass(frozen=True)
class Panel:
    """One bar chart. `values`: name of the model -> label on the x axis -> height of the bar."""

    title: str
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class OnHub:
    """What a model hub calls a task.

    Attributes:
        kind: the hub's task
        name: of what is measured, for readers
        metrics: measure in `mean` of the figures -> the hub's metric
    """

    kind: str
    name: str
    metrics: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """One evaluation task.

    Attributes:
        name: what `--tasks` accepts, and the section of its settings: `--set NAME.KEY=VALUE`
        settings: dataclass of the settings
        evaluate: called with the encoders, the settings, the `Launch` and a directory for the task's own files
        table: the results as text for the console
        panels: the results as bar charts
        card: the results as Markdown for the model card, without a heading
        on_hub: for the metadata of the model card; None: the figures are not in it
        check: reads the input before any model is loaded; raises `UserError`
        options: setting -> (metavar, help) of settings that also have a command line option `--SETTING`
        shared: whether all ranks call `evaluate` together; otherwise rank 0 calls it alone
        place: position among the tasks; tasks with a smaller number come first
    """

    name: str
    settings: type
    evaluate: Callable[..., Results]
    table: Callable[[Results], str]
    panels: Callable[[Results], list[Panel]]
    card: Callable[[Results], str]
    on_hub: OnHub | None = None
    check: Callable[[Any], object] = lambda settings: None
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    shared: bool = False
    place: int = 100


@functools.cache
def tasks() -> dict[str, Task]:
    """All tasks by name, in the order of their places."""
    modules = pkgutil.walk_packages(pipeline.evaluation.__path__, "pipeline.evaluation.")
    found = [getattr(importlib.import_module(module.name), "TASK", None) for module in modules]
    return {task.name: task for task in sorted(filter(None, found), key=lambda task: (task.place, task.name))}
