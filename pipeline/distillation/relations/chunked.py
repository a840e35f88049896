"""The `chunked` backend: loss and gradient in one forward pass, tile by tile, in plain PyTorch on any device.

A tile is a few heads and some queries against all keys of one span. Its maps are overwritten by the next tile's, so
nothing of size L x L is kept. Equation numbers are those of docs/method.md.

Shape suffixes: B rows, L positions, D channels, A relation heads, d channels per head, N keys of the span, H heads of
the tile, R queries of the tile.
"""

from __future__ import annotations

import math

import torch

from pipeline.distillation.relations.backends import RelationInputs, RelationSums, relation_backend, working_dtype

LOG2_E = math.log2(math.e)
# Measured on an AVX-512 core with 1 MB of second-level cache: two fp32 maps of 2**18 entries per tile are fastest.
TILE_ENTRIES_CPU = 2**18
TILE_ENTRIES_GPU = 2**25
# With the shift c = half the largest diagonal entry, all logits - c are below 2**101 and every row has one above
# 2**-101. Sums over 8192 keys stay finite, and what underflows is below 2**-25 of its row. 101 * 2 / log2(e) = 140 in
# natural units.
MAX_DIAGONAL_LOG2 = 202.0

Pair = tuple[torch.Tensor, torch.Tensor]  # queries X and keys Y of one model


@relation_backend("chunked")
def chunked_relation(inputs: RelationInputs, with_gradient: bool) -> RelationSums:
    """Exact sums of KL per row and, if asked for, the gradient. Half precision is computed in fp32."""
    teacher_BLD, student_BLD, num_heads = inputs.teacher_BLD, inputs.student_BLD, inputs.num_heads
    dtype = working_dtype(student_BLD.dtype)
    sums = RelationSums(torch.zeros(student_BLD.shape[0], dtype=dtype, device=student_BLD.device), None, None)
    if with_gradient:
        sums.grad_queries_BLD = torch.zeros_like(student_BLD)
        sums.grad_keys_BLD = None if inputs.student_keys_BLD is None else torch.zeros_like(inputs.student_keys_BLD)
    fixed_shift = (inputs.teacher_keys_BLD is None and inputs.student_keys_BLD is None) and (
        max(_largest_diagonal(x_BLD, num_heads) for x_BLD in (teacher_BLD, student_BLD)) < MAX_DIAGONAL_LOG2
    )
    for span in inputs.spans:
        here = (span.row, slice(span.start, span.stop))
        x_T, x_S = (_split_heads(x_BLD[here], num_heads, dtype) for x_BLD in (teacher_BLD, student_BLD))
        y_T, y_S = (
            x if keys_BLD is None else _split_heads(keys_BLD[here], num_heads, dtype)
            for x, keys_BLD in ((x_T, inputs.teacher_keys_BLD), (x_S, inputs.student_keys_BLD))
        )
        kl, grad_queries, grad_keys = _span_relation((x_T, y_T), (x_S, y_S), fixed_shift, with_gradient)
        sums.kl_B[span.row] += kl
        if sums.grad_keys_BLD is not None:
            sums.grad_keys_BLD[here] = _join_heads(grad_keys)
        elif with_gradient:
            grad_queries += grad_keys
        if sums.grad_queries_BLD is not None:
            sums.grad_queries_BLD[here] = _join_heads(grad_queries)
    return sums


