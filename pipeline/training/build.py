"""From a recipe to the objects of a run, each checked against the others before anything is written or trained.

In: a `Recipe`, a DeepSpeed JSON and this process's `Launch`. Out: `Parts`. Used by trainer.py.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from data_prep.shards import DataError, ShardSet
from pipeline.config import Recipe
from pipeline.data.batches import BatchOptions, BatchSource
from pipeline.data.tokenizer_hash import compare_ids, tokenizer_sha256
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.architectures import ARCHITECTURES, check_length
from pipeline.distillation.models.projection import Calibration
from pipeline.distillation.models.student import Student, build_student
from pipeline.distillation.models.teacher import FrozenTeacher, check_vocabulary, load_encoder, load_teacher
from pipeline.distillation.models.vocabulary import cut_embedding, read_vocabulary
from pipeline.distillation.relations.loss import check_heads
from pipeline.distillation.tap import tap
from pipeline.errors import UserError
from pipeline.runtime import dist, ds_config, preflight
from pipeline.runtime.determinism import deterministic_kernels, fix_workspace
from pipeline.runtime.dist import Launch
from pipeline.runtime.ds_config import BatchShape, Precisions
from pipeline.runtime.engine import StudentEngine, device_precisions, partition_teacher
from pipeline.training.agreement import settings_facts, shape_facts
from pipeline.training.how_to_prepare import how_to_prepare, text_of
from pipeline.training.identity import Identity, identity_of
from pipeline.training.recipe_warnings import recipe_warnings

CALIBRATION_TOKENS = 8192  # on which `student.init: project` measures the teacher's states
T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Parts:
    """Everything a run is made of."""

    source: BatchSource
    student: Student
    distiller: DistillModule
    engine: StudentEngine
    batch: BatchShape
    ds_config: dict[str, Any]
    precision: str
    teacher_precision: str
    warnings: list[str]
    identity: Identity  # of teacher, tokenizer and vocabulary, by content

    @property
    def num_trained(self) -> int:
        """Parameters that the optimizer moves."""
        return sum(math.prod(shape) for shape in self.engine.shapes.values())

    @property
    def num_untrained(self) -> int:
        """Values in checkpoints that training never touches: the student's, and a projected one's basis."""
        return sum(tensor.numel() for tensor in self.student.untrained.values())


def assemble(recipe: Recipe, recipe_path: Path, ds_path: Path, launch: Launch) -> Parts:
    """Build and cross-check all parts. Cheap checks come first; `UserError` or `DataError` says what does not fit."""
    if recipe.deterministic and launch.device.type == "cuda":
        fix_workspace()
    batch = ds_config.split_batch(recipe.global_batch, recipe.micro_batch_per_gpu, launch.world_size)
    config, warnings, teacher_precision = _on_all_ranks(lambda: _resolve(recipe, recipe_path, ds_path, launch), launch)
    precision = ds_config.precision_of(config)
    precisions = {"precision of the student": precision, "precision of the teacher": teacher_precision}
    preflight.agree(settings_facts(recipe, config, precisions), launch)
    source = _on_all_ranks(lambda: open_data(recipe), launch)
    preflight.agree({"data": source.fingerprint}, launch)
    warnings += recipe_warnings(recipe, source)

    teacher_model, identity = _on_all_ranks(lambda: open_teacher(recipe, source.shards), launch)
    preflight.agree(identity, launch)
    # By rank 0 for all: loading XLM-R's tokenizer takes it 2 s where the manifest does not say that this one was compared.
    warnings += _on_all_ranks(lambda: compare_ids(recipe.tokenizer, source.shards)[1] if launch.is_main else [], launch)
    relations, spread = recipe.relations, recipe.teacher_options.placement == "zero3"
    # A teacher that is to be spread may not fit on one device.
    student = student_of(recipe, teacher_model, source, "cpu" if spread else launch.device)
    preflight.agree(shape_facts(student.model.state_dict()), launch)
    if recipe.student.init == "project":
        dist.take_from_main([*student.model.parameters(), *student.untrained.values()], launch.device)
    teacher = load_teacher(
        teacher_model, relations.teacher_taps, DTYPES[teacher_precision], "cpu", **relations.tap_options
    )
    del teacher_model  # what lies above the distilled layer is freed here
    placed = _place(teacher, recipe, teacher_precision, launch)
    gather = partial(dist.gather_json, device=launch.device)
    kernels = partial(deterministic_kernels, recipe.deterministic)
    distiller = DistillModule(placed, student.tapped, relations, gather, student.basis_Dd, kernels)
    engine = StudentEngine(distiller, student.trained, recipe.optimizer, config, recipe.deterministic)
    warnings += engine.warnings
    return Parts(source, student, distiller, engine, batch, config, precision, teacher_precision, warnings, identity)


def _resolve(recipe: Recipe, recipe_path: Path, ds_path: Path, launch: Launch) -> tuple[dict[str, Any], list[str], str]:
    """The effective DeepSpeed config with its warnings, and the teacher's precision: both as this rank's device can."""
    batch = ds_config.split_batch(recipe.global_batch, recipe.micro_batch_per_gpu, launch.world_size)
    can = device_precisions(launch.device)
    config, warnings = ds_config.resolve(ds_path, str(recipe_path), recipe.optimizer, batch, launch.world_size, can)
    return config, warnings, _teacher_precision(recipe, ds_config.precision_of(config), can, launch.device)


def open_teacher(recipe: Recipe, shards: ShardSet) -> tuple[PreTrainedModel, Identity]:
    """The whole teacher, checked against the rest of the recipe, and what it is by content."""
    identity = identity_of(recipe.teacher, recipe.vocabulary)
    model = load_encoder(recipe.teacher)
    if recipe.vocabulary is not None:
        cut_teacher(recipe.vocabulary, recipe.teacher, model)
    check_fit(recipe, shards, model)
    check_taps(recipe, model)
    return model, identity


def _on_all_ranks(make: Callable[[], T], launch: Launch) -> T:
    """What `make` gives, or on every rank the error of the first rank that has one: the others would wait for it."""
    made, problem = None, None
    try:
        made = make()
    except (UserError, DataError, OSError) as error:
        problem = str(error)
    problems = dist.gather_json(problem, launch.device)
    for rank, found in enumerate(problems):
        if found is not None:
            raise UserError(found if None not in problems else f"rank {rank}: {found}")
    return cast(T, made)


def student_of(
    recipe: Recipe, teacher_model: PreTrainedModel, source: BatchSource, device: torch.device | str = "cpu"
) -> Student:
    """The recipe's student as training starts it; a projected one is measured on the first rows of the run."""
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


