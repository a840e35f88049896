"""The `flash` backend: the same loss and gradient from four stock attention forward calls, without a custom kernel.

For devices on which attention kernels are fast and maps are expensive. P y is attention. P^T x is attention with the
roles of queries and keys exchanged and the bias -lse_i per query of P (8). Biases and the padding mask are put into
spare head channels (9), so no mask argument is needed. Equation numbers are those of docs/method.md.

Shape suffixes: B rows, L positions, D channels, S spans (padded to the longest), A relation heads, N positions of a
span, d channels per head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from pipeline.distillation.relations.backends import (
    RelationInputs,
    RelationSums,
    Span,
    relation_backend,
    working_dtype,
)

MASKED = -30000.0  # times the scale still far below every logit, and finite in fp16
CHANNEL_MULTIPLE = 8  # attention kernels require head sizes that are multiples of it
# Squared head norms bound every logit and the bias in `_attend_transposed`; half of fp16's range.
MAX_SQUARED_NORM_FP16 = 3e4
attention_ops = torch.ops.aten


@relation_backend("flash")
def flash_relation(inputs: RelationInputs, with_gradient: bool) -> RelationSums:
    """Sums of KL per row and, if asked for, the gradient. Attention runs in `_attention_dtype`, the rest in fp32."""
    student_BLD, spans, num_heads = inputs.student_BLD, inputs.spans, inputs.num_heads
    dtype = _attention_dtype(
        [inputs.teacher_BLD, inputs.teacher_keys_BLD, student_BLD, inputs.student_keys_BLD], num_heads
    )
    longest = max(span.stop - span.start for span in spans)
    lengths_S = torch.tensor([span.stop - span.start for span in spans])
    real_SN = torch.arange(longest) < lengths_S[:, None]
    mask_SN = None if bool(real_SN.all()) else real_SN.to(student_BLD.device)

    def gather(x_BLD: torch.Tensor) -> torch.Tensor:
        return _gather(x_BLD.to(dtype), spans, longest, num_heads)

    x_T, x_S = gather(inputs.teacher_BLD), gather(student_BLD)
    y_T = x_T if inputs.teacher_keys_BLD is None else gather(inputs.teacher_keys_BLD)
    y_S = x_S if inputs.student_keys_BLD is None else gather(inputs.student_keys_BLD)
    kl_SN, grad_queries, grad_keys = _four_attentions(x_T, y_T, x_S, y_S, mask_SN, with_gradient)
    rows_S = torch.tensor([span.row for span in spans], device=student_BLD.device)
    is_of_row_BS = torch.arange(student_BLD.shape[0], device=student_BLD.device)[:, None] == rows_S
    kl_B = torch.where(is_of_row_BS, kl_SN.sum(1), 0.0).sum(1)  # `index_add_` adds in any order on a GPU
    if not with_gradient:
        return RelationSums(kl_B, None, None)
    if inputs.student_keys_BLD is None:
        return RelationSums(kl_B, _scatter(grad_queries + grad_keys, spans, student_BLD), None)
    grad_keys_BLD = _scatter(grad_keys, spans, inputs.student_keys_BLD)
    return RelationSums(kl_B, _scatter(grad_queries, spans, student_BLD), grad_keys_BLD)


def _attention_dtype(tensors: Sequence[torch.Tensor | None], num_heads: int) -> torch.dtype:
    """The dtype in which attention runs: fp16 for half precision whose values fit into fp16, else the inputs' own.

    bf16 converts to fp16 exactly where the values fit, and the kernels then round their results to 11 bits instead of 8:
    with peaked maps the gradient error is 5.8e-3 instead of 4.1e-2. Half precision that does not fit (outlier tokens)
    runs in fp32, because fp16 would give NaN.
    """
    given = [x_BLD for x_BLD in tensors if x_BLD is not None]
    dtype = functools.reduce(torch.promote_types, (x_BLD.dtype for x_BLD in given))
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    largest = max(float(x.detach().unflatten(-1, (num_heads, -1)).float().square().sum(-1).max()) for x in given)
    return torch.float16 if largest < MAX_SQUARED_NORM_FP16 else torch.float32


def _four_attentions(x_T, y_T, x_S, y_S, mask_SN, with_gradient: bool):
    """KL (4) summed over heads, [S, N], and the gradients (6), (7) for X and Y of the student, [S, A, N, d]."""
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
    """P^T values (8): keys attend to queries with bias -lse_i, and the softmax's own normaliser Z is multiplied back."""
    rest, parts = -lse_SAN / scale, []
    for _ in range(1 if queries.dtype in (torch.float32, torch.float64) else 3):
        part = rest.to(queries.dtype)  # one half-precision number is too coarse for lse: gradient errors up to 0.37
        parts.append(part)
        rest = rest - part.to(rest.dtype)
    mixed, lse = _attend(keys, queries, values, masked + parts, scale)
    return mixed.to(lse.dtype) * lse.exp()[..., None]


def _attend(queries, keys, values, key_biases: list[torch.Tensor], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * (queries keys^T + biases)) values, and the logarithm of its row sums; biases as in (9)."""
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
    if _are_full_rows(spans, x_BLD):
        x_SND = x_BLD
    else:
        x_SND = x_BLD.new_zeros(len(spans), longest, x_BLD.shape[-1])
        for row, span in enumerate(spans):
            x_SND[row, : span.stop - span.start] = x_BLD[span.row, span.start : span.stop]
    return x_SND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _scatter(grad_SANd: torch.Tensor, spans: Sequence[Span], like_BLD: torch.Tensor) -> torch.Tensor:
    """The inverse of `_gather`: [S, A, N, d] -> [B, L, D] in the dtype of `like_BLD`, zero at padding."""
    grad_SND = grad_SANd.transpose(1, 2).flatten(2).to(like_BLD.dtype)
    if _are_full_rows(spans, like_BLD):
        return grad_SND
    grad_BLD = torch.zeros_like(like_BLD)
    for row, span in enumerate(spans):
        grad_BLD[span.row, span.start : span.stop] = grad_SND[row, : span.stop - span.start]
    return grad_BLD


def _are_full_rows(spans: Sequence[Span], x_BLD: torch.Tensor) -> bool:
    """Whether every span is one full row. Then no row has to be copied on its own, which costs a launch on a GPU."""
    return len(spans) == x_BLD.shape[0] and all(
        span.row == row and span.stop - span.start == x_BLD.shape[1] for row, span in enumerate(spans)
    )
