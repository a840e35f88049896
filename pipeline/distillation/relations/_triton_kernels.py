"""The kernels of the `triton` backend. Only `fused` imports this module, because Triton may be missing.

`diagonals_kernel` finds the shift of each head, `sums_kernel` computes row sums and KL, `gradient_kernel` the complete
gradient. In the latter two a program has one head of one tile: SIDE tokens of a span against all tokens of the span,
SIDE at a time. It alone writes its results, so nothing is added atomically. Equation numbers are those of
docs/method.md. Logits are in base 2.

Tensors: X_T, X_S, GRADIENT [tokens, A * HEAD]; DIAGONALS [2, spans, A]; SHIFTS, FACTORS [2, A, tokens]; KL [slots, A];
SPANS [spans, 2] and TILES [tiles, 5]: `fused`. `*_T` is the teacher's, `*_S` the student's.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
# Largest diagonal with which one shift serves all rows of a span; see `chunked.MAX_DIAGONAL_LOG2`.
MAX_DIAGONAL = tl.constexpr(202.0)
# Keys at a time where a span has outlier tokens: their loops need more registers per key.
OUTLIER_KEYS = tl.constexpr(32)
# P_S + P_S^T - P_T - P_T^T (10) is between -2 and 2. Multiplied by this it fits into fp16, and the small differences of a
# student close to its teacher remain normal numbers.
DIFFERENCE_SCALE = tl.constexpr(2.0**14)


@triton.jit
def diagonals_kernel(
    X_T, X_S, DIAGONALS, SPANS, num_heads, num_spans, scale_T, scale_S,
    HEAD_T: tl.constexpr, HEAD_S: tl.constexpr, PADDED_T: tl.constexpr, PADDED_S: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The largest diagonal logit of a span and head, of both models. It bounds the head's logits (Cauchy-Schwarz)."""
    span, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    start, length = tl.load(SPANS + 2 * span).to(tl.int64), tl.load(SPANS + 2 * span + 1)
    TOKENS: tl.constexpr = 2 * SIDE  # of SIDE tokens in fp32, ptxas spills one of 40 registers
    largest_T, largest_S = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    for first in range(0, length, TOKENS):
        i = first + tl.arange(0, TOKENS)
        x_T = _channels(X_T, start, i, length, num_heads, head, HEAD_T, PADDED_T).to(tl.float32)
        x_S = _channels(X_S, start, i, length, num_heads, head, HEAD_S, PADDED_S).to(tl.float32)
        largest_T = tl.maximum(largest_T, tl.sum(x_T * x_T, 1))
        largest_S = tl.maximum(largest_S, tl.sum(x_S * x_S, 1))
    at = DIAGONALS + span * num_heads + head
    tl.store(at, tl.max(largest_T, 0) * scale_T)
    tl.store(at + num_spans * num_heads, tl.max(largest_S, 0) * scale_S)


