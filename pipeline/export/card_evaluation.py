"""The figures of an `evaluation.json` for a model card: without those of other weights that had the export's name.

In: a directory with `evaluation.json`, and the export. Out: task -> model -> figures, and the names that were left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.distillation.models.loading import load_config
from pipeline.evaluation.encoder import split_name
from pipeline.evaluation.model_content import content_of, identity_of
from pipeline.evaluation.pooling import pooling_of
from pipeline.evaluation.results import FILE
from pipeline.evaluation.task import Results
from pipeline.evaluation.training_metadata import training_metadata
from pipeline.runtime.json_files import read_json


@dataclass(frozen=True)
class Exported:
    """An export: where its files are, and the name that it has or is about to get."""

    files: Path
    name: Path

    def is_named(self, model: str) -> bool:
        """Whether a model in an evaluation has this name, with or without a layer."""
        return Path(split_name(model)[0]).resolve() == self.name.resolve()

    def is_measured(self, model: str, about: Any) -> bool:
        """Whether figures of a model of this name are of these files. `about`: what the evaluation says about the model."""
        recorded = about.get("fingerprint") if isinstance(about, dict) else None
        return recorded is None or recorded == self._identity(split_name(model)[1])

    @cached_property
    def _content(self) -> list[str]:
        return content_of(self.files)  # reads all weights

    def _identity(self, named_layer: int | None) -> str:
        layer = named_layer or training_metadata(self.files).get("student_layer")
        layers = load_config(self.files, "student").num_hidden_layers
        return identity_of(self._content, layer or layers, pooling_of(str(self.files))[0])


def evaluated(place: Path, export: Exported | None) -> tuple[dict[str, Results], list[str]]:
    """Figures by task, and the names of the export whose figures are of other weights; nothing without the file."""
    if not (place / FILE).is_file():
        return {}, []
    report = read_json(place / FILE)
    models = report.get("models") or {}
    others = [
        model
        for model, about in models.items()
        if export and export.is_named(model) and not export.is_measured(model, about)
    ]
    tasks = {
        task: {model: figures for model, figures in results.items() if model not in others}
        for task, results in report.get("tasks", {}).items()
    }
    return {task: results for task, results in tasks.items() if results}, others
