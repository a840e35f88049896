"""Reads what a run directory says about each of its students. Nothing is written, and no weights are read.

In: a run directory, finished or still in progress. Out: a `StudentRun` per student: recipe, curves, state, size.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Recipe, build_recipe
from pipeline.distillation.flops import forward_flops
from pipeline.distillation.models.loading import blank_model, config_of, count_parameters
from pipeline.distillation.tap import tap
from pipeline.errors import UserError
from pipeline.recipe.text import read_yaml
from pipeline.runtime.checkpoint_files import (
    checkpoint_path,
    committed_steps,
    has_student,
    later_groups,
    readable_state,
)
from pipeline.runtime.evaluations import DIVERGED, best_evaluation
from pipeline.runtime.json_files import read_json_if_there, read_points
from pipeline.runtime.run_paths import RunPaths, check_is_no_student, students_of

HELDOUT, LOSS, SPEED = "heldout/mean", "loss/total", "speed/tokens_per_second"
FP32_BYTES = 4
Series = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Size:
    """A complete student, as an export holds it."""

    parameters: int
    forward_flops: int  # of one forward over a row of the recipe's length, calculated from the shapes

    @property
    def megabytes(self) -> float:
        return self.parameters * FP32_BYTES / 1e6


@dataclass(frozen=True)
class StudentRun:
    """One student of a run.

    Attributes:
        name: as in tables; that of the run directory where its only student has none
        recipe: with which this student would be trained alone
        about: content of run.json; empty where there is none
        points: of metrics.jsonl, in order
        state: content of the newest checkpoint's state.json; empty before the first checkpoint
    """

    name: str
    paths: RunPaths
    recipe: Recipe
    about: dict[str, Any]
    points: list[dict[str, Any]]
    state: dict[str, Any]

    def series(self, tag: str) -> Series:
        """(step, value) of every point that has the tag."""
        return [(point["step"], point[tag]) for point in self.points if tag in point]

    def last(self, tag: str) -> float | None:
        """The newest value of a tag."""
        return next((point[tag] for point in reversed(self.points) if tag in point), None)

    @property
    def step(self) -> int:
        """Finished steps, of which something is logged."""
        return self.points[-1]["step"] if self.points else 0

    @property
    def heldout(self) -> Series:
        """Held-out loss, mean over the languages, of every evaluation."""
        return self.series(HELDOUT)

    @property
    def trained(self) -> Series:
        """`heldout` without the loss before the first step, which is no result of training."""
        return [evaluation for evaluation in self.heldout if evaluation[0] > 0]

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest held-out loss of `trained`; of equal ones the later. None without a finite one."""
        return best_evaluation(self.trained)

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed of the training, of all students that were trained together."""
        return median_speed(self.points)

    @property
    def early_end(self) -> tuple[int, str] | None:
        """Step and reason, where this student ended before the other students or before the last step."""
        return early_end(self.state)

    @property
    def diverged_at(self) -> int | None:
        """The step whose loss was not finite, from 1, where the run ended because of it."""
        index = read_json_if_there(self.paths.bad_batch).get("step")
        return index + 1 if type(index) is int and index >= self.step and not self.paths.done.is_file() else None

    @property
    def is_diverged(self) -> bool:
        """Whether its losses became non-finite, so that its recipe is none to choose."""
        return self.diverged_at is not None or (self.early_end is not None and self.early_end[1].startswith(DIVERGED))

    @property
    def status(self) -> str:
        """Finished, ended early with the reason, diverged, or how far it is."""
        if self.early_end:
            step, reason = self.early_end
            return f"ended at step {step:,}: {reason.partition('. ')[0]}"
        if self.diverged_at is not None:
            return f"diverged at step {self.diverged_at:,}"
        if self.step >= self.recipe.steps:
            return "finished"
        left = f"{self.step:,} of {self.recipe.steps:,} steps"
        if self.paths.preempted.is_file():
            return f"stopped on request, {left}"
        return f"failed, {left}" if self.paths.failed.is_file() else f"not finished, {left}"

    @property
    def teacher_layers(self) -> list[int | None]:
        """The teacher's layers that this student is matched with, from 1. None: the last, where run.json does not say which."""
        matched = self.about.get("matched_layers")
        if isinstance(matched, list) and matched and all(isinstance(pair, list) and len(pair) == 2 for pair in matched):
            return [teacher for teacher, _ in matched]
        layers = self.recipe.relations.layers
        return [self.recipe.relations.teacher_layer] if layers is None else [pair.teacher for pair in layers]

    @cached_property
    def size(self) -> Size | None:
        """From student_config.json; None before the first step."""
        path = self.paths.student_config
        if not path.is_file():
            return None
        with torch.device("meta"):  # shapes only
            model = blank_model(config_of(path, str(self.paths.files), "student"), str(self.paths.files), "student")
        complete = tap(model, model.config.num_hidden_layers, with_output=True)
        return Size(count_parameters(model), forward_flops(complete, self.recipe.seq_len))


