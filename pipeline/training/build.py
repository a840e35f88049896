"""From a recipe to the finished parts of a run, each checked against the others before anything is written or trained.

In: a recipe, a DeepSpeed JSON and this process's `Launch`. Out: `Parts` per student, or on every rank the same `UserError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from data_prep.command_line import paragraph_of
from data_prep.shards import DataError
from pipeline.config import Recipe
from pipeline.data.batches import BatchSource
from pipeline.distillation.compiled_layers import compile_layers
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule, Hooks
from pipeline.distillation.flops import student_flops, training_flops
from pipeline.distillation.models.projection import Calibration
from pipeline.distillation.models.sentence_files import FoundSettings
from pipeline.distillation.models.student import Student, build_student
from pipeline.distillation.models.teacher import load_encoder, load_teacher
from pipeline.distillation.shared_teacher import SharedTeacher, layers_of_all, tap_options_of_all
from pipeline.errors import UserError, about_student
from pipeline.provenance import START_WEIGHTS
from pipeline.runtime import dist, ds_config, preflight
from pipeline.runtime.determinism import deterministic_kernels, fix_workspace
from pipeline.runtime.device_facts import device_name
from pipeline.runtime.dist import Launch
from pipeline.runtime.ds_config import BatchShape
from pipeline.runtime.engine import StudentEngine, partition_teacher
from pipeline.runtime.rank_devices import kinds_warning
from pipeline.runtime.restarts import Restarts
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.step_clock import StepClock
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.watchdog import Watchdog
from pipeline.training.agreement import shape_facts
from pipeline.training.checks import Check, Inputs, checks_of_run, cut_teacher, inputs_of
from pipeline.training.identity import Identity
from pipeline.training.sentences import resolved, sentence_identity

CALIBRATION_TOKENS = 8192  # on which `student.init: project` measures the teacher's states
T = TypeVar("T")


@dataclass(frozen=True)
class MadeFrom:
    """What decides a student: its recipe, and hashes of data, teacher, tokenizer, vocabulary and the encoder of its start."""

    recipe: Recipe  # with which this student would be trained alone
    identity: Identity
    data_fingerprint: str
    name: str


@dataclass(frozen=True)
class Parts:
    """Everything that takes part in a training step of one student, and what it was made from.

    In a run with several students `launch`, `source`, `clock`, `batch` and `shared_teacher` are the same objects in all.
    """

    recipe: Recipe  # with which this student would be trained alone
    launch: Launch
    source: BatchSource
    student: Student
    distiller: DistillModule
    engine: StudentEngine
    clock: StepClock
    batch: BatchShape
    flops_per_row: int  # that the teacher and all students of the run need
    student_flops_per_row: int  # of these, this student's
    ds_config: dict[str, Any]
    precision: str
    teacher_precision: str
    warnings: list[str]
    identity: Identity  # of teacher, tokenizer and vocabulary, by content
    sentences: FoundSettings | None = None  # where sentence vectors are compared
    name: str = ""  # of the student, in a run with several
    shared_teacher: SharedTeacher | None = None  # of several students

    @property
    def made_from(self) -> MadeFrom:
        """Everything that must be the same in all attempts to train this student."""
        identity = {**self.identity, **self.student.start_hashes, **sentence_identity(self.sentences)}
        return MadeFrom(self.recipe, identity, self.source.fingerprint, self.name)

    @property
    def num_trained(self) -> int:
        """Number of values that the optimizer changes."""
        return sum(math.prod(shape) for shape in self.engine.shapes.values())

    @property
    def num_untrained(self) -> int:
        """Number of values in checkpoints that training does not change: frozen weights, and a projected student's basis."""
        return sum(tensor.numel() for tensor in self.student.untrained.values())

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights and both moments of what is trained, and the untrained values."""
        return 12 * self.num_trained + sum(tensor.nbytes for tensor in self.student.untrained.values())


@dataclass(frozen=True)
class Run:
    """One attempt of a run: its finished parts, the files of its directory, and what watches over it."""

    recipe: Recipe  # as given, with all students
    members: Sequence[Parts]  # of the students that this attempt trains
    paths: RunPaths
    stop: StopRequests
    watchdog: Watchdog
    restarts: Restarts

    @property
    def shared(self) -> Parts:
        """A student's parts, for what all students have in common: rows, batch, ranks, teacher."""
        return self.members[0]

    @property
    def launch(self) -> Launch:
        return self.shared.launch

    def paths_of(self, member: Parts) -> RunPaths:
        """The files of one student."""
        return RunPaths(self.paths.directory, member.name, self.paths.group)

    def say(self, line: str) -> None:
        """A line of rank 0, before there is a RunLogger."""
        if self.launch.is_main:
            print(line, flush=True)


