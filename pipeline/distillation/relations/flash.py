"""The `flash` backend: the same loss and gradient out of four stock attention forwards, no kernel of our own.

For devices where attention kernels are fast and maps are dear. P y is attention; P^T x is attention too, with the roles
of queries and keys exchanged and the bias -lse_i on what were the queries. Biases (and the padding mask) ride in spare
head channels, so no mask argument is needed. Derivation: docs/method.md, equations (8) and (9).
Shape letters: S spans (stretches of tokens, padded to the longest), A relation heads, N positions, d channels per head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from pipeline.distillation.relations.chunked import RelationSums, Span, working_dtype

MASKED = -30000.0  # times the scale still far below every logit, and finite in fp16
CHANNEL_MULTIPLE = 8  # what the attention kernels ask of head sizes
# Squared head norms bound every logit and what `_attend_transposed` carries as a bias; half of fp16's range.
MAX_SQUARED_NORM_FP16 = 3e4
attention_ops = torch.ops.aten


def flash_relation(
    teacher_BLD: torch.Tensor,
    teacher_keys_BLD: torch.Tensor | None,
    student_BLD: torch.Tensor,
    student_keys_BLD: torch.Tensor | None,
    num_heads: int,
    spans: Sequence[Span],
    with_gradient: bool,
) -> RelationSums:
    """Same contract as `chunked_relation`. Attention runs in `_attention_dtype`, everything else in fp32."""
    dtype = _attention_dtype([teacher_BLD, teacher_keys_BLD, student_BLD, student_keys_BLD], num_heads)
    longest = max(span.stop - span.start for span in spans)
    lengths_S = torch.tensor([span.stop - span.start for span in spans])
    real_SN = torch.arange(longest) < lengths_S[:, None]
    mask_SN = None if bool(real_SN.all()) else real_SN.to(student_BLD.device)

    def gather(x_BLD: torch.Tensor) -> torch.Tensor:
        return _gather(x_BLD.to(dtype), spans, longest, num_heads)

    x_T, x_S = gather(teacher_BLD), gather(student_BLD)
    y_T = x_T if teacher_keys_BLD is None else gather(teacher_keys_BLD)
    y_S = x_S if student_keys_BLD is None else gather(student_keys_BLD)
    kl_SN, grad_queries, grad_keys = _four_attentions(x_T, y_T, x_S, y_S, mask_SN, with_gradient)
    rows_S = torch.tensor([span.row for span in spans], device=student_BLD.device)
    is_of_row_BS = torch.arange(student_BLD.shape[0], device=student_BLD.device)[:, None] == rows_S
    kl_B = torch.where(is_of_row_BS, kl_SN.sum(1), 0.0).sum(1)  # `index_add_` adds in any order on a GPU
    if not with_gradient:
        return RelationSums(kl_B, None, None)
    if student_keys_BLD is None:
        return RelationSums(kl_B, _scatter(grad_queries + grad_keys, spans, student_BLD), None)
    return RelationSums(kl_B, _scatter(grad_queries, spans, student_BLD), _scatter(grad_keys, spans, student_keys_BLD))


def _attention_dtype(tensors: Sequence[torch.Tensor | None], num_heads: int) -> torch.dtype:
    """Half precision attends in fp16, bf16 too: exact on the way in where the values fit, and the attention kernels
    round their results to 11 bits instead of 8 (gradient error with peaked maps 5.8e-3 instead of 4.1e-2). Values that
    do not fit (outlier tokens) attend in fp32, where fp16 would give NaN."""
    given = [x_BLD for x_BLD in tensors if x_BLD is not None]
    dtype = functools.reduce(torch.promote_types, (x_BLD.dtype for x_BLD in given))
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    largest = max(float(x.detach().unflatten(-1, (num_heads, -1)).float().square().sum(-1).max()) for x in given)
    return torch.float16 if largest < MAX_SQUARED_NORM_FP16 else torch.float32


def _four_attentions(x_T, y_T, x_S, y_S, mask_SN, with_gradient: bool):
    """KL summed over heads [S, N] and the gradients for the student's queries and keys [S, A, N, d]."""
    work = working_dtype(x_S.dtype)
    scale_T, scale_S = x_T.shape[-1] ** -0.5, x_S.shape[-1] ** -0.5
    masked = [] if mask_SN is None else [torch.where(mask_SN, 0.0, MASKED)[:, None, :].expand(x_S.shape[:3])]
    mixed_T, lse_T = _attend(x_T, y_T, torch.cat([y_T, y_S], dim=-1), masked, scale_T)
    mixed_S, lse_S = _attend(x_S, y_S, y_S, masked, scale_S)
    own_mix, cross_mix = mixed_T.to(work).split([x_T.shape[-1], x_S.shape[-1]], dim=-1)
    kl_SAN = scale_T * (x_T.to(work) * own_mix).sum(-1) - scale_S * (x_S.to(work) * cross_mix).sum(-1) - lse_T + lse_S
    real = 1.0 if mask_SN is None else mask_SN[:, None, :, None].to(work)
    kl_SN = (kl_SAN[..., None] * real).sum((1, 3))
    if not with_gradient:
        return kl_SN, None, None
    grad_queries = (mixed_S.to(work) - cross_mix) * (scale_S * real)
    transposed_S = _attend_transposed(x_S, y_S, x_S, lse_S, masked, scale_S)
    transposed_T = _attend_transposed(x_T, y_T, x_S, lse_T, masked, scale_T)
    return kl_SN, grad_queries, (transposed_S - transposed_T) * (scale_S * real)


