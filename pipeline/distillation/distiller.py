"""One training step's mathematics: a batch of token ids goes past teacher and student, the relation loss comes out.

`DistillModule` is what the training engine wraps. The teacher hangs beside it, not inside: it has no entry in
parameters, state or checkpoints, and no engine converts or partitions it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from pipeline.distillation.models.teacher import FrozenTeacher
from pipeline.distillation.relations.loss import BACKENDS, check_heads, relation_kl, relation_kl_by_row
from pipeline.distillation.relations.selection import Gather, alone, choose_backend
from pipeline.distillation.tap import Projections, TappedEncoder, without_dropout
from pipeline.errors import UserError
from pipeline.recipe.ranges import LARGEST_WEIGHT, check_ranges

LETTERS = "qkv"
OUTPUT = "output"  # the tail term among the parts
logger = logging.getLogger(__name__)


@dataclass
class LayerPair:
    """One teacher layer matched by one student layer, both counted from 1."""

    teacher: int  # the teacher's layer
    student: int  # the student's layer
    weight: float = 1.0  # of this pair's losses in the sum


@dataclass
class RelationsConfig:
    """Which relations of which layers are matched."""

    teacher_layer: int | None = None  # counted from 1; None: the last
    student_layer: int | None = None  # counted from 1; None: the last
    layers: list[LayerPair] | None = None  # several pairs instead of the two keys above
    heads: int = 48  # relation heads; must divide both widths
    pairs: dict[str, float] = field(default_factory=lambda: {"q-q": 1.0, "k-k": 1.0, "v-v": 1.0})  # pair: weight
    after_rotary: bool = False  # ModernBERT: read Q and K behind their rotary embedding
    tail: Literal["none", "relation", "mse"] = "none"  # a term for the student's output, above the distilled layer
    tail_weight: float = 1.0  # of that term in the sum
    backend: str = "auto"  # auto: checked and timed at the first batch; or a name of relations.BACKENDS

    def __post_init__(self) -> None:
        known = [f"{a}-{b}" for a in LETTERS for b in LETTERS]
        for pair in self.pairs:
            if pair not in known:
                raise UserError(f"`relations.pairs` names {pair!r}; a relation is one of {', '.join(known)}")
        _check_weights("relations.pairs", list(self.pairs.values()))
        if self.layers:
            _check_weights("relations.layers", [pair.weight for pair in self.layers])
        if not 0 <= self.tail_weight < math.inf:
            raise UserError(f"`relations.tail_weight` is {self.tail_weight}; it must be a number of at least 0")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise UserError(f"`relations.backend` is {self.backend!r}; it must be one of auto, {', '.join(BACKENDS)}")
        if self.layers is not None and (not self.layers or self.teacher_layer or self.student_layer):
            raise UserError(
                "`relations.layers` needs at least one pair, and no teacher_layer or student_layer beside it"
            )
        matched = [(pair.teacher, pair.student) for pair in self.layers or []]
        if len(set(matched)) < len(matched):
            raise UserError("`relations.layers` names the same two layers twice; give them one weight")
        weight = (0, LARGEST_WEIGHT)
        check_ranges(self, "relations", {"heads": (0, 2**16), "pairs": weight, "tail_weight": weight})
        for number, both in enumerate(self.layers or []):
            check_ranges(both, f"relations.layers[{number}]", {"weight": weight})

    @property
    def teacher_taps(self) -> int | list[int] | None:
        """What `load_teacher` and `build_student` take as the teacher's layer or layers."""
        return self.teacher_layer if self.layers is None else [pair.teacher for pair in self.layers]

    @property
    def student_taps(self) -> int | list[int] | None:
        """What `build_student` takes as the student's layer or layers."""
        return self.student_layer if self.layers is None else [pair.student for pair in self.layers]

    @property
    def tap_options(self) -> dict[str, bool]:
        """The tap's other options, the same for teacher and student."""
        return {"with_output": self.tail != "none", "after_rotary": self.after_rotary}


@dataclass
class TapOutputs:
    """What was read from one model: Q, K, V per tapped layer, and its output where a tail term wants it."""

    layers: list[Projections]
    output_BLD: torch.Tensor | None