def build(
    recipe: Recipe, recipe_path: Path, ds_path: Path, launch: Launch, chosen: Container[str] | None = None
) -> list[Parts]:
    """Build and cross-check all parts. All ranks call this together.

    Args:
        chosen: names of the recipe's students that are trained; None: all. The others are checked as well.

    Raises:
        UserError: a check failed on some rank, or two ranks have different inputs
    """
    if recipe.deterministic and launch.device.type == "cuda":
        fix_workspace()
    first = Inputs(recipe, recipe_path, ds_path, launch.world_size, launch.device, _load_complete_teacher)
    of_members = inputs_of(recipe, first)
    preflight.agree({"students of the recipe": list(of_members)})
    warnings = _check(of_members, launch)
    of_members = {name: inputs for name, inputs in of_members.items() if chosen is None or name in chosen}
    students = {}
    for name, inputs in of_members.items():
        with about_student(name):
            students[name] = _build_same_student(inputs, launch)
        if inputs.recipe.student.compile:
            compile_layers(students[name].tapped, "student.compile", recipe.deterministic)
    clock, made = StepClock(launch.device), []
    teacher = _Teacher(of_members)
    flops = training_flops(teacher.tapped, [student.tapped for student in students.values()], recipe.seq_len)
    settings = [(m.recipe, m.ds_config, m.precision, m.sentences) for m in of_members.values()]
    shared = next(iter(of_members.values()))
    source, batch, identity, teacher_precision = shared.source, shared.batch, shared.identity, shared.teacher_precision
    del first, of_members, inputs, shared  # and with them the teacher's layers above the highest distilled one
    teacher.place(recipe, teacher_precision, launch)
    hooks = _hooks(recipe, clock)
    for (name, student), (of_student, config, precision, sentences) in zip(students.items(), settings, strict=True):
        relations = resolved(of_student.relations, sentences)
        distiller = distill_module(teacher.of_student(relations), student, relations, hooks)
        engine = StudentEngine(distiller, student.trained, of_student.optimizer, config, recipe.deterministic)
        parts = Parts(
            recipe=of_student,
            launch=launch,
            source=source,
            student=student,
            distiller=distiller,
            engine=engine,
            clock=clock,
            batch=batch,
            flops_per_row=flops,
            student_flops_per_row=student_flops(student.tapped, recipe.seq_len),
            ds_config=config,
            precision=precision,
            teacher_precision=teacher_precision,
            warnings=[*warnings, *engine.warnings],
            identity=identity,
            sentences=sentences,
            name=name,
            shared_teacher=teacher.shared,
        )
        made.append(parts)
        warnings = []  # of the run: reported by its first student
    return made


def _hooks(recipe: Recipe, clock: StepClock) -> Hooks:
    return Hooks(
        gather=dist.gather_json,
        around_student=partial(deterministic_kernels, recipe.deterministic),
        mark=clock.mark,
        restart_positions=recipe.positions == "restart",
        gather_rows=dist.gather_rows,
    )


def distill_module(teacher: Callable, student: Student, relations: RelationsConfig, hooks: Hooks) -> DistillModule:
    """What the engine wraps, with all parts of a student that the loss reads."""
    return DistillModule(teacher, student.tapped, relations, student.basis_Dd, hooks, student.projection)