def _split_heads(x_ND: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, D] -> [A, d, N]: contiguous channels make a head. Positions run fastest, which the thin products need."""
    return x_ND.t().to(dtype).reshape(num_heads, -1, x_ND.shape[0])


def _join_heads(x_AdN: torch.Tensor) -> torch.Tensor:
    """[A, d, N] -> [N, D]."""
    return x_AdN.reshape(-1, x_AdN.shape[-1]).t()


def _largest_diagonal(x_BLD: torch.Tensor, num_heads: int) -> float:
    """Largest self-relation logit |x_i|^2 / sqrt(d) of any head, times log2(e); bounds every logit (Cauchy-Schwarz)."""
    head_dim = x_BLD.shape[-1] // num_heads
    x_BLAd = x_BLD.detach().unflatten(-1, (num_heads, head_dim)).to(working_dtype(x_BLD.dtype))
    return float(torch.linalg.vecdot(x_BLAd, x_BLAd).max()) * LOG2_E * head_dim**-0.5


def _span_relation(
    teacher: Pair, student: Pair, fixed_shift: bool, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All heads of one span, from [A, d, N] tensors: the sum of KL, the gradient for X [A, d, N], that for Y [A, d, N]."""
    teacher_AdN, teacher_keys_AdN = teacher
    student_AdN, student_keys_AdN = student
    num_heads, num_tokens = student_AdN.shape[0], student_AdN.shape[-1]
    budget = TILE_ENTRIES_CPU if student_AdN.device.type == "cpu" else TILE_ENTRIES_GPU
    heads_per_tile = min(num_heads, max(1, budget // num_tokens**2))
    queries_per_tile = min(num_tokens, max(1, budget // (heads_per_tile * num_tokens)))
    workspace = student_AdN.new_empty(2, heads_per_tile * num_tokens * queries_per_tile)
    kl = student_AdN.new_zeros(())
    grad_queries_AdN = torch.empty_like(student_AdN)
    grad_keys_AdN = torch.zeros_like(student_AdN)
    for head in range(0, num_heads, heads_per_tile):
        heads = slice(head, head + heads_per_tile)
        shifts = (_shift(teacher_AdN[heads]), _shift(student_AdN[heads])) if fixed_shift else (None, None)
        for query in range(0, num_tokens, queries_per_tile):
            queries = slice(query, query + queries_per_tile)
            kl_tile, grad_queries, grad_keys = _tile_relation(
                (teacher_AdN[heads, :, queries], teacher_keys_AdN[heads]),
                (student_AdN[heads, :, queries], student_keys_AdN[heads]),
                shifts,
                workspace,
                with_gradient,
            )
            kl += kl_tile
            if grad_queries is not None and grad_keys is not None:
                grad_queries_AdN[heads, :, queries] = grad_queries
                grad_keys_AdN[heads] += grad_keys
    return kl, grad_queries_AdN, grad_keys_AdN


def _shift(x_HdN: torch.Tensor) -> torch.Tensor:
    """Half the largest diagonal logit of each head, base 2, [H, 1, 1]."""
    return (x_HdN.square().sum(1).amax(-1) * (0.5 * LOG2_E * x_HdN.shape[1] ** -0.5))[:, None, None]


def _tile_relation(
    teacher: Pair,
    student: Pair,
    shifts: tuple[torch.Tensor | None, torch.Tensor | None],
    workspace: torch.Tensor,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss (4) and gradient (6), (7) of one tile, from queries [H, d, R] and keys [H, d, N] of each model."""
    (teacher_HdR, teacher_keys_HdN), (student_HdR, student_keys_HdN) = teacher, student
    scale_T, scale_S = teacher_HdR.shape[1] ** -0.5, student_HdR.shape[1] ** -0.5
    map_T_HNR, shift_T = _exponentials(teacher_HdR * scale_T, teacher_keys_HdN, shifts[0], workspace[0])
    map_S_HNR, shift_S = _exponentials(student_HdR * scale_S, student_keys_HdN, shifts[1], workspace[1])

    # One product gives both mixtures of (4) and, by the column of ones, the row sums.
    ones_H1N = torch.ones_like(student_keys_HdN[:, :1])
    mixed_T = torch.bmm(torch.cat([teacher_keys_HdN, student_keys_HdN, ones_H1N], dim=1), map_T_HNR)
    sum_T_H1R, sum_S_H1R = mixed_T[:, -1:], map_S_HNR.sum(1, keepdim=True)
    mixed_T = mixed_T[:, :-1] / sum_T_H1R

    # (4): KL = <x_T, P_T y_T> - <x_S, P_T y_S> - lse_T + lse_S, each inner product scaled by its model's 1/sqrt(d).
    products_HdR = torch.cat([teacher_HdR * scale_T, student_HdR * -scale_S], dim=1) * mixed_T
    log_sums_H1R = (sum_S_H1R.log2() + shift_S) - (sum_T_H1R.log2() + shift_T)
    kl = products_HdR.sum() + log_sums_H1R.sum() / LOG2_E
    if not with_gradient:
        return kl, None, None
    # (5): dKL/dlogits = P_S - P_T. Subtracting the maps, not their products, keeps the gradient exact near the optimum.
    difference_HNR = map_S_HNR.mul_(1 / sum_S_H1R).sub_(map_T_HNR.mul_(1 / sum_T_H1R))
    grad_queries_HdR = torch.bmm(student_keys_HdN * scale_S, difference_HNR)  # (6)
    grad_keys_HdN = torch.bmm(student_HdR * scale_S, difference_HNR.transpose(1, 2))  # (7)
    return kl, grad_queries_HdR, grad_keys_HdN


def _exponentials(
    scaled_queries_HdR: torch.Tensor, keys_HdN: torch.Tensor, shift: torch.Tensor | None, buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logits - shift) as [H, N, R] in `buffer`, and the shift in base 2. Shift None: each query's maximum.

    Base 2 because `exp2` runs three times as fast as `exp` in torch's CPU kernels.
    """
    shape = (keys_HdN.shape[0], keys_HdN.shape[-1], scaled_queries_HdR.shape[-1])
    map_HNR = buffer[: math.prod(shape)].view(shape)
    queries = scaled_queries_HdR * LOG2_E
    if shift is None:
        torch.bmm(keys_HdN.transpose(1, 2), queries, out=map_HNR)
        shift = map_HNR.amax(1, keepdim=True)
        map_HNR.sub_(shift)
    else:
        torch.baddbmm(-shift, keys_HdN.transpose(1, 2), queries, out=map_HNR)
    return map_HNR.exp2_(), shift
