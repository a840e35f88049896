"""One training step's mathematics: a batch of token ids goes past teacher and student, the relation loss comes out.

`DistillModule` is what the training engine wraps. The teacher hangs beside it, not inside: it has no entry in
parameters, state or checkpoints, and no engine converts or partitions it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.distillation.relations import BACKENDS, check_heads, relation_kl, relation_kl_by_row
from pipeline.distillation.tap import Projections, TappedEncoder
from pipeline.distillation.teacher import FrozenTeacher
from pipeline.errors import UserError

LETTERS = "qkv"


@dataclass
class RelationsConfig:
    """Which relations of which layers are matched."""

    teacher_layer: int | None = None  # counted from 1; None: the last
    student_layer: int | None = None  # counted from 1; None: the last
    heads: int = 48  # relation heads; must divide both widths
    pairs: dict[str, float] = field(default_factory=lambda: {"q-q": 1.0, "k-k": 1.0, "v-v": 1.0})  # pair: weight
    backend: str = "auto"  # auto: chosen for the device; or a name of relations.BACKENDS

    def __post_init__(self) -> None:
        known = [f"{a}-{b}" for a in LETTERS for b in LETTERS]
        for pair in self.pairs:
            if pair not in known:
                raise UserError(f"`relations.pairs` names {pair!r}; a relation is one of {', '.join(known)}")
        if not self.pairs or min(self.pairs.values()) < 0 or not any(self.pairs.values()):
            raise UserError("`relations.pairs` needs at least one relation with a positive weight, and none below zero")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise UserError(f"`relations.backend` is {self.backend!r}; it must be one of auto, {', '.join(BACKENDS)}")


class DistillModule(nn.Module):
    """`(input_ids_BL, lengths_B=None) -> (loss, parts)`; `parts` are the unweighted losses in `part_names`' order.

    `teacher` is any callable `(input_ids, attention_mask) -> (q, k, v)`; the tapped encoders must tap one layer each.
    """

    def __init__(self, teacher: Callable, student_tapped: TappedEncoder, config: RelationsConfig) -> None:
        super().__init__()
        self.student = student_tapped
        self.config = config
        self._teacher = (teacher,)  # a tuple hides it from the module tree
        self.part_names = list(config.pairs)
        check_heads(student_tapped.widths[0], config.heads, "student")
        if isinstance(teacher, FrozenTeacher):
            check_heads(teacher.widths[0], config.heads, "teacher")

    def forward(self, input_ids_BL: torch.Tensor, lengths_B: torch.Tensor | None = None):
        teacher, student = self._projections(input_ids_BL, lengths_B)
        losses = [self._relation(relation_kl, pair, teacher, student, lengths_B) for pair in self.part_names]
        loss = torch.stack([w * part for w, part in zip(self.config.pairs.values(), losses, strict=True)]).sum()
        return loss, torch.stack(losses).detach()

    @torch.no_grad()
    def losses_by_row(self, input_ids_BL: torch.Tensor, lengths_B: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted relation loss of every row, [B], without gradient and without dropout: for held-out text."""
        was_training = self.student.training
        self.student.eval()
        teacher, student = self._projections(input_ids_BL, lengths_B)
        self.student.train(was_training)
        parts = [
            weight * self._relation(relation_kl_by_row, pair, teacher, student, lengths_B)
            for pair, weight in self.config.pairs.items()
        ]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def relation_maps(self, input_ids_BL: torch.Tensor, pair: str = "v-v", num_heads: int = 4) -> torch.Tensor:
        """Relation matrices of the first row, [2, num_heads, L, L] for teacher and student, as probabilities."""
        was_training = self.student.training
        self.student.eval()
        both = self._projections(input_ids_BL[:1], None)
        self.student.train(was_training)
        maps = []
        for projections in both:
            queries_HLd, keys_HLd = (
                projections[LETTERS.index(letter)][0].float().unflatten(-1, (self.config.heads, -1)).transpose(0, 1)
                for letter in pair.split("-")
            )
            logits_HLL = queries_HLd[:num_heads] @ keys_HLd[:num_heads].mT * queries_HLd.shape[-1] ** -0.5
            maps.append(logits_HLL.softmax(-1))
        return torch.stack(maps)

    def _projections(
        self, input_ids_BL: torch.Tensor, lengths_B: torch.Tensor | None
    ) -> tuple[Projections, Projections]:
        """Q, K, V of teacher and student; a mask only where there is padding."""
        mask_BL = None
        if lengths_B is not None:
            positions_L = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
            mask_BL = (positions_L < lengths_B[:, None]).long()
        with torch.inference_mode():
            teacher = self._teacher[0](input_ids_BL, mask_BL)
        return teacher, self.student(input_ids_BL, mask_BL)

    def _relation(self, loss: Callable, pair: str, teacher: Projections, student: Projections, lengths_B):
        first, second = (LETTERS.index(letter) for letter in pair.split("-"))
        keys = {}
        if first != second:
            keys = {"teacher_keys_BLD": teacher[second], "student_keys_BLD": student[second]}
        return loss(teacher[first], student[first], self.config.heads, lengths_B, self.config.backend, **keys)
