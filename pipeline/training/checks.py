"""The start-up checks of a run: one list for training, `--dry-run` and `python -m pipeline doctor`.

In: an `Inputs` per student (recipe, DeepSpeed JSON, ranks, device). Out: `Found` per check, or a `UserError` or `DataError` that says
what is wrong and how to fix it. Nothing is written. Training runs the list on every rank (build.py), and doctor in one
process, with a teacher without weights (doctor/recipe.py). Checks that need all ranks: runtime/preflight.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from data_prep.command_line import module_command
from data_prep.shards import ShardSet
from pipeline.config import Recipe
from pipeline.data.batches import BatchOptions, BatchSource
from pipeline.data.tokenizer_hash import compare_ids, tokenizer_sha256
from pipeline.distillation.compiled_layers import check_compiler
from pipeline.distillation.models.architectures import check_documents, check_length
from pipeline.distillation.models.sentence_files import FoundSettings
from pipeline.distillation.models.teacher import check_vocabulary
from pipeline.distillation.models.vocabulary import cut_embedding, read_vocabulary
from pipeline.distillation.relations.loss import check_heads
from pipeline.distillation.tail import unequal_widths
from pipeline.distillation.tap import tap
from pipeline.errors import UserError, about_student
from pipeline.runtime import ds_config
from pipeline.runtime.ds_config import BatchShape, Precisions
from pipeline.runtime.engine import device_precisions
from pipeline.training.agreement import settings_facts
from pipeline.training.how_to_prepare import how_to_prepare, text_of
from pipeline.training.identity import Identity, identity_of
from pipeline.training.recipe_warnings import recipe_warnings, window_warnings
from pipeline.training.sentences import check_sentences, settings_of
from pipeline.training.student_start import check_start, start_hashes, trained_length


class Found(NamedTuple):
    """What a check that passed has found."""

    what: str  # one line; empty where there is nothing to say
    warnings: Sequence[str] = ()


@dataclass
class Inputs:
    """What a run is made from. Everything is opened when it is first asked for, and once."""

    recipe: Recipe
    recipe_path: Path
    ds_path: Path
    num_ranks: int
    device: torch.device
    load_teacher: Callable[[Recipe], PreTrainedModel]  # all its layers, with the embeddings of the recipe's vocabulary
    first: Inputs | None = None  # another student's of the same run, whose data and teacher these are too

    @cached_property
    def batch(self) -> BatchShape:
        return ds_config.split_batch(self.recipe.global_batch, self.recipe.micro_batch_per_gpu, self.num_ranks)

    @cached_property
    def _resolved(self) -> tuple[dict[str, Any], list[str]]:
        can = device_precisions(self.device)
        batch, optimizer = self.batch, self.recipe.optimizer
        return ds_config.resolve(self.ds_path, str(self.recipe_path), optimizer, batch, self.num_ranks, can)

    @property
    def ds_config(self) -> dict[str, Any]:
        """The effective DeepSpeed config."""
        return self._resolved[0]

    @property
    def precision(self) -> str:
        return ds_config.precision_of(self.ds_config)

    @cached_property
    def teacher_precision(self) -> str:
        return _teacher_precision(self.recipe, self.precision, device_precisions(self.device), self.device)

    @cached_property
    def source(self) -> BatchSource:
        return self.first.source if self.first else open_data(self.recipe)

    @cached_property
    def teacher_model(self) -> PreTrainedModel:
        return self.first.teacher_model if self.first else self.load_teacher(self.recipe)

    @cached_property
    def identity(self) -> Identity:
        """Of teacher, tokenizer and vocabulary, by content: reads all weights."""
        return self.first.identity if self.first else identity_of(self.recipe.teacher, self.recipe.vocabulary)

    @cached_property
    def trained_length(self) -> int | None:
        return trained_length(self.recipe)

    @cached_property
    def start_hashes(self) -> Identity:
        """Of the encoder that the student starts from, if it is not the teacher."""
        return start_hashes(self.recipe)

    @cached_property
    def sentences(self) -> FoundSettings | None:
        """How sentence vectors are pooled; None where the recipe compares none."""
        return settings_of(self.recipe)

    # -- what the checks below look at

    def check_batch(self) -> Found:
        rows = f"{self.recipe.global_batch} rows = {self.batch.micro_batch} x {self.batch.accumulation}"
        warnings = self._resolved[1]
        return Found(f"{rows} x {self.num_ranks} rank(s), teacher in {self.teacher_precision}", warnings)

    def batch_facts(self) -> dict[str, Any]:
        precisions = {"precision of the student": self.precision, "precision of the teacher": self.teacher_precision}
        return settings_facts(self.recipe, self.ds_config, precisions)

    def check_shards(self) -> Found:
        """The shards are there, have the sizes of their manifest, and are long enough for the recipe's rows."""
        shards, languages = self.source.shards, self.source.languages
        tokens = sum(shards.num_tokens(language) for language in languages)
        epochs = self.recipe.steps * self.recipe.global_batch * self.recipe.seq_len / max(tokens, 1)
        return Found(
            f"{self.recipe.data}: {len(languages)} languages, {tokens / 1e6:,.1f} M tokens, sizes as in the manifest; the "
            f"run reads {epochs:.1f} times as many"
        )

    def check_compiler(self) -> Found:
        """Layers that are to be compiled can be."""
        check_compiler(self.compile_keys[0], self.device)
        return Found("torch.compile works")

    @property
    def compile_keys(self) -> list[str]:
        """The recipe's keys that ask for compiled layers."""
        recipe = self.recipe
        asked = {"teacher_options.compile": recipe.teacher_options.compile, "student.compile": recipe.student.compile}
        return [key for key, compiled in asked.items() if compiled]

    def check_teacher(self) -> Found:
        config = self.teacher_model.config
        layers = check_taps(self.recipe, self.teacher_model)
        shape = f"{config.num_hidden_layers} layers x {config.hidden_size}"
        return Found(f"{config.model_type}, {shape}, read at layer {layers}", window_warnings(self.recipe, config))

    def start_facts(self) -> dict[str, Any]:
        return {**self.start_hashes, "trained length of the encoder of `student.init`": self.trained_length}

    def check_start(self) -> Found:
        """The encoder that the student starts from has the student's shape and tokenizer."""
        return Found(check_start(self.recipe, self.teacher_model.config))

    def check_sentences(self) -> Found:
        """The sentence vectors that `relations.tail: pooled` compares."""
        assert self.sentences is not None
        rows, width = self.batch.micro_batch * self.num_ranks, self.teacher_model.config.hidden_size
        return Found(*check_sentences(self.recipe, self.sentences, rows, width))

    def sentence_facts(self) -> dict[str, Any]:
        return {"how the teacher makes sentence vectors": str(self.sentences and self.sentences.settings)}

    def check_teacher_and_shards(self) -> Found:
        check_fit(self.recipe, self.source.shards, self.teacher_model)
        return Found("tokenizer as the shards'")

    def check_ids(self) -> Found:
        """The ids in the shards are those that users of the teacher's tokenizer get."""
        return Found(*compare_ids(self.recipe.tokenizer, self.source.shards))