@dataclass
class SequenceMask:
    """Which positions of a batch are real, and which of them may see each other; by default all."""

    lengths_B: torch.Tensor | None = None
    segments: torch.Tensor | None = None  # [B, S] lengths of each row's documents, filled up with 0; best on the host

    def real_tokens(self, like_BL: torch.Tensor) -> torch.Tensor | None:
        """1 at real tokens, 0 at padding; None where all are real."""
        if self.lengths_B is None and self.segments is None:
            return None
        counts_B = self.lengths_B if self.segments is None else self.segments.sum(1)
        assert counts_B is not None
        return (torch.arange(like_BL.shape[1], device=like_BL.device) < counts_B.to(like_BL.device)[:, None]).long()

    def attention_mask(self, input_ids_BL: torch.Tensor) -> torch.Tensor | None:
        """What the encoders get: None, [B, L], or block-diagonal [B, 1, L, L] bool."""
        if self.segments is None:
            return self.real_tokens(input_ids_BL)
        ends_BS = self.segments.to(input_ids_BL.device, non_blocking=True).cumsum(1)
        positions_BL = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device).expand_as(input_ids_BL)
        document_BL = torch.searchsorted(ends_BS, positions_BL.contiguous(), right=True)
        return (document_BL[:, :, None] == document_BL[:, None, :])[:, None]

    def of_relations(self) -> dict[str, Any]:
        """The arguments of `relation_kl` that say the same."""
        return {"lengths_B": self.lengths_B} if self.segments is None else {"segments": self._documents}

    @cached_property
    def _documents(self) -> list[list[int]]:
        """Lengths as Python numbers: read once per batch, and from the host without waiting for a GPU."""
        assert self.segments is not None
        return [[length for length in row if length] for row in self.segments.tolist()]


