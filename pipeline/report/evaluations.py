"""The figures of `pipeline evaluate` about the students of runs.

In: the students, and the `evaluation.json` files in their directories or in given ones; of a demo its retrieval results.
Out: one `Evaluated` per student and figure. Speed and size are left out, and so are models that belong to none of the students.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.comparison.students import StudentRun
from pipeline.config import as_tree
from pipeline.errors import UserError
from pipeline.evaluation import results
from pipeline.evaluation.task import tasks
from pipeline.report.retrieval import AFTER, read_retrieval
from pipeline.runtime.json_files import read_json
from pipeline.runtime.run_paths import STUDENTS

HELDOUT = "heldout"  # the task: relation loss against one teacher layer for all models
EXPORT = "student"  # where an export of a student is, next to its other files
_PER = ("per_pair", "per_file", "per_language", "test")  # where a task keeps its languages or files


@dataclass(frozen=True)
class Evaluated:
    """One mean figure of one student.

    Attributes:
        student: its number among the students
        name: the task, with the pooling or measure where it has several: `retrieval.values`
        steps: training steps of the evaluated student; None where the file does not say
        condition: settings and languages; equal for figures that can be compared
    """

    student: int
    task: str
    name: str
    value: float
    steps: int | None
    condition: str


def read_evaluations(students: Sequence[StudentRun], directories: Iterable[Path]) -> list[Evaluated]:
    """All figures about the students, those of the given directories last.

    Args:
        directories: outputs of `pipeline evaluate`, in addition to those in the run directories

    Raises:
        UserError: a given directory has no evaluation, or a file cannot be read
    """
    found = [figure for number, student in enumerate(students) for figure in _of_demo(number, student)]
    for path in _files(students, directories):
        report = results.read(path)
        try:
            for task, result_of in report["tasks"].items():
                if task in tasks() and task != "speed":
                    found += _of_task(report, task, result_of, students)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not an evaluation ({type(error).__name__}: {error}). Evaluate again, or move it away."
            ) from None
    return found


def _of_demo(number: int, student: StudentRun) -> Iterator[Evaluated]:
    """What `python -m demo` measured after the last step of its run."""
    directory = student.paths.metrics.parent
    demo = read_retrieval(directory, student.step, student.recipe.teacher) if student.points else {}
    if result := demo.get(AFTER):
        yield from _of_student(number, "retrieval", result, student.step, result.get("num_pairs"))


def _files(students: Sequence[StudentRun], directories: Iterable[Path]) -> list[Path]:
    given = [directory / results.FILE for directory in directories]
    if missing := next((path for path in given if not path.is_file()), None):
        raise UserError(f"{missing} not found. Name the --output of a `pipeline evaluate`.")
    own = [place for student in students for place in (student.paths.directory, student.paths.metrics.parent)]
    inside = [place / name for place in dict.fromkeys(own) for name in (results.FILE, f"evaluation/{results.FILE}")]
    return [*filter(Path.is_file, inside), *given]


def _of_task(
    report: dict[str, Any], task: str, result_of: dict[str, Any], students: Sequence[StudentRun]
) -> Iterator[Evaluated]:
    for model, result in result_of.items():
        steps = report["models"][model].get("steps")
        settings = report.get("settings", {}).get(task)
        for number in _students_of(model, students):
            yield from _of_student(number, task, result, steps if type(steps) is int else None, settings)


def _of_student(
    number: int, task: str, result: dict[str, Any], steps: int | None, settings: Any
) -> Iterator[Evaluated]:
    languages = next((list(result[key]) for key in _PER if key in result), [])
    condition = json.dumps([languages, settings], sort_keys=True)
    for name, value in _means(task, result["mean"]):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
        yield Evaluated(number, task, name, float(value), steps, condition)


def _means(task: str, mean: Any) -> Iterator[tuple[str, Any]]:
    """Names and figures of a task's mean: one number, or one for each pooling or measure. The first is the task's own."""
    if not isinstance(mean, dict):
        yield (f"evaluated-{HELDOUT}" if task == HELDOUT else task), mean
        return
    for number, (part, value) in enumerate(mean.items()):
        yield (task if number == 0 else f"{task}.{part}"), value


def _students_of(model: str, students: Sequence[StudentRun]) -> list[int]:
    """The students that a model in an evaluation is an export of: it is in a student's directory, or its lineage has its recipe.

    `MODEL@LAYER` reads other values than those that were distilled and belongs to none.
    """
    parts = Path(model).parts
    for number, student in enumerate(students):
        run_name, name = student.paths.directory.resolve().name, student.paths.student
        place = (run_name, STUDENTS, name, EXPORT) if name else (run_name, EXPORT)
        if parts[-len(place) :] == place:
            return [number]
    lineage = Path(model) / "lineage.json"
    recipe = read_json(lineage).get("recipe") if lineage.is_file() else None
    return [number for number, student in enumerate(students) if recipe == as_tree(student.recipe)]