class _Teacher:
    """The frozen teacher of a run, cut above the highest layer that a student reads."""

    def __init__(self, of_members: Mapping[str, Inputs]) -> None:
        shared = next(iter(of_members.values()))
        relations = [inputs.recipe.relations for inputs in of_members.values()]
        self.is_shared = len(relations) > 1
        self.shared: SharedTeacher | None = None
        taps = relations[0].teacher_taps
        if self.is_shared:
            taps = layers_of_all(relations, shared.teacher_model.config.num_hidden_layers)
        dtype, options = ds_config.DTYPES[shared.teacher_precision], tap_options_of_all(relations)
        self._frozen = load_teacher(shared.teacher_model, taps, dtype, "cpu", **options)
        self.tapped = self._frozen.tapped
        self._callable: Callable = self._frozen

    def place(self, recipe: Recipe, precision: str, launch: Launch) -> None:
        """As the recipe says: a copy on every rank, or its parameters partitioned over the ranks."""
        if recipe.teacher_options.compile:
            compile_layers(self.tapped, "teacher_options.compile", recipe.deterministic)
        if recipe.teacher_options.placement == "zero3":
            self._callable = partition_teacher(self._frozen, precision)
        else:
            self._callable = self._frozen.to(launch.device)
        if self.is_shared:
            tapped = self.tapped
            self.shared = SharedTeacher(self._callable, tapped.layers, tapped.widths, tapped.with_output)

    def of_student(self, relations: RelationsConfig) -> Callable:
        """What a student with these relations reads."""
        return self._callable if self.shared is None else self.shared.view(relations)


def _check(of_members: Mapping[str, Inputs], launch: Launch) -> list[str]:
    """Run all start-up checks, and compare after each what the ranks must have in common. Returns the warnings."""
    students_of: dict[str, list[str]] = {}  # of each warning
    for check in checks_of_run(of_members):

        def look(check: Check = check) -> tuple[dict[str, Any], Sequence[str]]:
            is_skipped = check.is_for_rank_0 and not launch.is_main
            return check.facts(), () if is_skipped else check.look().warnings

        facts, found = _on_all_ranks(look, launch)
        preflight.agree(facts)
        for warning in found:
            students_of.setdefault(warning, []).append(check.student)
    warnings = [
        f"{', '.join(students)}: {warning}" if all(students) and len(students) < len(of_members) else warning
        for warning, students in students_of.items()
    ]
    of_devices = kinds_warning(dist.gather_json(device_name(launch.device)))
    return [of_devices, *warnings] if of_devices else warnings


def _load_complete_teacher(recipe: Recipe) -> PreTrainedModel:
    model = load_encoder(recipe.teacher)
    if recipe.vocabulary is not None:
        cut_teacher(recipe.vocabulary, recipe.teacher, model)
    return model


def _on_all_ranks(make: Callable[[], T], launch: Launch) -> T:
    """What `make` gives, or on every rank the error of the first rank that has one: the others would wait for it."""
    made, problem = None, None
    try:
        made = make()
    except (UserError, DataError, OSError) as error:
        problem = str(error)
    except (MemoryError, RecursionError) as error:
        problem = paragraph_of(error)
    problems = dist.gather_json(problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise UserError(found if None not in problems else f"rank {rank}: {found}")
    return cast(T, made)


def _build_same_student(inputs: Inputs, launch: Launch) -> Student:
    """The student, the same on all ranks."""
    recipe = inputs.recipe
    # A teacher whose parameters are to be partitioned may not fit on one device.
    is_partitioned = recipe.teacher_options.placement == "zero3"
    student = student_of(recipe, inputs.teacher_model, inputs.source, "cpu" if is_partitioned else launch.device)
    preflight.agree(shape_facts(student.model.state_dict()))
    student.trained_length = inputs.trained_length
    if inputs.start_hashes:
        student.start_hashes = inputs.start_hashes
        student.start += f" (weights {student.start_hashes[START_WEIGHTS][:12]})"
    if recipe.student.init == "project":
        of_loss = [] if student.projection is None else [student.projection.weight]
        dist.take_from_main([*student.model.parameters(), *student.untrained.values(), *of_loss], launch.device)
    return student


def student_of(
    recipe: Recipe, teacher_model: PreTrainedModel, source: BatchSource, device: torch.device | str = "cpu"
) -> Student:
    """The recipe's student before its first step. `init: project` is measured on the first rows of the run."""
    relations, calibration = recipe.relations, None
    if recipe.student.init == "project":
        num_rows = min(math.ceil(CALIBRATION_TOKENS / recipe.seq_len), recipe.steps * recipe.global_batch)
        rows_BL = source.batch(np.arange(num_rows))
        calibration = Calibration(torch.from_numpy(rows_BL).long().to(device), relations.heads)
    return build_student(
        teacher_model,
        recipe.student,
        recipe.seed,
        relations,
        calibration,
    )
