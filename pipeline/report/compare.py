"""Compare the students of a run, or of several runs, and choose one.

    python -m pipeline compare runs/sweep
    python -m pipeline compare runs/sweep --by retrieval --write recipes/chosen.yaml
    python -m pipeline compare runs/one runs/other

Prints what differs between the students and a table of their figures, and writes a page with their curves (compare.html in
the first run directory). The runs may still be running. The chosen student is the one with the lowest held-out loss, or
with the best figure of `python -m pipeline evaluate` that --by names (retrieval, retrieval.values, xnli, ...).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.command_line import end_lines, module_command
from data_prep.durable_files import replace_file
from data_prep.outputs import output_path
from pipeline.comparison.differences import differing_keys
from pipeline.comparison.students import HELDOUT as HELDOUT_TAG
from pipeline.comparison.students import LOSS, StudentRun, read_students
from pipeline.comparison.table import difference_lines, figure_lines
from pipeline.config import recipe_to_yaml
from pipeline.errors import UserError
from pipeline.installed import training_command
from pipeline.report.choice import Measure, caveats, choose, evaluated_measures, heldout_measure
from pipeline.report.evaluations import HELDOUT, read_evaluations
from pipeline.report.family import TIME_NOTE, further_columns, render_comparison
from pipeline.report.timeline import training_hours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="what --run-dir of a training named")
    parser.add_argument("--by", metavar="FIGURE", help=f"{HELDOUT} (default), or an evaluated figure such as retrieval")
    parser.add_argument(
        "--evaluation", type=Path, action="append", default=[], metavar="DIR",
        help="an --output of `pipeline evaluate`, in addition to those in the run directories; may be repeated",
    )  # fmt: skip
    parser.add_argument("--write", type=output_path, metavar="FILE.yaml", help="write the recipe of the chosen student")
    parser.add_argument("--overwrite", action="store_true", help="--write may replace a file")
    parser.add_argument("--json", type=output_path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--output", type=output_path, help="the page; default: compare.html in the first RUN_DIR")


def run(arguments: argparse.Namespace) -> None:
    _check_write(arguments.write, arguments.overwrite)
    students = read_all(arguments.run_dirs)
    measures = measures_of(students, arguments.evaluation)
    number, sentence = choose(students, measures, arguments.by)
    print("\n".join(table_lines(students, measures[1:])), end="\n\n")
    print(sentence)
    page = arguments.output or arguments.run_dirs[0] / "compare.html"
    replace_file(page, render_comparison(students, measures[1:], sentence))
    if arguments.json:
        figures = as_json(students, measures, number)
        replace_file(arguments.json, json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if arguments.write:
        if number is None:
            raise UserError(f"--write {arguments.write}: {sentence}")
        write_recipe(students[number], arguments.write, sentence)
        then = f"{training_command()} --deepspeed ds_configs/zero2.json --recipe {shlex.quote(str(arguments.write))}"
    files = [file for file in (page, arguments.json, arguments.write) if file]
    print(end_lines(*files, then=then if arguments.write else ""))


def measures_of(students: Sequence[StudentRun], directories: Sequence[Path] = ()) -> list[Measure]:
    """The held-out loss of the runs, then the figures of `pipeline evaluate`."""
    return [heldout_measure(students), *evaluated_measures(read_evaluations(students, directories))]


def table_lines(students: Sequence[StudentRun], evaluated: Sequence[Measure]) -> list[str]:
    """What is printed: what differs, and all figures."""
    columns = further_columns(students, evaluated)
    return [*difference_lines(students), *figure_lines(students, columns), TIME_NOTE, *caveats(evaluated)]


def _check_write(file: Path | None, may_overwrite: bool) -> None:
    """Before anything is read, so that nobody waits for an error."""
    if file is not None and file.exists() and not may_overwrite:
        raise UserError(f"--write {file} exists and is not replaced. Name another file, or add --overwrite.")


def read_all(run_dirs: Sequence[Path]) -> list[StudentRun]:
    """The students of all runs, by names that differ: those of several runs have the name of their run too."""
    places = [run_dir.resolve() for run_dir in run_dirs]
    if len(set(places)) < len(places):
        raise UserError(f"a run is named twice: {' '.join(map(str, run_dirs))}. Name each run once.")
    if len(run_dirs) == 1:
        return read_students(run_dirs[0])
    is_clear = len({place.name for place in places}) == len(places)
    students = []
    for run_dir, place in zip(run_dirs, places, strict=True):
        run_name = place.name if is_clear else str(run_dir)
        for student in read_students(run_dir):
            own = student.paths.student
            students.append(dataclasses.replace(student, name=f"{run_name}/{own}" if own else run_name))
    return students


def as_json(students: Sequence[StudentRun], measures: Sequence[Measure], chosen: int | None) -> dict[str, Any]:
    """All figures. A figure that does not exist or is not finite is null."""
    times = [training_hours(student.paths, student.points) for student in students]
    return {
        "chosen": None if chosen is None else students[chosen].name,
        "differs": {
            key: {student.name: value for student, value in zip(students, values, strict=True)}
            for key, values in differing_keys(students).items()
        },
        "students": {
            student.name: {
                "run_dir": str(student.paths.directory),
                "state": student.status,
                "step": student.step,
                "steps": student.recipe.steps,
                "loss": _finite(student.last(LOSS)),
                "heldout": _finite(student.last(HELDOUT_TAG)),
                "best_step": student.best[0] if student.best else None,
                "best_heldout": student.best[1] if student.best else None,
                "parameters": student.size.parameters if student.size else None,
                "megabytes_fp32": student.size.megabytes if student.size else None,
                "forward_flops_per_row": student.size.forward_flops if student.size else None,
                "training_tokens_per_second": _finite(student.tokens_per_second),
                **dict(zip(("training_hours", "device_hours"), hours or (None, None), strict=True)),
                "measures": {measure.name: measure.values.get(number) for measure in measures},
            }
            for number, (student, hours) in enumerate(zip(students, times, strict=True))
        },
        "caveats": {measure.name: measure.caveat for measure in measures if measure.caveat},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def write_recipe(student: StudentRun, file: Path, sentence: str) -> None:
    """The student's recipe as a file of its own; `load_recipe` reads it back as the recipe of this student alone."""
    header = [
        f"The student {student.name} of {student.paths.directory}, trained alone. Every key is given, also those with their default.",
        f"`{module_command('pipeline', 'compare')}`: {sentence}",
        f"  {training_command()} --deepspeed ds_configs/zero2.json --recipe {shlex.quote(str(file))}",
    ]
    comments = "".join(f"# {' '.join(line.splitlines())}\n" for line in header)
    replace_file(file, comments + recipe_to_yaml(student.recipe))