@triton.jit
def sums_kernel(
    X_T, X_S, DIAGONALS, SHIFTS, FACTORS, KL, TILES, num_heads, num_spans, num_tokens, scale_T, scale_S,
    HEAD_T: tl.constexpr, HEAD_S: tl.constexpr, PADDED_T: tl.constexpr, PADDED_S: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """First pass: the shift and DIFFERENCE_SCALE / row sum of each query in both models, and the tile's sum of KL (3)."""
    tile, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    start, length, first_query, span, slot = _tile(TILES, tile)
    i = first_query + tl.arange(0, SIDE)
    queries_T = _channels(X_T, start, i, length, num_heads, head, HEAD_T, PADDED_T)
    queries_S = _channels(X_S, start, i, length, num_heads, head, HEAD_S, PADDED_S)
    half_T, half_S, has_outliers = _half_diagonals(DIAGONALS, span, num_spans, num_heads, head)
    sum_T, sum_S = tl.zeros([SIDE], tl.float32), tl.zeros([SIDE], tl.float32)
    mixed = tl.zeros([SIDE], tl.float32)
    shift_T, shift_S = sum_T + half_T, sum_S + half_S
    if has_outliers:  # row maxima, found while the sums are made
        shift_T, shift_S = sum_T, sum_S  # no row's maximum is below its diagonal, which is not below 0
        for first_key in range(0, length, OUTLIER_KEYS):
            j = first_key + tl.arange(0, OUTLIER_KEYS)
            keys_T = _channels(X_T, start, j, length, num_heads, head, HEAD_T, PADDED_T)
            keys_S = _channels(X_S, start, j, length, num_heads, head, HEAD_S, PADDED_S)
            logits_T, logits_S = _logits(queries_T, keys_T, scale_T), _logits(queries_S, keys_S, scale_S)
            real_j = (j < length)[None, :]
            new_T = tl.maximum(shift_T, tl.max(tl.where(real_j, logits_T, 0.0), 1))
            new_S = tl.maximum(shift_S, tl.max(tl.where(real_j, logits_S, 0.0), 1))
            map_T = tl.where(real_j, tl.exp2(logits_T - new_T[:, None]), 0.0)
            map_S = tl.where(real_j, tl.exp2(logits_S - new_S[:, None]), 0.0)
            rescaling_T = tl.exp2(shift_T - new_T)
            sum_T = sum_T * rescaling_T + tl.sum(map_T, 1)
            sum_S = sum_S * tl.exp2(shift_S - new_S) + tl.sum(map_S, 1)
            mixed = mixed * rescaling_T + tl.sum(map_T * (logits_T - logits_S), 1)
            shift_T, shift_S = new_T, new_S
    else:
        for first_key in range(0, length, SIDE):
            j = first_key + tl.arange(0, SIDE)
            keys_T = _channels(X_T, start, j, length, num_heads, head, HEAD_T, PADDED_T)
            keys_S = _channels(X_S, start, j, length, num_heads, head, HEAD_S, PADDED_S)
            logits_T, logits_S = _logits(queries_T, keys_T, scale_T), _logits(queries_S, keys_S, scale_S)
            is_real_j = (j < length).to(tl.float32)[
                None, :
            ]  # multiplied in the sum: one instruction less than a choice
            map_T, map_S = tl.exp2(logits_T - half_T), tl.exp2(logits_S - half_S)
            sum_T += tl.sum(map_T * is_real_j, 1)
            sum_S += tl.sum(map_S * is_real_j, 1)
            mixed += tl.sum(map_T * (logits_T - logits_S), 1)  # zero beyond the span
    kl_i = mixed / sum_T - (tl.log2(sum_T) + shift_T) + (tl.log2(sum_S) + shift_S)
    tl.store(KL + slot * num_heads + head, tl.sum(tl.where(i < length, kl_i, 0.0), 0) * LN_2)
    of_T, of_S = _rows(start, head, num_heads, num_tokens)
    tl.store(SHIFTS + of_T + i, shift_T, mask=i < length)
    tl.store(SHIFTS + of_S + i, shift_S, mask=i < length)
    tl.store(FACTORS + of_T + i, 1 / sum_T * DIFFERENCE_SCALE, mask=i < length)
    tl.store(FACTORS + of_S + i, 1 / sum_S * DIFFERENCE_SCALE, mask=i < length)


@triton.jit
def gradient_kernel(
    X_T, X_S, DIAGONALS, SHIFTS, FACTORS, GRADIENT, TILES, num_heads, num_spans, num_tokens, scale_T, scale_S,
    HEAD_T: tl.constexpr, HEAD_S: tl.constexpr, PADDED_T: tl.constexpr, PADDED_S: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Second pass: the complete gradient (10) of the tile's tokens. Keys beyond the span are zero in the products."""
    tile, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    start, length, first_query, span, _slot = _tile(TILES, tile)
    i = first_query + tl.arange(0, SIDE)
    queries_T = _channels(X_T, start, i, length, num_heads, head, HEAD_T, PADDED_T)
    queries_S = _channels(X_S, start, i, length, num_heads, head, HEAD_S, PADDED_S)
    half_T, half_S, has_outliers = _half_diagonals(DIAGONALS, span, num_spans, num_heads, head)
    of_T, of_S = _rows(start, head, num_heads, num_tokens)
    factor_i_T, factor_i_S = _load(FACTORS + of_T, i, length), _load(FACTORS + of_S, i, length)
    gradient = tl.zeros([SIDE, PADDED_S], tl.float32)
    if has_outliers:  # each of the two sides of (10) needs the shift of its own row
        shift_i_T, shift_i_S = _load(SHIFTS + of_T, i, length), _load(SHIFTS + of_S, i, length)
        for first_key in range(0, length, OUTLIER_KEYS):
            j = first_key + tl.arange(0, OUTLIER_KEYS)
            keys_T = _channels(X_T, start, j, length, num_heads, head, HEAD_T, PADDED_T)
            keys_S = _channels(X_S, start, j, length, num_heads, head, HEAD_S, PADDED_S)
            logits_T, logits_S = _logits(queries_T, keys_T, scale_T), _logits(queries_S, keys_S, scale_S)
            difference = (
                tl.exp2(logits_S - shift_i_S[:, None]) * factor_i_S[:, None]
                - tl.exp2(logits_T - shift_i_T[:, None]) * factor_i_T[:, None]
                + tl.exp2(logits_S - _load(SHIFTS + of_S, j, length)[None, :])
                * _load(FACTORS + of_S, j, length)[None, :]
                - tl.exp2(logits_T - _load(SHIFTS + of_T, j, length)[None, :])
                * _load(FACTORS + of_T, j, length)[None, :]
            )
            gradient += tl.dot(difference.to(keys_S.dtype), keys_S, input_precision="ieee")
    else:
        for first_key in range(0, length, SIDE):
            j = first_key + tl.arange(0, SIDE)
            keys_T = _channels(X_T, start, j, length, num_heads, head, HEAD_T, PADDED_T)
            keys_S = _channels(X_S, start, j, length, num_heads, head, HEAD_S, PADDED_S)
            factor_j_T, factor_j_S = _load(FACTORS + of_T, j, length), _load(FACTORS + of_S, j, length)
            map_T = tl.exp2(_logits(queries_T, keys_T, scale_T) - half_T)
            map_S = tl.exp2(_logits(queries_S, keys_S, scale_S) - half_S)
            difference = map_S * (factor_i_S[:, None] + factor_j_S[None, :])
            difference -= map_T * (factor_i_T[:, None] + factor_j_T[None, :])
            gradient += tl.dot(difference.to(keys_S.dtype), keys_S, input_precision="ieee")
    c = tl.arange(0, PADDED_S)
    at = (start + i)[:, None] * (num_heads * HEAD_S) + head * HEAD_S + c[None, :]
    tl.store(
        GRADIENT + at,
        gradient * (scale_S * LN_2 / DIFFERENCE_SCALE),
        mask=(i < length)[:, None] & (c < HEAD_S)[None, :],
    )


@triton.jit
def _tile(TILES, tile):
    """The first token and the length of the tile's span, the first query in it, the span's number, the slot of the KL."""
    at = TILES + 5 * tile
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def _channels(X, start, i, length, num_heads, head, HEAD: tl.constexpr, PADDED: tl.constexpr):
    """One head's channels of the tokens `i` of a span, [tokens, PADDED]; zero beyond the span and beyond the head."""
    c = tl.arange(0, PADDED)
    at = (start + i)[:, None] * (num_heads * HEAD) + head * HEAD + c[None, :]
    return tl.load(X + at, mask=(i < length)[:, None] & (c < HEAD)[None, :], other=0.0)


@triton.jit
def _logits(queries, keys, scale):
    return tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale


@triton.jit
def _half_diagonals(DIAGONALS, span, num_spans, num_heads, head):
    """The shifts of one span and head, and whether they are too far from some row's maximum."""
    at = DIAGONALS + span * num_heads + head
    largest_T, largest_S = tl.load(at), tl.load(at + num_spans * num_heads)
    return 0.5 * largest_T, 0.5 * largest_S, (largest_T >= MAX_DIAGONAL) | (largest_S >= MAX_DIAGONAL)


@triton.jit
def _rows(start, head, num_heads, num_tokens):
    """Where the entries of a span and head begin in SHIFTS and FACTORS, for teacher and student."""
    of_T = head.to(tl.int64) * num_tokens + start
    return of_T, of_T + num_heads.to(tl.int64) * num_tokens


@triton.jit
def _load(ROWS, i, length):
    return tl.load(ROWS + i, mask=i < length, other=0.0)
