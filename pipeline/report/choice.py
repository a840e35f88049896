"""Which student to choose: by the held-out loss of the runs, or by a task of `pipeline evaluate`.

In: the students of one or several runs, and what `read_evaluations` found about them. Out: a `Measure` for each figure by
which they can be compared, and the student that has the best one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.command_line import module_command
from pipeline.comparison.differences import heldout_differences
from pipeline.comparison.students import StudentRun
from pipeline.comparison.table import NONE, not_comparable
from pipeline.errors import UserError, did_you_mean
from pipeline.report.evaluations import HELDOUT, Evaluated
from pipeline.runtime.checkpoint_files import committed_steps


@dataclass
class Measure:
    """One figure of the students.

    Attributes:
        values: number of the student -> figure
        steps: number of the student -> steps after which it was measured, where that is known
        caveat: why it does not tell which student is better; empty where it does
    """

    name: str
    lower_is_better: bool = False
    values: dict[int, float] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    caveat: str = ""

    def text(self, number: int, student: StudentRun) -> str:
        """The figure of one student, with its step where that is not the last one."""
        if number not in self.values:
            return NONE
        steps = self.steps.get(number, student.step)
        if student.early_end:  # later checkpoints of the run hold the same weights
            steps = min(steps, student.step)
        return f"{self.values[number]:.4f}" + (f" ({steps:,})" if steps != student.step else "")

    def best(self, students: Sequence[StudentRun]) -> int | None:
        """The student with the best figure, of equal ones the first. A diverged one is not considered."""
        considered = [number for number in self.values if not students[number].is_diverged]
        return min(
            considered, key=lambda number: self.values[number] * (1 if self.lower_is_better else -1), default=None
        )


def heldout_measure(students: Sequence[StudentRun]) -> Measure:
    """The held-out loss: of the best checkpoint where every run keeps that one, else of the last evaluation."""
    keeps_best = all(student.recipe.checkpoint.keep_best == "heldout" for student in students)
    measure = Measure(HELDOUT, lower_is_better=True)
    for number, student in enumerate(students):
        point = student.best if keeps_best else next(reversed(student.trained), None)
        if point is not None and math.isfinite(point[1]) and not student.is_diverged:
            measure.steps[number], measure.values[number] = point
    if keys := heldout_differences(students):
        measure.caveat = not_comparable(keys)
    return measure


def evaluated_measures(found: Iterable[Evaluated]) -> list[Measure]:
    """One measure for each figure. Of two evaluations of one student that of more steps counts, of equal ones the newer."""
    in_order = sorted(found, key=lambda figure: (-1 if figure.steps is None else figure.steps, figure.written_s))
    latest = {(figure.name, figure.student): figure for figure in in_order}
    measures: dict[str, Measure] = {}
    conditions: dict[str, set[str]] = {}
    for figure in latest.values():
        measure = measures.setdefault(figure.name, Measure(figure.name, figure.task == HELDOUT))
        measure.values[figure.student] = figure.value
        if figure.steps is not None:
            measure.steps[figure.student] = figure.steps
        conditions.setdefault(figure.name, set()).add(figure.condition)
    for name, measure in measures.items():
        if len(conditions[name]) > 1:
            measure.caveat = (
                f"`{name}` was measured with different settings or languages, so it does not tell which student is better: "
                "evaluate all students in one command."
            )
    return list(measures.values())


def caveats(measures: Sequence[Measure]) -> list[str]:
    """A line about the evaluated figures that do not compare, if there are some."""
    names = [measure.name for measure in measures if measure.caveat and measure.name != HELDOUT]
    if not names:
        return []
    return [
        f"Measured with different settings or languages, and so not comparable: {', '.join(names)}. Evaluate all students in one "
        "command."
    ]


def choose(students: Sequence[StudentRun], measures: Sequence[Measure], by: str | None) -> tuple[int | None, str]:
    """The number of the chosen student, and the sentence that says so or why there is none.

    Args:
        by: name of a measure, which is then used despite its caveat; None: the held-out loss, unless it has a caveat

    Raises:
        UserError: there is no such measure, or no student has it
    """
    named = {measure.name: measure for measure in measures}
    others = [measure.name for measure in measures if measure.name != HELDOUT and not measure.caveat]
    if by is not None and by not in named:
        raise UserError(
            f"--by {by}: no such figure of these students; {did_you_mean(by, list(named))} Figures other than {HELDOUT} come "
            f"from `{module_command('pipeline', 'evaluate')}`; name its --output with --evaluation DIR"
        )
    measure = named[by or HELDOUT]
    if by is None and measure.caveat:
        other = f"Choose by an evaluated figure: --by {', --by '.join(others)}." if others else evaluate_first(students)
        return (
            None,
            f"None is chosen by the held-out loss, because it does not compare. {other} Or insist: --by {HELDOUT}.",
        )
    number = measure.best(students)
    if number is None:
        if by is not None:
            raise UserError(f"--by {by}: no student has a finite figure yet. Wait for the first evaluation")
        return None, "None is chosen: no student has a finite held-out loss yet."
    return number, _sentence(students, measure, number)


def _sentence(students: Sequence[StudentRun], measure: Measure, number: int) -> str:
    kind = "lowest" if measure.lower_is_better else "highest"
    step = f" of step {measure.steps[number]:,}" if number in measure.steps else ""
    parts = [
        f"Chosen: {students[number].name}, which has the {kind} {measure.name}{step}, {measure.values[number]:.4f}."
    ]
    diverged = [student.name for other, student in enumerate(students) if student.is_diverged]
    without = [each.name for other, each in enumerate(students) if not each.is_diverged and other not in measure.values]
    for names, why in ((without, "Without this figure"), (diverged, "Diverged")):
        if names:
            parts.append(f"{why}, and so not considered: {', '.join(names)}.")
    if unfinished := [each.name for each in students if each.early_end is None and each.step < each.recipe.steps]:
        parts.append(f"Not at their last step: {', '.join(unfinished)}.")
    if measure.caveat:
        parts.append(f"Warning: {measure.caveat}")
    return " ".join(parts)


def evaluate_first(students: Sequence[StudentRun]) -> str:
    """How to get a figure by which they can be compared: of those that have a checkpoint and have not diverged."""
    names: dict[Path, list[str]] = {}
    for student in students:
        if student.is_diverged or not committed_steps(student.paths.checkpoints):
            continue
        names.setdefault(student.paths.directory, []).append(student.paths.student)
    commands = [
        module_command(
            *("pipeline", "evaluate", run_dir, *(f"--student={name}" for name in of_run if name)),
            *("--tasks", "retrieval", "--output", run_dir / "evaluation"),
        )
        for run_dir, of_run in names.items()
    ]
    if not commands:
        return "Wait for the first checkpoint, and then measure what they can do."
    return f"First measure what they can do: {' && '.join(commands)}, then --by retrieval."
