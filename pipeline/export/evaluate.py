"""Evaluate encoders side by side: tables on the console, `evaluation.json` and `.png` in the output directory.

    python -m pipeline evaluate artifacts/teacher runs/quickstart/student --tasks retrieval,speed --output runs/evaluation
    python -m pipeline evaluate runs/family --student small --student large --step best --output runs/evaluation
    torchrun --nproc_per_node 8 -m pipeline evaluate ...          deepspeed --module pipeline evaluate ...

A model is a Hugging Face directory or hub name; `MODEL@19` reads the values of layer 19 instead of the distilled layer. It
may also be a run directory: its student is exported to OUTPUT/exported first, and of several students those of --student.
Settings of a task are overridden like those of a recipe: `--set retrieval.pairs=DIR`. Several ranks share the tasks that
read shards or fine-tune; rank 0 runs the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import transformers

from data_prep.shards import DataError
from pipeline.errors import UserError
from pipeline.evaluation import command
from pipeline.evaluation.encoder import split_name
from pipeline.evaluation.ranks import joined
from pipeline.export.command import add_choice_of_student
from pipeline.export.hf import export_run
from pipeline.runtime.checkpoint import Step
from pipeline.runtime.dist import Launch
from pipeline.runtime.run_paths import is_run_directory, one_student

EXPORTED = "exported"  # directory of the exports in the output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser)
    add_choice_of_student(parser, action="append")


def run(arguments: argparse.Namespace) -> None:
    names, config = command.checked(arguments)
    runs = [model for model in arguments.models if is_run_directory(Path(split_name(model)[0]))]
    if not runs and (arguments.student or arguments.step is not None):
        raise UserError(
            f"--student and --step choose what is exported of a run directory, and none of {', '.join(arguments.models)} "
            "is one. Leave both options out"
        )
    transformers.logging.disable_progress_bar()
    with joined() as ranks:
        models = exported(arguments.models, arguments.student or [None], arguments.step, arguments.output, ranks)
        command.evaluate(models, names, config, arguments.output, ranks)


def exported(
    models: Sequence[str], students: Sequence[str | None], step: Step, output: Path, ranks: Launch
) -> list[str]:
    """The models, with the exports of their students in the place of run directories. All ranks call it together.

    Args:
        students: of each run directory; [None] where it has one
        step: of the checkpoint, as `export_run` takes it
        output: of the evaluation

    Raises:
        UserError: on every rank
    """
    found: list[str] = []
    problem = None
    if ranks.is_main:
        try:
            for model in models:
                path, layer = split_name(model)
                suffix = "" if layer is None else f"@{layer}"
                of_run = students if is_run_directory(Path(path)) else []
                found += [f"{_export(Path(path), student, step, output)}{suffix}" for student in of_run] or [model]
            if len(set(found)) < len(found):
                raise UserError(
                    f"a model is named twice: {' '.join(found)}. Name each once, and run directories differently"
                )
        except (UserError, DataError, OSError) as error:
            problem = str(error)
    problem, found = ranks.from_main([problem, found])
    if problem:
        raise UserError(problem)
    return found


def _export(run_dir: Path, student: str | None, step: Step, output: Path) -> Path:
    name = one_student(run_dir, student)
    return export_run(run_dir, output / EXPORTED / export_name(run_dir, name), student=name, step=step)


def export_name(run_dir: Path, student: str) -> str:
    """The name of a student's export among those of an evaluation."""
    return "-".join(filter(None, [run_dir.resolve().name, student]))
