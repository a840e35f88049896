"""`evaluation.json`: what was measured of one set of models, task by task. A later evaluation of the same models joins it.

In: a task's results with its settings, and which models they are of. Out: the file, whole at every moment. Used by
`pipeline evaluate`; the model card and the report read it.
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
    """What the file holds; nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        report = read_json(path)
        if not isinstance(report["tasks"], dict):
            raise ValueError("`tasks` is no mapping")
        return report
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no evaluation ({error}). Move it away, or name another --output.") from None


def add(path: Path, models: dict[str, Any], task: str, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Put one task's results into the file, in the place of earlier ones of that task.

    `models` are names with what identifies each. Figures of other models (or of the same names with other weights) would
    stand beside these as if they belonged together, so that file gets another name first. It is read anew each time, as
    another job may have added a task meanwhile.
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
            "hold NaN or infinity"
        ) from None
    replace_file(path, text + "\n")
