"""`DistillModule`, which the training engine wraps: a batch of token ids goes in, the relation loss comes out.

One call runs teacher and student on the batch and adds up the losses that `RelationsConfig` names. The teacher is no
submodule: it has no entry in parameters, state or checkpoints, and no engine converts or partitions it.

Shape suffixes: B rows, L positions, D channels (d: of a narrower student), S documents of a row, H heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.distillation.compiled_layers import uncompiled
from pipeline.distillation.config import LETTERS, RelationsConfig
from pipeline.distillation.documents import Documents, SequenceMask
from pipeline.distillation.models.teacher import FrozenTeacher
from pipeline.distillation.relations.backends import BACKENDS
from pipeline.distillation.relations.loss import check_heads, relation_kl, relation_kl_by_row
from pipeline.distillation.relations.reference import relation_log_probabilities
from pipeline.distillation.relations.selection import Gather, alone, choose_backend
from pipeline.distillation.shared_teacher import TeacherView
from pipeline.distillation.tail import OUTPUT, POOLED, GatherRows, SentenceProjection, Tail, own_rows
from pipeline.distillation.tap import Projections, TappedEncoder, without_dropout

TEACHER, STUDENT, LOSS = "teacher", "student", "loss"  # what `Hooks.mark` is told
logger = logging.getLogger(__name__)


@dataclass
class TapOutputs:
    """What one model gave on a batch: Q, K, V of each tapped layer, and its output if there is a tail term."""

    layers: list[Projections]
    output_BLD: torch.Tensor | None


@dataclass(frozen=True)
class Hooks:
    """What surrounds a `DistillModule` in a training run."""

    gather: Gather = alone  # exchanges the ranks' results when the backend is chosen
    around_student: Callable[[], AbstractContextManager] = nullcontext  # makes a context for the student's forward
    mark: Callable[[str], object] = str  # is called when TEACHER, STUDENT and LOSS have been launched
    restart_positions: bool = False  # with `segments`: as in `Documents`
    gather_rows: GatherRows = own_rows  # the sentence vectors of all ranks, for `pooled_distance: similarity`


class DistillModule(nn.Module):
    """Teacher and student as one module: `(input_ids_BL, lengths_B=None, segments=None) -> (loss, parts)`.

    `parts` are the unweighted losses in the order of `part_names`, detached.

    Args:
        teacher: a callable with the call and the results of `tap`. Both models must be tapped as `config` says
            (`teacher_taps`, `student_taps`, `tap_options`).
        student_tapped: the student; its parameters are those of this module.
        config: the relations and their weights.
        basis_Dd: the components on which a narrower student's output is expressed (`Student.basis_Dd`).
        hooks: what surrounds the module in a training run.
        projection: of a student's sentence vectors to the teacher's width (`Student.projection`).
    """

    def __init__(
        self,
        teacher: Callable,
        student_tapped: TappedEncoder,
        config: RelationsConfig,
        basis_Dd: torch.Tensor | None = None,
        hooks: Hooks = Hooks(),
        projection: SentenceProjection | None = None,
    ) -> None:
        super().__init__()
        self._hooks = hooks
        self.tail = Tail(config, basis_Dd, projection, hooks.gather_rows) if config.tail_terms else None
        self.student = student_tapped
        self.config = config
        self._teacher = (teacher,)  # a tuple hides it from the module tree
        self.backend = config.backend
        self.backend_report: list[str] = []
        self.part_weights = part_weights(config)
        self.part_names = list(self.part_weights)
        width = student_tapped.widths[0]
        # The width of another callable is not known before the first batch, which is checked as well.
        teacher_width = teacher.widths[0] if isinstance(teacher, FrozenTeacher | TeacherView) else width
        check_heads(width, config.heads, "student", teacher_width)
        check_heads(teacher_width, config.heads, "teacher", width)

    def forward(
        self, input_ids_BL: torch.Tensor, lengths_B: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ):
        """The weighted loss of a batch, a scalar with a graph, and its parts.

        `lengths_B` counts the real tokens of each row; padding is at the end. `segments` [B, S] are the lengths of each
        row's documents, padded with 0; attention and relations then stay inside each document.
        """
        mask = self._mask(lengths_B, segments)
        teacher, student = self._run_both(input_ids_BL, mask)
        self._choose_backend(teacher.layers[0][0], student.layers[0][0])
        losses = self._relation_losses(relation_kl, teacher, student, mask)
        if self.tail is not None:
            assert teacher.output_BLD is not None
            assert student.output_BLD is not None
            losses += self.tail.losses(teacher.output_BLD, student.output_BLD, mask, self.backend)
        loss = torch.stack([w * part for w, part in zip(self.part_weights.values(), losses, strict=True)]).sum()
        self._hooks.mark(LOSS)
        return loss, torch.stack(losses).detach()

    @torch.no_grad()
    def losses_by_row(
        self, input_ids_BL: torch.Tensor, lengths_B: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weighted relation loss of every row, [B], without gradient, dropout or tail term: for held-out text."""
        mask = self._mask(lengths_B, segments)
        with without_dropout(self.student), uncompiled():
            teacher, student = self._run_both(input_ids_BL, mask)
        self._choose_backend(teacher.layers[0][0], student.layers[0][0])
        losses = self._relation_losses(relation_kl_by_row, teacher, student, mask)
        return torch.stack([w * part for w, part in zip(self.part_weights.values(), losses, strict=False)]).sum(0)

    @torch.no_grad()
    def relation_maps(
        self,
        input_ids_BL: torch.Tensor,
        pair: str = "v-v",
        num_heads: int = 4,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Relation maps (1) of the first row, [2, num_heads, L, L] for teacher and student.

        `pair` is one of `part_names`, or a relation without layers ("v-v"), which means the first pair of layers.
        """
        maps, num_heads = [], min(num_heads, self.config.heads)
        mask = self._mask(None, None if segments is None else segments[:1])
        row_1L = input_ids_BL if len(input_ids_BL) == 1 else input_ids_BL[:1]
        allowed_1LL = None if mask.documents is None else mask.documents.mask(row_1L)[0]
        with without_dropout(self.student), uncompiled():
            outputs_of_both = self._run_both(row_1L, mask)
        for outputs in outputs_of_both:
            x_1LD, y_1LD = (
                x_BLD[:1, :, : num_heads * x_BLD.shape[-1] // self.config.heads].float()
                for x_BLD in self._related_tensors(pair, outputs)
            )
            maps.append(relation_log_probabilities(x_1LD, y_1LD, num_heads, allowed_1LL)[0].exp())
        return torch.stack(maps)

    def _related_tensors(self, part: str, outputs: TapOutputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The two tensors (often the same one) of a part's relation."""
        if part in (OUTPUT, POOLED):
            assert outputs.output_BLD is not None
            return outputs.output_BLD, outputs.output_BLD
        name, _, layers = part.partition("@")
        known = [f"{p.teacher}>{p.student}" for p in self.config.layers or []]
        projections = outputs.layers[known.index(layers) if layers else 0]
        first, second = _letters(name)
        return projections[first], projections[second]

    def _mask(self, lengths_B: torch.Tensor | None, segments: torch.Tensor | None) -> SequenceMask:
        documents = None if segments is None else Documents(segments, self._hooks.restart_positions)
        return SequenceMask(lengths_B, documents)

    def _run_both(self, input_ids_BL: torch.Tensor, mask: SequenceMask) -> tuple[TapOutputs, TapOutputs]:
        """Both models on one batch. They get a mask only where there is padding or documents are kept apart."""
        of_encoders = mask.of_encoders(input_ids_BL)
        with torch.inference_mode():
            teacher = self._teacher[0](input_ids_BL, of_encoders)
        self._hooks.mark(TEACHER)
        with self._hooks.around_student():
            student = self.student(input_ids_BL, of_encoders)
        self._hooks.mark(STUDENT)
        return self._unpack(teacher), self._unpack(student)

    def _unpack(self, result: Any) -> TapOutputs:
        taps, output_BLD = result if self.config.tail != "none" else (result, None)
        return TapOutputs([taps] if self.config.layers is None else taps, output_BLD)

    def _relation_losses(
        self, loss: Callable, teacher: TapOutputs, student: TapOutputs, mask: SequenceMask
    ) -> list[torch.Tensor]:
        """One loss per layer pair and relation, in the order of `part_names`."""
        losses = []
        for of_both in zip(teacher.layers, student.layers, strict=True):
            for first, second in map(_letters, self.config.pairs):
                related = (x[first] if first == second else (x[first], x[second]) for x in of_both)
                losses.append(loss(*related, self.config.heads, backend=self.backend, **mask.of_relations()))
        return losses

    def load_basis(self, basis_Dd: torch.Tensor | None) -> None:
        """Replace the basis that this start measured by a checkpoint's."""
        if self.tail is not None:
            self.tail.basis_Dd = basis_Dd

    def keep_backend(self, name: str | None) -> None:
        """Use the backend that the run began with, unless the recipe names one.

        A new choice depends on measured times. If it differed, so would the last bits of every later step.
        """
        if self.backend == "auto" and name in BACKENDS:
            self.backend = name
            self.backend_report = [
                f"relation backend {name}: kept, because the run began with it (`relations.backend` sets another)"
            ]

    def _choose_backend(self, teacher_BLD: torch.Tensor, student_BLD: torch.Tensor) -> None:
        """On the first batch, when shapes, precision and device are known."""
        if self.backend == "auto":
            self.backend, self.backend_report = choose_backend(
                teacher_BLD, student_BLD, self.config.heads, self._hooks.gather
            )
            for line in self.backend_report:
                logger.info(line)


def part_weights(config: RelationsConfig) -> dict[str, float]:
    """Name and weight of every part: "q-q", or "q-q@19>6" where several layers are matched; "output" and "pooled"
    are the tail."""
    if config.layers is None:
        weights = dict(config.pairs)
    else:
        weights = {
            f"{name}@{pair.teacher}>{pair.student}": pair.weight * weight
            for pair in config.layers
            for name, weight in config.pairs.items()
        }
    of_sentences = config.tail_weight if config.pooled_weight is None else config.pooled_weight
    tail = [(POOLED, of_sentences) if term == POOLED else (OUTPUT, config.tail_weight) for term in config.tail_terms]
    return {**weights, **dict(tail)}


def _letters(pair: str) -> tuple[int, int]:
    """Positions of a relation's two tensors in (Q, K, V)."""
    first, second = (LETTERS.index(letter) for letter in pair.split("-"))
    return first, second