@dataclass(frozen=True)
class Check:
    """One entry of the list."""

    subject: str
    look: Callable[[], Found]
    facts: Callable[[], dict[str, Any]] = dict  # what all ranks must have in common
    needs: tuple[str, ...] = ()  # subjects without which it cannot look
    is_for_rank_0: bool = False  # slow, and the same on every rank
    fix: str = ""  # what to do about a warning
    student: str = ""  # that it is about, in a run with several
    model: str | None = (
        None  # directory or hub name, whose weights doctor looks at first: it builds models without them
    )


# Subjects of checks that depend on the student. The first is about rows and ranks as well.
OF_EACH_STUDENT = ("batch", "recipe", "compiler of layers", "teacher", "student", "sentences", "tokenizer")


def inputs_of(recipe: Recipe, inputs: Inputs) -> dict[str, Inputs]:
    """Name -> `inputs` for each student of a recipe, which all share teacher and data with the first."""
    of_members: dict[str, Inputs] = {}
    for name, member in recipe.members().items():
        first = next(iter(of_members.values()), None)
        of_members[name] = replace(inputs, recipe=member, first=first)
    return of_members


def checks_of_run(of_members: Mapping[str, Inputs]) -> list[Check]:
    """The checks of all students of a run. What is about teacher and data alone is checked once, with the first student."""
    checks = []
    for name, inputs in of_members.items():
        own = [c for c in start_up_checks(inputs) if inputs.first is None or c.subject in OF_EACH_STUDENT]
        checks += [_of_student(name, check, inputs.first is None) if name else check for check in own]
    return checks


