"""Multi-head self-attention relation loss of MiniLMv2 (arXiv 2012.15828), exact, in O(sequence) memory.

In: Q, K or V of one layer of teacher and student. Out: the mean over rows of 1/(A |x|) sum KL(teacher || student),
where a relation is softmax(X X^T / sqrt(d/A)) per relation head, each model with its own d/A. The gradient is
computed in the forward pass, tile by tile, kept without the factor 1/(A |x| B), and scaled in fp32 in backward, so
fp16 does not underflow. Used by `distiller.py`; the backends are `relation_tiles.py` (any device) and `oracle.py`
(float64, tests only).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from pipeline.distillation.relations.chunked import RelationSums, Span, chunked_relation, working_dtype
from pipeline.distillation.relations.flash import flash_relation
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.errors import UserError

__all__ = ["BACKENDS", "check_heads", "default_backend", "relation_kl", "relation_kl_by_row", "relation_kl_reference"]

Backend = Callable[..., RelationSums]
BACKENDS: dict[str, Backend] = {"chunked": chunked_relation, "flash": flash_relation}


def relation_kl(
    teacher_BLD: torch.Tensor,
    student_BLD: torch.Tensor,
    num_relation_heads: int,
    lengths_B: torch.Tensor | None = None,
    backend: str = "auto",
    *,
    teacher_keys_BLD: torch.Tensor | None = None,
    student_keys_BLD: torch.Tensor | None = None,
    segments: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """Relation loss as a scalar (fp32; float64 for float64 input), differentiable in the student's tensors.

    `lengths_B` marks padding at the end of rows. `segments` (per row the lengths of its stretches, in order) keeps
    relations inside each stretch; every token keeps the weight that it has without segments. With `*_keys_BLD` the
    relation is between two different tensors (Q-K) instead of one with itself. The models may differ in width and
    dtype.
    """
    return relation_kl_by_row(
        teacher_BLD,
        student_BLD,
        num_relation_heads,
        lengths_B,
        backend,
        teacher_keys_BLD=teacher_keys_BLD,
        student_keys_BLD=student_keys_BLD,
        segments=segments,
    ).mean()


def relation_kl_by_row(
    teacher_BLD: torch.Tensor,
    student_BLD: torch.Tensor,
    num_relation_heads: int,
    lengths_B: torch.Tensor | None = None,
    backend: str = "auto",
    *,
    teacher_keys_BLD: torch.Tensor | None = None,
    student_keys_BLD: torch.Tensor | None = None,
    segments: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """The loss of each row, [B]; its mean is `relation_kl`."""
    check_heads(teacher_BLD.shape[-1], num_relation_heads, "teacher", student_BLD.shape[-1])
    check_heads(student_BLD.shape[-1], num_relation_heads, "student", teacher_BLD.shape[-1])
    if teacher_BLD.shape[:2] != student_BLD.shape[:2]:
        raise ValueError(f"teacher {tuple(teacher_BLD.shape)} and student {tuple(student_BLD.shape)} differ in [B, L]")
    if backend != "auto" and backend not in BACKENDS:
        raise UserError(f"`relations.backend` is {backend!r}; it must be one of auto, {', '.join(BACKENDS)}")
    compute = BACKENDS[default_backend(student_BLD) if backend == "auto" else backend]
    spans, counts = _spans(student_BLD.shape[0], student_BLD.shape[1], lengths_B, segments)
    weight_B = torch.tensor([1.0 / (num_relation_heads * n) for n in counts], dtype=torch.float64)
    weight_B = weight_B.to(student_BLD.device, working_dtype(student_BLD.dtype))

    def sums(queries_BLD: torch.Tensor, keys_BLD: torch.Tensor | None, with_gradient: bool) -> RelationSums:
        return compute(
            teacher_BLD.detach(),
            None if teacher_keys_BLD is None else teacher_keys_BLD.detach(),
            queries_BLD.detach(),
            None if keys_BLD is None else keys_BLD.detach(),
            num_relation_heads,
            spans,
            with_gradient,
        )

    return _GradientInForward.apply(student_BLD, student_keys_BLD, weight_B, sums)


def default_backend(student_BLD: torch.Tensor) -> str:
    """What `backend="auto"` means for a tensor: the backend that is right and fast without measuring anything."""
    return "chunked"


def check_heads(width: int, num_relation_heads: int, role: str, other_width: int = 0) -> None:
    """A `UserError` where `num_relation_heads` does not divide `width`, naming the head counts that would do: those that
    divide the other model's width as well, if it is known."""
    if num_relation_heads < 1 or width % num_relation_heads:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if math.gcd(width, other_width) % n == 0)
        raise UserError(
            f"{num_relation_heads} relation heads do not divide the {role}'s width of {width}. "
            f"Set `relations.heads` to one of: {divisors}"
        )


def _spans(
    batch: int, length: int, lengths_B: torch.Tensor | None, segments: Sequence[Sequence[int]] | None
) -> tuple[list[Span], list[int]]:
    """Stretches of tokens that see each other, and the number |x| of real tokens per row."""
    if segments is not None and lengths_B is not None:
        raise ValueError("give `lengths_B` or `segments`, not both: what follows a row's last segment is padding")
    if segments is None:
        counts = [length] * batch if lengths_B is None else [int(n) for n in lengths_B.tolist()]
        segments = [[n] for n in counts]
    spans: list[Span] = []
    for row, parts in enumerate(segments):
        start = 0
        for size in parts:
            spans.append(Span(row, start, start + size))
            start += size
        if not 0 < start <= length or min(parts) < 1:
            raise ValueError(f"row {row}: stretches of {list(parts)} tokens do not fit a row of {length}")
    if len(segments) != batch:
        raise ValueError(f"{len(segments)} rows of lengths for a batch of {batch}")
    return spans, [sum(parts) for parts in segments]


class _GradientInForward(torch.autograd.Function):
    """Loss per row; what it saves for backward is the finished, unscaled gradient and no map."""

    @staticmethod
    def forward(ctx, student_BLD, student_keys_BLD, weight_B, sums):
        with_gradient = any(ctx.needs_input_grad[:2])
        result = sums(student_BLD, student_keys_BLD, with_gradient)
        if with_gradient:
            ctx.save_for_backward(weight_B, result.grad_queries_BLD, result.grad_keys_BLD)
        return result.kl_B * weight_B

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B):
        weight_B, *gradients = ctx.saved_tensors
        scale_B11 = (weight_B * grad_B)[:, None, None]
        scaled = [None if g is None else (g * scale_B11).to(g.dtype) for g in gradients]
        return *scaled, None, None
