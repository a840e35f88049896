"""Write one self-contained HTML page about a run.

    python -m pipeline report runs/quickstart            writes runs/quickstart/report.html

The page loads nothing over the network. The run may still be running. The page of a run with several students shows them
side by side; `--student NAME` writes the page of one of them, next to its other files. `python -m pipeline compare RUN_DIR
RUN_DIR ...` writes one page about several runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.command_line import end_lines, module_command
from data_prep.durable_files import replace_file
from data_prep.outputs import output_path
from pipeline.comparison.students import paths_of
from pipeline.errors import UserError
from pipeline.report.family import render_family
from pipeline.report.page import render
from pipeline.runtime.run_paths import one_student, students_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="what --run-dir of the training named"
    )
    parser.add_argument("--student", metavar="NAME", help="of several students, the one that the page is about")
    parser.add_argument(
        "--output", type=output_path, help="default: report.html in the directory of the run or student"
    )


def run(arguments: argparse.Namespace) -> None:
    if len(arguments.run_dirs) > 1:
        both = module_command("pipeline", "compare", *arguments.run_dirs)
        raise UserError(f"report writes the page of one run. The page that compares several: {both}")
    run_dir: Path = arguments.run_dirs[0]
    if arguments.student is None and students_of(run_dir):
        directory, page = run_dir, render_family(run_dir)
    else:
        student = one_student(run_dir, arguments.student)
        directory, page = paths_of(run_dir, student).files, render(run_dir, student)
    output = arguments.output or directory / "report.html"
    replace_file(output, page)
    print(end_lines(output, about=f"{output.stat().st_size / 1e6:.1f} MB"))