def _of_student(name: str, check: Check, is_first: bool) -> Check:
    """A check whose subject, facts and errors name the student, where it is about one."""
    if is_first and check.subject not in OF_EACH_STUDENT[1:]:
        return check

    def look() -> Found:
        with about_student(name):
            return check.look()

    def facts() -> dict[str, Any]:
        with about_student(name):
            return {f"{key} (student {name})": fact for key, fact in check.facts().items()}

    own_facts = facts if not is_first or check.subject == "student" else check.facts
    subject = check.subject if is_first else f"{check.subject} of {name}"
    return replace(check, subject=subject, look=look, facts=own_facts, student=name)


def start_up_checks(inputs: Inputs) -> list[Check]:
    """All checks of one student, in the order in which a run meets them: the cheap ones first."""
    opened, both = ("shards",), ("shards", "teacher")
    teacher = None if inputs.first else inputs.recipe.teacher  # the same for all students of a run
    new_shards = module_command("data_prep", "prepare") + " ... --output NEW_DIRECTORY"
    return [
        Check("batch", inputs.check_batch, inputs.batch_facts),
        Check("shards", inputs.check_shards, lambda: {"data": inputs.source.fingerprint}),
        Check("recipe", lambda: Found("", recipe_warnings(inputs.recipe, inputs.source)), needs=opened),
        *([Check("compiler of layers", inputs.check_compiler)] if inputs.compile_keys else []),
        Check("teacher", inputs.check_teacher, lambda: dict(inputs.identity), model=teacher),
        *([_start_check(inputs)] if inputs.recipe.student.start_encoder else []),
        *([_sentence_check(inputs)] if "pooled" in inputs.recipe.relations.tail_terms else []),
        Check("tokenizer", inputs.check_teacher_and_shards, needs=both),
        # Loading XLM-R's tokenizer takes 2 s where the manifest does not say that it was compared with this one.
        Check("ids", inputs.check_ids, needs=(*both, "tokenizer"), is_for_rank_0=True, fix=new_shards),
    ]


def _start_check(inputs: Inputs) -> Check:
    encoder = inputs.recipe.student.start_encoder
    return Check("student", inputs.check_start, inputs.start_facts, needs=("teacher",), model=encoder)


def _sentence_check(inputs: Inputs) -> Check:
    return Check("sentences", inputs.check_sentences, inputs.sentence_facts, needs=("teacher",))


def open_data(recipe: Recipe) -> BatchSource:
    """The shards and the order in which they are read; a missing directory names the command that makes it."""
    path = Path(recipe.data)
    if not path.is_dir():
        raise UserError(
            f"no shards found at {path}. {how_to_prepare(recipe.tokenizer, path)}   (or set `data` to where they are; "
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
    """Keep only the teacher's embeddings of the recipe's vocabulary; the student is built from what remains."""
    kept = read_vocabulary(vocabulary)
    kept.check_source(tokenizer_sha256(teacher), teacher)
    cut_embedding(model, kept)


def check_taps(recipe: Recipe, teacher_model: PreTrainedModel) -> list[int]:
    """The layers that are read exist, and the heads divide both widths. Returns the layers."""
    relations, width = recipe.relations, recipe.student.hidden
    of_teacher = teacher_model.config.hidden_size
    if "mse" in relations.tail_terms and width != of_teacher and recipe.student.init != "project":
        raise UserError(unequal_widths(of_teacher, width))
    taps = relations.teacher_taps or teacher_model.config.num_hidden_layers
    teacher = tap(teacher_model, taps, **relations.tap_options, role="teacher")
    check_heads(teacher.widths[0], relations.heads, "teacher", width)
    check_heads(width, relations.heads, "student", teacher.widths[0])
    return teacher.layers


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
    if recipe.documents == "separate":
        check_documents(teacher_model.config, "the teacher")
    check_vocabulary(teacher_model, shards.vocab_size, recipe.data)
    check_length(teacher_model.config, recipe.seq_len, recipe.teacher)


def _teacher_precision(recipe: Recipe, student_precision: str, can: Precisions, device: torch.device) -> str:
    asked = recipe.teacher_options.dtype
    lacks = {"fp16": not can.fp16, "bf16": not can.bf16}
    if lacks.get(asked):
        others = ", ".join(name for name in ("auto", "fp16", "bf16", "fp32") if not lacks.get(name))
        raise UserError(f"teacher_options.dtype is {asked}, which {can.device} does not have; use one of {others}")
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return student_precision if student_precision != "fp32" else ("bf16" if can.bf16 else "fp16")
    return "bf16" if can.bf16_fast else "fp32"
