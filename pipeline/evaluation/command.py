"""The options of `pipeline evaluate`, and the run of every task on every model. The command itself: export/evaluate.py.

In: names of models and tasks, settings of the tasks. Out: tables on the console, `evaluation.json` and `evaluation.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data_prep.command_line import end_lines
from data_prep.outputs import output_path
from data_prep.ownership import own, sibling_lock
from pipeline.config import apply_override, build_section
from pipeline.errors import UserError
from pipeline.evaluation import plots, results
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.model_content import identity_of
from pipeline.evaluation.task import tasks
from pipeline.evaluation.training_metadata import training_metadata
from pipeline.runtime.directory_lock import locked_by_rank_0
from pipeline.runtime.dist import Launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="HF directory, hub name or run directory, optionally @LAYER"
    )
    parser.add_argument("--tasks", default="retrieval", help=f"comma-separated, of: {', '.join(tasks())}")
    parser.add_argument(
        "--output", type=output_path, required=True, help="directory for evaluation.json and evaluation.png"
    )
    for task in tasks().values():
        for key, (metavar, text) in task.options.items():
            setting = f"{task.name}.{key}"
            parser.add_argument(f"--{key}", dest=setting, metavar=metavar, help=f"{text} (short for --set {setting}=)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TASK.KEY=VALUE", help="override a task's setting"
    )


def checked(arguments: argparse.Namespace) -> tuple[list[str], Any]:
    """Names of the tasks and their settings, checked before a model is loaded. Raises `UserError`."""
    known = tasks()
    names = list(dict.fromkeys(name for name in arguments.tasks.split(",") if name))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(f"--tasks {arguments.tasks!r}: unknown {', '.join(unknown)}. Tasks: {', '.join(known)}")
    if len(set(arguments.models)) < len(arguments.models):
        raise UserError(f"a model is named twice: {' '.join(arguments.models)}. Name each model once.")
    config = read_overrides(arguments.set)
    for task in known.values():
        for key in task.options:
            if (value := getattr(arguments, f"{task.name}.{key}")) is not None:
                setattr(getattr(config, task.name), key, value)
    for name in names:
        known[name].check(getattr(config, name))
    results.read(arguments.output / results.FILE)  # fail before the evaluation if the new figures cannot be added to it
    return names, config


def evaluate(models: list[str], names: list[str], config: Any, output: Path, ranks: Launch) -> None:
    """Run every task on every model. The figures of one task are on disk before the next task starts.

    Args:
        names: names of the tasks
        config: settings of the tasks, as `read_overrides` returns them
    """
    encoders = [load_encoder(name) for name in models]
    with owned_tasks(names, output, ranks):
        _evaluate(encoders, names, config, output, ranks)


def owned_tasks(names: list[str], output: Path, ranks: Launch) -> AbstractContextManager[None]:
    """Lock the directory of each task below `output`. Another job may add other tasks to the same file meanwhile."""

    def lock(held: contextlib.ExitStack) -> None:
        held.callback(_remove_if_empty, output)
        output.mkdir(parents=True, exist_ok=True)
        for name in names:
            held.enter_context(own(sibling_lock(output / name), f"the evaluation {output / name}"))

    return locked_by_rank_0(lock, str(output), "--output", ranks)


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _evaluate(encoders: list[Encoder], names: list[str], config: Any, output: Path, ranks: Launch) -> None:
    path = output / results.FILE
    about = {encoder.name: _identity(encoder) for encoder in encoders if ranks.is_main}
    for name in names:
        task, settings = tasks()[name], getattr(config, name)
        if not (task.shared or ranks.is_main):
            continue
        found = task.evaluate(encoders, settings, ranks, output / name)
        if ranks.is_main:
            print(task.table(found), end="\n\n", flush=True)
            results.add(path, about, name, found, dataclasses.asdict(settings))
    if ranks.is_main:
        measured = results.read(path)["tasks"]
        plots.draw({name: measured[name] for name in tasks() if name in measured}, path.with_suffix(".png"))
        print(end_lines(path, path.with_suffix(".png"), about=", ".join(measured)))


def _identity(encoder: Encoder) -> dict[str, Any]:
    """A fingerprint that differs between two models of one name, and the model's training steps if known."""
    pooling = encoder.pooling if Path(encoder.path).is_dir() else None  # the commit of a hub model determines it
    identity = identity_of(encoder.content, encoder.values_layer, pooling)
    return {"fingerprint": identity, "steps": training_metadata(encoder.path).get("steps")}


def read_overrides(overrides: list[str]) -> Any:
    """The settings of all tasks, with `--set TASK.KEY=VALUE` applied to the defaults.

    Returns:
        an object with one attribute per task: an instance of the task's settings class

    Raises:
        UserError: unknown task or key, or a value that is not possible
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    sections = [
        (task.name, task.settings, dataclasses.field(default_factory=task.settings)) for task in tasks().values()
    ]
    return build_section(dataclasses.make_dataclass("EvaluationConfig", sections), tree, "")
