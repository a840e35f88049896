"""The reference: equations (1) and (2) of docs/method.md in float64, with every map in memory.

It is slow, and every backend is compared with it: by the tests, and on a GPU by the check on the first batch. Autograd
differentiates it.

Shape suffixes: B rows, L positions, D channels, A relation heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.distillation.relations.loss import Related, queries_and_keys


def relation_log_probabilities(queries_BLD: torch.Tensor, keys_BLD: torch.Tensor, num_heads: int, allowed_BLL):
    """The logarithm of (1), log softmax(X Y^T / sqrt(d)), [B, A, L, L]; keys that are not allowed get -inf."""
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
    teacher_BLD: Related,
    student_BLD: Related,
    num_relation_heads: int,
    lengths_B: torch.Tensor | None = None,
    segments: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """Equation (2) and its mean over rows, a float64 scalar; the arguments are those of `relation_kl`."""
    (x_T, y_T), (x_S, y_S) = queries_and_keys(teacher_BLD), queries_and_keys(student_BLD)
    batch, length, _ = x_S.shape
    allowed_BLL = allowed_keys(batch, length, lengths_B, segments, x_S.device)
    log_T, log_S = (
        relation_log_probabilities(x.double(), (x if y is None else y).double(), num_relation_heads, allowed_BLL)
        for x, y in ((x_T.detach(), y_T), (x_S, y_S))
    )
    difference = torch.where(allowed_BLL[:, None], log_T - log_S, 0.0)
    kl_BAL = (log_T.exp() * difference).sum(-1)
    if segments is not None:
        counts_B = torch.tensor([sum(parts) for parts in segments], device=x_S.device)
    elif lengths_B is not None:
        counts_B = lengths_B.to(x_S.device)
    else:
        counts_B = torch.full((batch,), length, device=x_S.device)
    real_BL = torch.arange(length, device=x_S.device) < counts_B[:, None]
    return ((kl_BAL * real_BL[:, None]).sum((1, 2)) / (num_relation_heads * counts_B.clamp(min=1))).mean()