def _place(teacher: FrozenTeacher, recipe: Recipe, precision: str, launch: Launch) -> Callable:
    """The teacher where the recipe wants it: whole on every rank, or its parameters spread over the ranks."""
    if recipe.teacher_options.compile:
        teacher.compile()
    if recipe.teacher_options.placement == "zero3":
        return partition_teacher(teacher, precision)
    return teacher.to(launch.device)


def open_data(recipe: Recipe) -> BatchSource:
    """The shards and the order in which they are read; a missing directory names the command that makes it."""
    path = Path(recipe.data)
    if not path.is_dir():
        raise UserError(
            f"there are no shards at {path}. {how_to_prepare(recipe.tokenizer, path)}   (or set `data` to where they are; "
            "`make demo` makes teacher and shards)"
        )
    options = BatchOptions(
        seq_len=recipe.seq_len,
        alpha=recipe.alpha,
        seed=recipe.seed,
        heldout_rows=recipe.heldout_rows,
        max_epochs=recipe.max_epochs,
        languages=recipe.languages,
        unit=recipe.sampling_unit,
        weights=recipe.language_weights,
        total_samples=recipe.steps * recipe.global_batch,
        documents=recipe.documents,
    )
    return BatchSource(ShardSet(path), options)


def cut_teacher(vocabulary: str, teacher: str, model: Any) -> None:
    """Leave the teacher only the embeddings of the recipe's vocabulary; the student is built from what is left."""
    kept = read_vocabulary(vocabulary)
    kept.check_source(tokenizer_sha256(teacher), teacher)
    cut_embedding(model, kept)


def check_taps(recipe: Recipe, teacher_model: PreTrainedModel) -> None:
    """Layers that are there and heads that divide both widths, before the teacher does any work."""
    relations, width = recipe.relations, recipe.student.hidden
    taps = relations.teacher_taps or teacher_model.config.num_hidden_layers
    teacher = tap(teacher_model, taps, **relations.tap_options, role="teacher")
    check_heads(teacher.widths[0], relations.heads, "teacher", width)
    check_heads(width, relations.heads, "student", teacher.widths[0])


def check_fit(recipe: Recipe, shards: ShardSet, teacher_model: Any) -> None:
    """Teacher, tokenizer, shards and sequence length must belong together."""
    sha256 = tokenizer_sha256(recipe.tokenizer)
    if sha256 != shards.tokenizer_sha256:
        again, text = f"{recipe.data.rstrip('/')}-{sha256[:8]}", text_of(shards)
        role = "the teacher's" if recipe.vocabulary is None else "that of `vocabulary`"
        raise UserError(
            f"the shards in {recipe.data} were made with another tokenizer (sha256 {shards.tokenizer_sha256[:12]}) than "
            f"{role} (sha256 {sha256[:12]} in {recipe.tokenizer}). {how_to_prepare(recipe.tokenizer, again, text)}   (then "
            f"train with {shlex.join(['--set', f'data={again}'])})"
        )
    for model_type in (teacher_model.config.model_type, recipe.student.family):
        if recipe.documents == "separate" and model_type and not ARCHITECTURES[model_type].accepts_block_mask:
            raise UserError(f"{model_type} cannot keep the documents of a row apart; set documents: joined")
    check_vocabulary(teacher_model, shards.vocab_size, recipe.data)
    check_length(teacher_model.config, recipe.seq_len, recipe.teacher)


def _teacher_precision(recipe: Recipe, student_precision: str, can: Precisions, device: torch.device) -> str:
    wanted = recipe.teacher_options.dtype
    if wanted == "fp16" and not can.fp16:
        raise UserError(f"teacher_options.dtype is fp16, which {can.device} does not have; write auto, bf16 or fp32")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return student_precision if student_precision != "fp32" else ("bf16" if can.bf16 else "fp16")
    return "bf16" if can.bf16_fast else "fp32"
