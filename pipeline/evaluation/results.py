"""`evaluation.json`: the figures of one set of models, task by task. A later evaluation of the same models is added to it.

In: the results of a task, its settings, and which models they are of. Out: the file, complete at every moment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.durable_files import replace_file
from data_prep.ownership import own_when_free, sibling_lock
from pipeline.errors import DivergedRunError, UserError
from pipeline.runtime.json_files import read_json

FILE = "evaluation.json"
OTHER_MODELS_FILE = "evaluation.old.json"


def read(path: Path) -> dict[str, Any]:
    """The content of the file; an empty dictionary if there is no file."""
    if not path.is_file():
        return {}
    try:
        report = read_json(path)
        if not isinstance(report["tasks"], dict):
            raise ValueError("`tasks` is not a mapping")
        return report
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an evaluation ({error}). Move it away, or name another --output.") from None


def add(path: Path, models: dict[str, Any], task: str, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write one task's results into the file; earlier results of that task are replaced.

    A file with figures of other models, or of the same names with other weights, is renamed first. The file is read
    again each time, because another job may have added a task meanwhile.

    Args:
        models: name -> what identifies the model

    Raises:
        DivergedRunError: a figure is not finite
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with own_when_free(sibling_lock(path), str(path)):
        _add(path, models, task, results, settings)


def _add(path: Path, models: dict[str, Any], task: str, results: dict[str, Any], settings: dict[str, Any]) -> None:
    report = read(path)
    if report and report.get("models") != models:
        path.replace(path.with_name(OTHER_MODELS_FILE))
        print(f"the figures in {path} were of other models or weights: moved to {OTHER_MODELS_FILE}", flush=True)
        report = {}
    report = {
        "models": models,
        "tasks": {**report.get("tasks", {}), task: results},
        "settings": {**report.get("settings", {}), task: settings},
    }
    try:
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise DivergedRunError(
            f"{task} gave figures that are not finite, so they were not written: the weights of one of {', '.join(models)} "
            "have NaN or infinity"
        ) from None
    replace_file(path, text + "\n")
