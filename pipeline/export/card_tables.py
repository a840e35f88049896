"""The figures of a student as Markdown for its model card.

In: directories with the files that the commands write: `demo.json` and `metrics.jsonl` (a run), `evaluation.json`
(`pipeline evaluate`), `onnx/check.json` (an export). Out: one section per file or task, which names its source. Missing
files are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.encoder import POOLINGS
from pipeline.evaluation.languages import language_notes, marked
from pipeline.evaluation.results import FILE
from pipeline.evaluation.tables import heldout_rows, markdown_table, sentence
from pipeline.evaluation.task import tasks
from pipeline.export.card_evaluation import Exported, evaluated
from pipeline.export.onnx import checked_on, int8_warning
from pipeline.runtime.json_files import read_json, read_points
from pipeline.runtime.run_paths import RunPaths

STAGES = {"teacher": "teacher", "before": "student before training", "after": "student after training"}
SUFFIXES = {"output": "", "last_input": "_last_input", "values": "_values"}


def measured_sections(directories: Iterable[Path], steps: int | None, export: Exported | None = None) -> str:
    """All figures in the directories, as Markdown. Those of other weights under the export's name are left out, with a warning.

    Args:
        steps: training steps of the student; a `demo.json` of another number of steps is left out, and held-out losses of
            later steps
    """
    parts: list[str] = []
    for directory in dict.fromkeys(directories):
        if (directory / "demo.json").is_file():
            demo = read_json(directory / "demo.json")
            if demo.get("steps") == steps:  # else the run continued after it: these are figures of an earlier student
                parts += _retrieval_of_demo(demo)
        parts += _evaluation(directory, export)
        if (directory / "onnx" / "check.json").is_file():
            parts += _onnx(read_json(directory / "onnx" / "check.json"))
        if (metrics := RunPaths(directory).metrics).is_file():
            parts += _heldout_of_run(metrics, steps)
    return "\n\n".join(parts)


def _retrieval_of_demo(report: dict[str, Any]) -> list[str]:
    means = [
        [f"{name}, {pooled}", f"{report[f'{stage}_mean{SUFFIXES[pooling]}']:.3f}"]
        for pooling, pooled in POOLINGS.items()
        for stage, name in STAGES.items()
    ]
    per_pair = report["per_pair"]
    by_language = [
        [name, *(f"{pair[stage]['output']:.3f}" for pair in per_pair.values())] for stage, name in STAGES.items()
    ]
    return [
        "### Cross-lingual retrieval\n\nOf the run's student, by `make demo`: share of sentences whose nearest neighbour in the other language is their "
        f"translation, both directions, mean of {len(per_pair)} language pairs with English.",
        markdown_table(["model, pooled from", "accuracy"], means),
        "Per language, pooled from the output:",
        markdown_table(["model", *marked(per_pair, {"after": report})], by_language),
        *map(sentence, language_notes({"after": report})),
    ]


def _evaluation(directory: Path, export: Exported | None) -> list[str]:
    """One section per task of an evaluation."""
    parts: list[str] = []
    found, others = evaluated(directory, export)
    if others:
        print(
            f"warning: {directory / FILE} has figures of other weights than {', '.join(others)} now has, so they are not in the "
            "model card. Evaluate it again",
            file=sys.stderr,
            flush=True,
        )
    for name, results in found.items():
        if name not in tasks():
            raise UserError(f"an evaluation.json has an unknown task {name!r}. Tasks: {', '.join(tasks())}")
        parts += [f"### {name}, by `pipeline evaluate`", tasks()[name].card(results)]
        parts += map(sentence, language_notes(results))
    return parts


def _heldout_of_run(path: Path, steps: int | None) -> list[str]:
    """First and last held-out relation loss of every language, up to the exported step."""
    points = [point for point in read_points(path, needed=("step",)) if steps is None or point["step"] <= steps]
    if not (rows := heldout_rows(points, 3)):
        return []
    return [
        "### Held-out relation loss\n\nOn rows that training never saw, against the teacher (the run's `metrics.jsonl`).",
        markdown_table(rows[0], rows[1:]),
    ]


def _onnx(check: dict[str, Any]) -> list[str]:
    rows = [["torch", "", f"{check['torch']['retrieval_mean']:.3f}", "0"]]
    rows += [
        [
            f"ONNX {name}",
            f"{check['megabytes'][name]:.0f}",
            f"{check[name]['retrieval_mean']:.3f}",
            f"{check[name]['greatest_difference']:.1e}",
        ]
        for name in ("fp32", "int8")
    ]
    return [
        f"### ONNX files\n\nChecked against torch on {checked_on(check)} (`pipeline export --onnx`).",
        markdown_table(["", "MB", "retrieval", "greatest difference of a hidden state"], rows),
        *filter(None, [int8_warning(check)]),
    ]
