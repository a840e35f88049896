"""The `chunked` backend: loss and gradient in one forward pass, tile by tile, in plain PyTorch on any device.

A tile is a few heads and some queries against all keys of one span, or all heads of several rows that are one stretch
each. Its maps are overwritten by the next tile's, so nothing of size L x L is kept. Equation numbers are those of docs/method.md.

Shape suffixes: B rows, L positions, D channels, A relation heads, d channels per head, G rows that share tiles, N keys of
the span, H heads of the tile (of one row, or all of G rows), R queries of the tile.
"""

from __future__ import annotations

import functools
import math

import torch

from pipeline.distillation.relations.backends import (
    RelationInputs,
    RelationSums,
    Span,
    relation_backend,
    working_dtype,
)

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
    fixed_shift = _may_have_fixed_shift(inputs)
    budget = TILE_ENTRIES_CPU if student_BLD.device.type == "cpu" else TILE_ENTRIES_GPU
    for rows, tokens in _blocks(inputs.spans):
        rows_per_tile = max(1, budget // (num_heads * (tokens.stop - tokens.start) ** 2))
        for row in range(rows.start, rows.stop, rows_per_tile):
            here = (slice(row, min(row + rows_per_tile, rows.stop)), tokens)
            x_T, x_S = (_split_heads(x_BLD[here], num_heads, dtype) for x_BLD in (teacher_BLD, student_BLD))
            y_T, y_S = (
                x if keys_BLD is None else _split_heads(keys_BLD[here], num_heads, dtype)
                for x, keys_BLD in ((x_T, inputs.teacher_keys_BLD), (x_S, inputs.student_keys_BLD))
            )
            kl_G, grad_queries, grad_keys = _rows_relation(
                (x_T, y_T), (x_S, y_S), num_heads, fixed_shift, with_gradient
            )
            sums.kl_B[here[0]] += kl_G
            if sums.grad_keys_BLD is not None:
                sums.grad_keys_BLD[here] = _join_heads(grad_keys, num_heads)
            elif with_gradient:
                grad_queries += grad_keys
            if sums.grad_queries_BLD is not None:
                sums.grad_queries_BLD[here] = _join_heads(grad_queries, num_heads)
    return sums


@functools.lru_cache(maxsize=16)
def _blocks(spans: tuple[Span, ...]) -> tuple[tuple[slice, slice], ...]:
    """Rows and tokens of spans that are the same stretch of consecutive rows, as all rows of a packed batch are."""
    blocks: list[tuple[slice, slice]] = []
    for row, start, stop in spans:
        if blocks and blocks[-1][0].stop == row and blocks[-1][1] == slice(start, stop):
            blocks[-1] = (slice(blocks[-1][0].start, row + 1), blocks[-1][1])
        else:
            blocks.append((slice(row, row + 1), slice(start, stop)))
    return tuple(blocks)


def _split_heads(x_GND: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """[G, N, D] -> [G * A, d, N]: contiguous channels make a head. One row of fp32 is not copied."""
    return x_GND.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(dtype).flatten(0, 1).mT


def _join_heads(x_HdN: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[G * A, d, N] -> [G, N, D]."""
    return x_HdN.unflatten(0, (-1, num_heads)).flatten(1, 2).transpose(1, 2)


def _may_have_fixed_shift(inputs: RelationInputs) -> bool:
    """Whether one shift per head serves all its rows. A GPU computes row maxima instead, because the host would wait."""
    if inputs.teacher_keys_BLD is not None or inputs.student_keys_BLD is not None:
        return False
    models = (inputs.teacher_BLD, inputs.student_BLD)
    return inputs.student_BLD.device.type == "cpu" and all(
        _largest_diagonal(x_BLD, inputs.num_heads) < MAX_DIAGONAL_LOG2 for x_BLD in models
    )


def _largest_diagonal(x_BLD: torch.Tensor, num_heads: int) -> float:
    """Largest self-relation logit |x_i|^2 / sqrt(d) of any head, times log2(e); bounds every logit (Cauchy-Schwarz)."""
    head_dim = x_BLD.shape[-1] // num_heads
    x_BLAd = x_BLD.detach().unflatten(-1, (num_heads, head_dim)).to(working_dtype(x_BLD.dtype))
    return torch.linalg.vecdot(x_BLAd, x_BLAd).max().tolist() * LOG2_E * head_dim**-0.5


def _rows_relation(
    teacher: Pair, student: Pair, num_heads: int, fixed_shift: bool, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One stretch of G rows, from [G * A, d, N] tensors: the sums of KL [G], the gradients for X and Y [G * A, d, N]."""
    (x_T, y_T), (x_S, y_S) = teacher, student
    num_maps, _, num_tokens = x_S.shape
    budget = TILE_ENTRIES_CPU if x_S.device.type == "cpu" else TILE_ENTRIES_GPU
    heads_per_tile = min(num_maps, max(1, budget // num_tokens**2))
    queries_per_tile = min(num_tokens, max(1, budget // (heads_per_tile * num_tokens)))
    workspace = x_S.new_empty(2, heads_per_tile * num_tokens * queries_per_tile)
    kl_G = x_S.new_zeros(num_maps // num_heads)
    grad_queries_HdN = torch.empty_like(x_S)
    grad_keys_HdN = torch.zeros_like(x_S)
    for head in range(0, num_maps, heads_per_tile):
        heads = slice(head, head + heads_per_tile)
        shifts = (_shift(x_T[heads]), _shift(x_S[heads])) if fixed_shift else (None, None)
        for query in range(0, num_tokens, queries_per_tile):
            queries = slice(query, query + queries_per_tile)
            of_teacher, of_student = (x_T[heads, :, queries], y_T[heads]), (x_S[heads, :, queries], y_S[heads])
            kl_tile_G, grad_queries, grad_keys = _tile_relation(
                of_teacher, of_student, shifts, workspace, len(kl_G), with_gradient
            )
            kl_G += kl_tile_G
            if grad_queries is not None and grad_keys is not None:
                grad_queries_HdN[heads, :, queries] = grad_queries
                grad_keys_HdN[heads] += grad_keys
    return kl_G, grad_queries_HdN, grad_keys_HdN


def _shift(x_HdN: torch.Tensor) -> torch.Tensor:
    """Half the largest diagonal logit of each head, base 2, [H, 1, 1]."""
    return (x_HdN.square().sum(1).amax(-1) * (0.5 * LOG2_E * x_HdN.shape[1] ** -0.5))[:, None, None]


def _tile_relation(
    teacher: Pair,
    student: Pair,
    shifts: tuple[torch.Tensor | None, torch.Tensor | None],
    workspace: torch.Tensor,
    num_rows: int,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss (4) [G] and gradient (6), (7) of one tile, from queries [H, d, R] and keys [H, d, N] of each model."""
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
    kl_G = products_HdR.view(num_rows, -1).sum(1) + log_sums_H1R.view(num_rows, -1).sum(1) / LOG2_E
    if not with_gradient:
        return kl_G, None, None
    # (5): dKL/dlogits = P_S - P_T. Subtracting the maps, not their products, keeps the gradient exact near the optimum.
    difference_HNR = map_S_HNR.mul_(1 / sum_S_H1R).sub_(map_T_HNR.mul_(1 / sum_T_H1R))
    grad_queries_HdR = torch.bmm(student_keys_HdN * scale_S, difference_HNR)  # (6)
    grad_keys_HdN = torch.bmm(student_HdR * scale_S, difference_HNR.transpose(1, 2))  # (7)
    return kl_G, grad_queries_HdR, grad_keys_HdN


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