def read_students(run_dir: Path) -> list[StudentRun]:
    """Every student of a run directory, in the order of the recipe.

    Raises:
        UserError: this is no run directory, or one of its files cannot be read
    """
    check_is_no_student(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} not found. Name the --run-dir of a training.")
    return [_read_student(run_dir, name) for name in students_of(run_dir) or [""]]


def _read_student(run_dir: Path, name: str) -> StudentRun:
    paths = paths_of(run_dir, name)
    if not paths.recipe.is_file():
        raise UserError(
            f"{paths.recipe} is missing: {run_dir} is not a run directory, or its training has not started."
        )
    state = newest_state(paths)
    return StudentRun(
        name or run_dir.resolve().name,
        paths,
        read_recipe(paths.recipe),
        read_json_if_there(paths.description),
        points_until_end(read_points(paths.metrics), state) if paths.metrics.is_file() else [],
        state,
    )


def points_until_end(points: list[dict[str, Any]], state: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of metrics.jsonl without those after the early end of this student: they are about the run, such as saves."""
    ended = early_end(state)
    return points if ended is None else [point for point in points if point["step"] <= ended[0]]


def median_speed(points: list[dict[str, Any]]) -> float | None:
    """Median of the tokens per second."""
    speeds = [point[SPEED] for point in points if SPEED in point]
    return statistics.median(speeds) if speeds else None


def early_end(state: dict[str, Any]) -> tuple[int, str] | None:
    """Step and reason, where this student ended before the other students or before the last step; `state`: state.json."""
    ended = state.get("ended")
    if not isinstance(ended, dict):
        return None
    step, reason = ended.get("step"), ended.get("reason")
    return (step, reason) if type(step) is int and isinstance(reason, str) else None


def paths_of(run_dir: Path, student: str) -> RunPaths:
    """The files of one student, with the group that its checkpoints are in: the next one before its first checkpoint."""
    groups = [RunPaths(run_dir, student, group) for group in (1, *later_groups(run_dir))]
    begun = [paths for paths in groups if committed_steps(paths.checkpoints)]
    own = (paths for paths in reversed(begun) if has_student(paths.checkpoints, student))
    return next(own, RunPaths(run_dir, student, begun[-1].group + 1 if begun else 1))


def newest_state(paths: RunPaths) -> dict[str, Any]:
    """`state.json` of the newest checkpoint that has this student. Its hashes are not verified; a run may prune it meanwhile."""
    checkpoints = (checkpoint_path(paths.checkpoints, step) for step in reversed(committed_steps(paths.checkpoints)))
    return next(filter(None, (readable_state(checkpoint / paths.student) for checkpoint in checkpoints)), {})


def read_recipe_tree(path: Path) -> dict[str, Any]:
    """The keys of a recipe.yaml that this version knows: a run of another version may have further ones."""
    known = {field.name for field in fields(Recipe)}
    return {key: value for key, value in read_yaml(path).items() if key in known}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a run directory. Raises `UserError` with the file's name."""
    try:
        return build_recipe(read_recipe_tree(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
