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
from pipeline.errors import UserError
from pipeline.evaluation import results
from pipeline.evaluation.task import tasks
from pipeline.report.owners import evaluations_of, owner
from pipeline.report.retrieval import AFTER, demo_file, read_demo
from pipeline.runtime.run_paths import RunPaths

HELDOUT = "heldout"  # the task: relation loss against one teacher layer for all models
# where a task keeps its languages or files
_PER = ("per_pair", "per_file", "per_language", "per_collection", "per_task", "test")


@dataclass(frozen=True)
class Evaluated:
    """One mean figure of one student.

    Attributes:
        student: its number among the students
        name: the task, with the pooling or measure where it has several: `retrieval.values`
        steps: training steps of the evaluated student; None where the file does not say
        written_s: when its file was written
        condition: settings and languages; equal for figures that can be compared
    """

    student: int
    task: str
    name: str
    value: float
    steps: int | None
    written_s: float
    condition: str


def read_evaluations(students: Sequence[StudentRun], directories: Iterable[Path]) -> list[Evaluated]:
    """All figures about the students.

    Args:
        directories: outputs of `pipeline evaluate`, in addition to those in the run directories, which may concern any student

    Raises:
        UserError: a given directory has no evaluation, or a file cannot be read
    """
    found = [figure for number, student in enumerate(students) for figure in _of_demo(number, student)]
    for path, numbers in _files(students, directories):
        report = results.read(path)
        candidates = {number: students[number].paths for number in numbers}
        try:
            for task, result_of in report["tasks"].items():
                if task in tasks() and task != "speed":
                    found += _of_task(path, report, task, result_of, candidates)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not an evaluation ({type(error).__name__}: {error}). Evaluate again, or move it away."
            ) from None
    return found


def _of_demo(number: int, student: StudentRun) -> Iterator[Evaluated]:
    """What `python -m demo` measured after the last step of its run."""
    demo, steps = read_demo(student.paths, student.step)
    if student.points and steps == student.step and (result := demo.get(AFTER)):
        written_s = demo_file(student.paths, AFTER).stat().st_mtime
        yield from _of_student(number, "retrieval", result, (student.step, written_s), result.get("num_pairs"))


def _files(students: Sequence[StudentRun], directories: Iterable[Path]) -> Iterator[tuple[Path, list[int]]]:
    """Each evaluation, and the numbers of the students that it may concern."""
    given = [directory / results.FILE for directory in directories]
    if missing := next((path for path in given if not path.is_file()), None):
        raise UserError(f"{missing} not found. Name the --output of a `pipeline evaluate`.")
    of_run: dict[Path, list[int]] = {}
    for number, student in enumerate(students):
        of_run.setdefault(student.paths.directory, []).append(number)
    for numbers in of_run.values():
        for path in dict.fromkeys(path for number in numbers for path in evaluations_of(students[number].paths)):
            yield path, numbers
    for path in given:
        yield path, list(range(len(students)))


def _of_task(
    path: Path, report: dict[str, Any], task: str, result_of: dict[str, Any], candidates: dict[int, RunPaths]
) -> Iterator[Evaluated]:
    numbers, written_s = list(candidates), path.stat().st_mtime
    for model, result in result_of.items():
        steps = report["models"][model].get("steps")
        settings = report.get("settings", {}).get(task)
        found = owner(model, path, list(candidates.values()))
        if found is not None:
            when = (steps if type(steps) is int else None, written_s)
            yield from _of_student(numbers[found], task, result, when, settings)


def _of_student(
    number: int, task: str, result: dict[str, Any], when: tuple[int | None, float], settings: Any
) -> Iterator[Evaluated]:
    """`when`: number of steps, and when the file was written."""
    languages = next((list(result[key]) for key in _PER if key in result), [])
    condition = json.dumps([languages, settings], sort_keys=True)
    for name, value in _means(task, result["mean"]):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
        yield Evaluated(number, task, name, float(value), *when, condition)


def _means(task: str, mean: Any) -> Iterator[tuple[str, Any]]:
    """Names and figures of a task's mean: one number, or one for each pooling or measure. The first is the task's own."""
    if not isinstance(mean, dict):
        yield (f"evaluated-{HELDOUT}" if task == HELDOUT else task), mean
        return
    for number, (part, value) in enumerate(mean.items()):
        yield (task if number == 0 else f"{task}.{part}"), value