def _attend_transposed(queries, keys, values, lse_SAN, masked: list[torch.Tensor], scale: float) -> torch.Tensor:
    """P^T values: keys attend to queries with bias -lse_i, undone from the softmax's own normalisation."""
    rest, parts = -lse_SAN / scale, []
    for _ in range(1 if queries.dtype in (torch.float32, torch.float64) else 3):
        part = rest.to(queries.dtype)  # one half-precision number is too coarse for lse: gradient errors up to 0.37
        parts.append(part)
        rest = rest - part.to(rest.dtype)
    mixed, lse = _attend(keys, queries, values, masked + parts, scale)
    return mixed.to(lse.dtype) * lse.exp()[..., None]


def _attend(queries, keys, values, key_biases: list[torch.Tensor], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * (queries keys^T + biases)) values, and the log of its sums."""
    biases = [bias[..., None].to(keys.dtype) for bias in key_biases]
    width = max(queries.shape[-1] + len(biases), values.shape[-1])
    width += -width % CHANNEL_MULTIPLE
    queries = torch.cat([queries, *(torch.ones_like(bias) for bias in biases)], dim=-1)
    keys = torch.cat([keys, *biases], dim=-1)
    padded = [functional.pad(x, (0, width - x.shape[-1])) for x in (queries, keys, values)]
    if queries.device.type == "cpu":
        mixed, lse = attention_ops._scaled_dot_product_flash_attention_for_cpu(*padded, 0.0, False, scale=scale)[:2]
    elif queries.dtype in (torch.float16, torch.bfloat16):
        mixed, lse = attention_ops._scaled_dot_product_flash_attention(*padded, 0.0, False, scale=scale)[:2]
    else:
        mixed, lse = attention_ops._scaled_dot_product_efficient_attention(*padded, None, True, scale=scale)[:2]
    return mixed[..., : values.shape[-1]], lse[..., : queries.shape[2]].to(working_dtype(queries.dtype))


def _gather(x_BLD: torch.Tensor, spans: Sequence[Span], longest: int, num_heads: int) -> torch.Tensor:
    """[B, L, D] -> [S, A, N, d], short spans padded with zeros."""
    if _are_whole_rows(spans, x_BLD):
        x_SND = x_BLD
    else:
        x_SND = x_BLD.new_zeros(len(spans), longest, x_BLD.shape[-1])
        for row, span in enumerate(spans):
            x_SND[row, : span.stop - span.start] = x_BLD[span.row, span.start : span.stop]
    return x_SND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _scatter(grad_SANd: torch.Tensor, spans: Sequence[Span], like_BLD: torch.Tensor) -> torch.Tensor:
    """The way back: [S, A, N, d] -> [B, L, D] in the tensor's own dtype, zero at padding."""
    grad_SND = grad_SANd.transpose(1, 2).flatten(2).to(like_BLD.dtype)
    if _are_whole_rows(spans, like_BLD):
        return grad_SND
    grad_BLD = torch.zeros_like(like_BLD)
    for row, span in enumerate(spans):
        grad_BLD[span.row, span.start : span.stop] = grad_SND[row, : span.stop - span.start]
    return grad_BLD


def _are_whole_rows(spans: Sequence[Span], x_BLD: torch.Tensor) -> bool:
    """Every row one span: then nothing needs to be copied row by row, which on a GPU costs a launch each."""
    return len(spans) == x_BLD.shape[0] and all(
        span.row == row and span.stop - span.start == x_BLD.shape[1] for row, span in enumerate(spans)
    )
