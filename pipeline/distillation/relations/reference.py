"""The `reference` backend: the paper's equations in float64, every map materialised.

Slow on purpose, and the yardstick. Differentiable by autograd. Used by the tests and by the start-up check of the
other backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def relation_log_probabilities(queries_BLD: torch.Tensor, keys_BLD: torch.Tensor, num_heads: int, allowed_BLL):
    """log softmax(X Y^T / sqrt(d)) per relation head, [B, A, L, L]; keys that are not allowed get -inf."""
    queries_BALd = queries_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    keys_BALd = keys_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    logits_BALL = queries_BALd @ keys_BALd.transpose(-1, -2) / queries_BALd.shape[-1] ** 0.5
    if allowed_BLL is not None:
        logits_BALL = logits_BALL.masked_fill(~allowed_BLL[:, None], float("-inf"))
    return logits_BALL.log_softmax(-1)


def allowed_keys(
    batch: int, length: int, lengths_B: torch.Tensor | None, segments: Sequence[Sequence[int]] | None, device
) -> torch.Tensor:
    """Which key each query may see, [B, L, L] bool; a padded query sees itself, so that its softmax is finite."""
    positions_L = torch.arange(length, device=device)
    segment_BL = torch.zeros(batch, length, dtype=torch.long, device=device)
    if lengths_B is not None:
        segment_BL = torch.where(positions_L < lengths_B.to(device)[:, None], 0, 1 + positions_L)
    for row, parts in enumerate(segments or ()):
        ids = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts, dtype=torch.long))
        segment_BL[row, : len(ids)] = ids.to(device)
        segment_BL[row, len(ids) :] = len(parts) + positions_L[len(ids) :]
    return segment_BL[:, :, None] == segment_BL[:, None, :]


def relation_kl_reference(
    teacher_BLD: torch.Tensor,
    student_BLD: torch.Tensor,
    num_relation_heads: int,
    lengths_B: torch.Tensor | None = None,
    *,
    teacher_keys_BLD: torch.Tensor | None = None,
    student_keys_BLD: torch.Tensor | None = None,
    segments: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """Mean over rows of 1/(A |x|) sum KL(teacher || student), in float64; autograd gives the gradient."""
    batch, length, _ = student_BLD.shape
    allowed_BLL = allowed_keys(batch, length, lengths_B, segments, student_BLD.device)
    log_T, log_S = (
        relation_log_probabilities(x.double(), (x if y is None else y).double(), num_relation_heads, allowed_BLL)
        for x, y in ((teacher_BLD.detach(), teacher_keys_BLD), (student_BLD, student_keys_BLD))
    )
    difference = torch.where(allowed_BLL[:, None], log_T - log_S, 0.0)
    kl_BAL = (log_T.exp() * difference).sum(-1)
    if segments is not None:
        counts_B = torch.tensor([sum(parts) for parts in segments], device=student_BLD.device)
    elif lengths_B is not None:
        counts_B = lengths_B.to(student_BLD.device)
    else:
        counts_B = torch.full((batch,), length, device=student_BLD.device)
    real_BL = torch.arange(length, device=student_BLD.device) < counts_B[:, None]
    return ((kl_BAL * real_BL[:, None]).sum((1, 2)) / (num_relation_heads * counts_B)).mean()
