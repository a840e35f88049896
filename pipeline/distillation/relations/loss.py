"""Multi-head self-attention relation loss of MiniLMv2 (arXiv 2012.15828), exact, in O(sequence) memory.

In: Q, K or V of one layer of teacher and student. Out: equation (2) of docs/method.md, the mean over rows of
1 / (A |x|) sum KL(teacher || student), where a relation (1) is softmax(X Y^T / sqrt(D / A)) in each relation head.
The backend computes the gradient (6), (7) in the forward pass. It is kept without the factor 1 / (A |x| B) and
multiplied in fp32 in backward, so that fp16 does not underflow.

Shape suffixes: B rows of the batch, L positions of a row, D channels (each model has its own D). A is the number of
relation heads, |x| the number of real tokens of a row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from pipeline.distillation.relations.backends import (
    BACKENDS,
    RelationInputs,
    RelationSums,
    Span,
    cached_on_device,
    working_dtype,
)
from pipeline.errors import UserError

DEFAULT_BACKEND = "chunked"  # of `backend="auto"`: correct on every device, without a measurement
Related = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # X, related with itself, or (queries X, keys Y)


def relation_kl(
    teacher_BLD: Related,
    student_BLD: Related,
    num_relation_heads: int,
    lengths_B: torch.Tensor | None = None,
    backend: str = "auto",
    segments: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """Relation loss (2) of a batch.

    Args:
        teacher_BLD: Q, K or V of the teacher, [B, L, D]; a pair (queries, keys) is the relation of two tensors (Q-K).
        student_BLD: the same of the student, with its own D and dtype.
        num_relation_heads: A; must divide both widths.
        lengths_B: number of real tokens of each row, best on the host, which reads them; padding is at the end. A row of
            padding alone counts as 0 in the mean. None: all positions are real.
        backend: a name in `BACKENDS`, or "auto" for `DEFAULT_BACKEND`.
        segments: per row the lengths of its stretches, in order. Tokens of one stretch see only each other; every token
            keeps the weight that it has without segments. What follows the last stretch is padding.

    Returns:
        A scalar in fp32 (float64 for float64 input), differentiable in the student's tensors. `torch.autocast` changes nothing in
        here: products in half precision would cost the gradient three digits.

    Raises:
        UserError: A does not divide a width, or there is no such backend.
        ValueError: the shapes, lengths or segments do not fit each other.
    """
    return relation_kl_by_row(teacher_BLD, student_BLD, num_relation_heads, lengths_B, backend, segments).mean()


def relation_kl_by_row(
    teacher_BLD: Related,
    student_BLD: Related,
    num_relation_heads: int,
    lengths_B: torch.Tensor | None = None,
    backend: str = "auto",
    segments: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """The loss of each row, [B]; its mean is `relation_kl`, with the same arguments."""
    x_T, y_T = queries_and_keys(teacher_BLD)
    x_S, y_S = queries_and_keys(student_BLD)
    check_heads(x_T.shape[-1], num_relation_heads, "teacher", x_S.shape[-1])
    check_heads(x_S.shape[-1], num_relation_heads, "student", x_T.shape[-1])
    if x_T.shape[:2] != x_S.shape[:2]:
        raise ValueError(f"teacher {tuple(x_T.shape)} and student {tuple(x_S.shape)} differ in [B, L]")
    check_backend(backend)
    compute = BACKENDS[DEFAULT_BACKEND if backend == "auto" else backend]
    stretches = _stretches(x_S.shape[0], x_S.shape[1], lengths_B, segments)
    spans = _spans(stretches, x_S.shape[1])
    weight_B = _weights(x_S.device, stretches, num_relation_heads, working_dtype(x_S.dtype))

    def sums(x_S: torch.Tensor, y_S: torch.Tensor | None, with_gradient: bool) -> RelationSums:
        teacher, student = (x_T.detach(), _detached(y_T)), (x_S.detach(), _detached(y_S))
        if not spans:  # padding alone
            gradients = [None if x is None else torch.zeros_like(x) for x in (x_S, y_S)]
            return RelationSums(torch.zeros_like(weight_B), *gradients)
        with torch.autocast(x_S.device.type, enabled=False):
            return compute(RelationInputs(*teacher, *student, num_relation_heads, spans), with_gradient)

    return _GradientInForward.apply(x_S, y_S, weight_B, sums)


def queries_and_keys(related: Related) -> tuple[torch.Tensor, torch.Tensor | None]:
    """X and Y of a relation; Y is None where X is related with itself."""
    return (related, None) if isinstance(related, torch.Tensor) else related


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def check_backend(name: str) -> None:
    """Raise a `UserError` unless `name` is "auto" or a name in `BACKENDS`."""
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"`relations.backend` is {name!r}; it must be one of auto, {', '.join(BACKENDS)}")


def check_heads(width: int, num_relation_heads: int, role: str, other_width: int = 0) -> None:
    """Raise a `UserError` unless A divides the width D of the model that messages call `role`. The message lists the
    numbers of heads that divide `other_width`, that of the other model, as well."""
    if num_relation_heads < 1 or width % num_relation_heads:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if math.gcd(width, other_width) % n == 0)
        raise UserError(
            f"{num_relation_heads} relation heads do not divide the {role}'s width of {width}. "
            f"Set `relations.heads` to one of: {divisors}"
        )


Stretches = tuple[tuple[int, ...], ...]  # per row the lengths of its stretches of tokens that see each other


def _stretches(
    batch: int, length: int, lengths_B: torch.Tensor | None, segments: Sequence[Sequence[int]] | None
) -> Stretches:
    """The rows' stretches, from the arguments of `relation_kl`."""
    if segments is not None and lengths_B is not None:
        raise ValueError("give `lengths_B` or `segments`, not both: what follows a row's last segment is padding")
    if segments is None:
        return ((length,),) * batch if lengths_B is None else tuple((int(n),) if n else () for n in lengths_B.tolist())
    if len(segments) != batch:
        raise ValueError(f"{len(segments)} rows of lengths for a batch of {batch}")
    return tuple(map(tuple, segments))


@functools.lru_cache(maxsize=16)
def _spans(stretches: Stretches, length: int) -> tuple[Span, ...]:
    """All stretches with their places."""
    spans: list[Span] = []
    for row, parts in enumerate(stretches):
        start = 0
        for size in parts:
            spans.append(Span(row, start, start + size))
            start += size
        if start > length or min(parts, default=1) < 1:
            raise ValueError(f"row {row}: stretches of {list(parts)} tokens do not fit a row of {length}")
    return tuple(spans)


@cached_on_device
def _weights(stretches: Stretches, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """1 / (A |x|) of each row; 0 for a row of padding alone."""
    weights = [1.0 / (num_heads * sum(parts)) if parts else 0.0 for parts in stretches]
    return torch.tensor(weights, dtype=torch.float64).to(dtype)


class _GradientInForward(torch.autograd.Function):
    """The loss of each row. For backward it saves the unscaled gradient, of the size of X, and no map."""

    @staticmethod
    def forward(
        ctx,
        x_S: torch.Tensor,
        y_S: torch.Tensor | None,
        weight_B: torch.Tensor,
        sums: Callable[[torch.Tensor, torch.Tensor | None, bool], RelationSums],
    ) -> torch.Tensor:
        with_gradient = any(ctx.needs_input_grad[:2])
        result = sums(x_S, y_S, with_gradient)
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