class DistillModule(nn.Module):
    """`(input_ids_BL, lengths_B=None, segments=None) -> (loss, parts)`; `parts` are the unweighted losses in
    `part_names`' order.

    `teacher` is any callable with the tap's call and results. Both must have been tapped as `config` says
    (`teacher_taps`, `student_taps`, `tap_options`). `gather` is how ranks agree on a backend at the first batch.
    `around_student` makes a context for the student's forward, such as one that chooses its kernels.
    `basis_Dd` says on which components a narrower student's output stands (`Student.basis_Dd`).
    """

    def __init__(
        self,
        teacher: Callable,
        student_tapped: TappedEncoder,
        config: RelationsConfig,
        gather: Gather = alone,
        basis_Dd: torch.Tensor | None = None,
        around_student: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        super().__init__()
        self._gather = gather
        self._around_student = around_student
        self.basis_Dd = basis_Dd  # no buffer: an engine in half precision would round it
        self.student = student_tapped
        self.config = config
        self._teacher = (teacher,)  # a tuple hides it from the module tree
        self.backend = config.backend
        self.backend_report: list[str] = []
        self.part_weights = _part_weights(config)
        self.part_names = list(self.part_weights)
        width = student_tapped.widths[0]
        teacher_width = (
            teacher.widths[0] if isinstance(teacher, FrozenTeacher) else width
        )  # else seen at the first batch
        check_heads(width, config.heads, "student", teacher_width)
        check_heads(teacher_width, config.heads, "teacher", width)

    def forward(
        self, input_ids_BL: torch.Tensor, lengths_B: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ):
        """`lengths_B`: padding at the end of rows. `segments` [B, S]: lengths of a row's documents, filled up with 0;
        attention and relations then stay inside each document."""
        extent = SequenceMask(lengths_B, segments)
        teacher, student = self._read(input_ids_BL, extent)
        self._choose_backend(teacher.layers[0][0], student.layers[0][0])
        losses = self._relation_losses(relation_kl, teacher, student, extent)
        if self.config.tail != "none":
            losses.append(self._tail_loss(teacher.output_BLD, student.output_BLD, extent))
        loss = torch.stack([w * part for w, part in zip(self.part_weights.values(), losses, strict=True)]).sum()
        return loss, torch.stack(losses).detach()

    @torch.no_grad()
    def losses_by_row(
        self, input_ids_BL: torch.Tensor, lengths_B: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weighted relation loss of every row, [B], without gradient, dropout or tail term: for held-out text."""
        extent = SequenceMask(lengths_B, segments)
        with without_dropout(self.student):
            teacher, student = self._read(input_ids_BL, extent)
        losses = self._relation_losses(relation_kl_by_row, teacher, student, extent)
        return torch.stack([w * part for w, part in zip(self.part_weights.values(), losses, strict=False)]).sum(0)

    @torch.no_grad()
    def relation_maps(
        self,
        input_ids_BL: torch.Tensor,
        pair: str = "v-v",
        num_heads: int = 4,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Relation matrices of the first row, [2, num_heads, L, L] for teacher and student, as probabilities.

        `pair` is one of `part_names`, or one without its layers, which stands for the first pair of layers.
        """
        maps = []
        extent = SequenceMask(None, None if segments is None else segments[:1])
        allowed_11LL = extent.attention_mask(input_ids_BL[:1])
        with without_dropout(self.student):
            readings = self._read(input_ids_BL[:1], extent)
        for reading in readings:
            queries_HLd, keys_HLd = (
                x_BLD[0].float().unflatten(-1, (self.config.heads, -1)).transpose(0, 1)[:num_heads]
                for x_BLD in self._tensors_of(pair, reading)
            )
            logits_HLL = queries_HLd @ keys_HLd.mT * queries_HLd.shape[-1] ** -0.5
            if allowed_11LL is not None:
                logits_HLL = logits_HLL.masked_fill(~allowed_11LL[0], float("-inf"))
            maps.append(logits_HLL.softmax(-1))
        return torch.stack(maps)

    def _tensors_of(self, pair: str, reading: TapOutputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The two tensors (often the same one) whose relation a part is about."""
        if pair == OUTPUT:
            assert reading.output_BLD is not None
            return reading.output_BLD, reading.output_BLD
        name, _, layers = pair.partition("@")
        known = [f"{p.teacher}>{p.student}" for p in self.config.layers or []]
        projections = reading.layers[known.index(layers) if layers else 0]
        first, second = _letters(name)
        return projections[first], projections[second]

    def _read(self, input_ids_BL: torch.Tensor, extent: SequenceMask) -> tuple[TapOutputs, TapOutputs]:
        """Both models on one batch; a mask only where there is padding, or documents are to be kept apart."""
        mask = extent.attention_mask(input_ids_BL)
        with torch.inference_mode():
            teacher = self._teacher[0](input_ids_BL, mask)
        with self._around_student():
            student = self.student(input_ids_BL, mask)
        return self._unpack(teacher), self._unpack(student)

    def _unpack(self, result: Any) -> TapOutputs:
        taps, output_BLD = result if self.config.tail != "none" else (result, None)
        return TapOutputs([taps] if self.config.layers is None else taps, output_BLD)

    def _relation_losses(
        self, loss: Callable, teacher: TapOutputs, student: TapOutputs, extent: SequenceMask
    ) -> list[torch.Tensor]:
        """One loss per layer pair and relation, in `part_names`' order."""
        losses = []
        for of_teacher, of_student in zip(teacher.layers, student.layers, strict=True):
            for first, second in map(_letters, self.config.pairs):
                keys: dict[str, torch.Tensor] = {}
                if first != second:
                    keys = {"teacher_keys_BLD": of_teacher[second], "student_keys_BLD": of_student[second]}
                of_both = (of_teacher[first], of_student[first])
                losses.append(loss(*of_both, self.config.heads, backend=self.backend, **keys, **extent.of_relations()))
        return losses

    def _tail_loss(self, teacher_BLD: Any, student_BLD: Any, extent: SequenceMask) -> torch.Tensor:
        """The term that gives the layers above the distilled one a signal: outputs' relation, or their distance."""
        if self.config.tail == "relation":
            return relation_kl(
                teacher_BLD, student_BLD, self.config.heads, backend=self.backend, **extent.of_relations()
            )
        target_BLD = teacher_BLD.float()
        if self.basis_Dd is not None:
            self.basis_Dd = self.basis_Dd.to(target_BLD.device)
            target_BLD = target_BLD @ self.basis_Dd
        if target_BLD.shape != student_BLD.shape:
            raise UserError(
                f"`relations.tail: mse` needs equal widths, not {teacher_BLD.shape[-1]} (teacher) and "
                f"{student_BLD.shape[-1]} (student), or a student whose layers are projected (`student.init: project`); "
                "use `tail: relation`"
            )
        distance_BL = (student_BLD.float() - target_BLD).square().mean(-1)
        real_BL = extent.real_tokens(distance_BL)
        return distance_BL.mean() if real_BL is None else ((distance_BL * real_BL).sum(1) / real_BL.sum(1)).mean()

    def load_basis(self, basis_Dd: torch.Tensor | None) -> None:
        """Replace the basis that this start measured by a checkpoint's."""
        self.basis_Dd = basis_Dd

    def keep_backend(self, name: str | None) -> None:
        """Go on with what an earlier life of the run chose: a new choice by the clock could differ, and with it the
        last bits of every later step. What the recipe pins stays."""
        if self.backend == "auto" and name in BACKENDS:
            self.backend = name
            self.backend_report = [
                f"relation backend {name}: kept, the run began with it (`relations.backend` pins another)"
            ]

    def _choose_backend(self, teacher_BLD: torch.Tensor, student_BLD: torch.Tensor) -> None:
        """On the first batch, when the shape, the precision and the device are known."""
        if self.backend == "auto":
            self.backend, self.backend_report = choose_backend(
                teacher_BLD, student_BLD, self.config.heads, self._gather
            )
            for line in self.backend_report:
                logger.info(line)


def _part_weights(config: RelationsConfig) -> dict[str, float]:
    """Name and weight of every part: "q-q", or "q-q@19>6" where several layers are matched; "output" is the tail."""
    if config.layers is None:
        weights = dict(config.pairs)
    else:
        weights = {
            f"{name}@{pair.teacher}>{pair.student}": pair.weight * weight
            for pair in config.layers
            for name, weight in config.pairs.items()
        }
    return weights if config.tail == "none" else {**weights, OUTPUT: config.tail_weight}


def _check_weights(key: str, weights: list[float]) -> None:
    """Numbers of at least 0, not all 0: a weight below would drive the student away, and NaN would spoil every step."""
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserError(
            f"`{key}` has the weights {weights}; at least one must be above zero, none below zero, and all must be finite"
        )


def _letters(pair: str) -> tuple[int, int]:
    first, second = (LETTERS.index(letter) for letter in pair.split("-"))
    return first, second
