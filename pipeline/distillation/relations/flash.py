"""The `flash` backend: the same loss and gradient from four stock attention forward calls, without a custom kernel.

For devices on which attention kernels are fast and maps are expensive. P y is attention. P^T x is attention with the
roles of queries and keys exchanged and the bias -lse_i per query of P (8). Biases and the padding mask are put into
spare head channels (9), so no mask argument is needed. Equation numbers are those of docs/method.md.

Spans of similar length are padded to the longest of them and computed together. All indices are made on the host and
copied once per layout; the host reads nothing.

Shape suffixes: B rows, L positions, D channels, S spans (padded to the longest), A relation heads, N positions of a
span, d channels per head, R real tokens of the spans.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn import functional

from pipeline.distillation.relations.backends import (
    RelationInputs,
    RelationSums,
    Span,
    cached_on_device,
    relation_backend,
    working_dtype,
)

CHANNEL_MULTIPLE = 8  # attention kernels require head sizes that are multiples of it
SPAN_GROUPS, SMALLEST_GROUP_STEP = (
    4,
    64,
)  # lengths are grouped by quarters of the longest, but by no less than 64 tokens
# The channel opposite a part of a bias. In fp16 one number is too coarse for -lse_i (gradient errors up to 0.37) and too
# small for an outlier token's. Three parts have an error of 3e-8 for small ones, and reach 2e9.
HALF_PRECISION_FACTORS = (2.0**15, 2.0**4, 1.0)
MASKED = -30000.0  # times 2**15, on which attention's scale follows: far below every logit
attention_ops = torch.ops.aten


class KeyBias(NamedTuple):
    """What is added to the logits of each key: `values_SAN` times `factor`, before the scale."""

    values_SAN: torch.Tensor
    factor: float


@relation_backend("flash")
def flash_relation(inputs: RelationInputs, with_gradient: bool) -> RelationSums:
    """Sums of KL per row and, if asked for, the gradient. Attention runs in `_attention_dtype`, the rest in fp32."""
    student_BLD, keys_BLD = inputs.student_BLD, inputs.student_keys_BLD
    kl_B = torch.zeros(student_BLD.shape[0], dtype=working_dtype(student_BLD.dtype), device=student_BLD.device)
    sums = RelationSums(kl_B, None, None)
    if with_gradient:
        sums.grad_queries_BLD = torch.zeros_like(student_BLD)
        sums.grad_keys_BLD = None if keys_BLD is None else torch.zeros_like(keys_BLD)
    for spans in _groups(inputs.spans):
        _add_group(sums, inputs, spans)
    return sums


def _add_group(sums: RelationSums, inputs: RelationInputs, spans: tuple[Span, ...]) -> None:
    """Add the KL and write the gradients of spans that are padded to one length."""
    student_BLD, device = inputs.student_BLD, inputs.student_BLD.device
    layout = None if _are_full_rows(spans, student_BLD) else (spans, student_BLD.shape[1])
    has_padding = len({span.stop - span.start for span in spans}) > 1
    mask_SN = _real_tokens(device, spans) if has_padding else None
    dtype = _attention_dtype(inputs)

    def gather(x_BLD: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [S, A, N, d]; what follows a short span is masked."""
        x_SND = x_BLD.to(dtype) if layout is None else x_BLD.to(dtype).flatten(0, 1)[_tokens(device, *layout)]
        return x_SND.unflatten(-1, (inputs.num_heads, -1)).transpose(1, 2)

    def scatter(grad_SANd: torch.Tensor, into_BLD: torch.Tensor) -> None:
        grad_SND = grad_SANd.transpose(1, 2).flatten(2).to(into_BLD.dtype)
        if layout is None:
            into_BLD.copy_(grad_SND)
        else:
            places_2R = _real_places(device, *layout)
            into_BLD.view(-1, into_BLD.shape[-1]).index_copy_(0, places_2R[1], grad_SND.flatten(0, 1)[places_2R[0]])

    x_T, x_S = gather(inputs.teacher_BLD), gather(student_BLD)
    y_T = x_T if inputs.teacher_keys_BLD is None else gather(inputs.teacher_keys_BLD)
    y_S = x_S if inputs.student_keys_BLD is None else gather(inputs.student_keys_BLD)
    with_gradient = sums.grad_queries_BLD is not None
    kl_SN, grad_queries, grad_keys = _four_attentions(x_T, y_T, x_S, y_S, mask_SN, with_gradient)
    is_of_row_BS = _rows(device, spans, student_BLD.shape[0])
    sums.kl_B += torch.where(is_of_row_BS, kl_SN.sum(1), 0.0).sum(1)  # `index_add_` adds in any order on a GPU
    if sums.grad_queries_BLD is not None:
        scatter(grad_queries + grad_keys if sums.grad_keys_BLD is None else grad_queries, sums.grad_queries_BLD)
    if sums.grad_keys_BLD is not None:
        scatter(grad_keys, sums.grad_keys_BLD)


def _attention_dtype(inputs: RelationInputs) -> torch.dtype:
    """The dtype in which attention runs: fp16 for half precision, else the inputs' own.

    bf16 converts to fp16 exactly, and the kernels then round their results to 11 bits instead of 8: with peaked maps the
    gradient error is 5.8e-3 instead of 4.1e-2. A value beyond fp16's range (65504) becomes infinite, and the loss NaN.
    """
    given = (inputs.teacher_BLD, inputs.teacher_keys_BLD, inputs.student_BLD, inputs.student_keys_BLD)
    dtype = functools.reduce(torch.promote_types, (x_BLD.dtype for x_BLD in given if x_BLD is not None))
    return torch.float16 if dtype == torch.bfloat16 else dtype


def _four_attentions(x_T, y_T, x_S, y_S, mask_SN, with_gradient: bool):
    """KL (4) summed over heads, [S, N], and the gradients (6), (7) for X and Y of the student, [S, A, N, d]."""
    work = working_dtype(x_S.dtype)
    scale_T, scale_S = x_T.shape[-1] ** -0.5, x_S.shape[-1] ** -0.5
    masked = []
    if mask_SN is not None:
        masked = [
            KeyBias(torch.where(mask_SN, 0.0, MASKED)[:, None, :].expand(x_S.shape[:3]), HALF_PRECISION_FACTORS[0])
        ]
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


def _attend_transposed(queries, keys, values, lse_SAN, masked: list[KeyBias], scale: float) -> torch.Tensor:
    """P^T values (8): keys attend to queries with bias -lse_i, and the softmax's own normaliser Z is multiplied back."""
    rest, parts = -lse_SAN / scale, []
    for factor in (1.0,) if queries.dtype in (torch.float32, torch.float64) else HALF_PRECISION_FACTORS:
        part = (rest / factor).to(queries.dtype)
        parts.append(KeyBias(part, factor))
        rest = rest - part.to(rest.dtype) * factor
    mixed, lse = _attend(keys, queries, values, masked + parts, scale)
    return mixed.to(lse.dtype) * lse.exp()[..., None]


def _attend(queries, keys, values, biases: list[KeyBias], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * (queries keys^T + biases)) values, and the logarithm of its row sums; biases as in (9)."""
    width = max(queries.shape[-1] + len(biases), values.shape[-1])
    width += -width % CHANNEL_MULTIPLE
    factors = [queries.new_full((), bias.factor).expand(*queries.shape[:3], 1) for bias in biases]
    queries = torch.cat([queries, *factors], dim=-1)
    keys = torch.cat([keys, *(bias.values_SAN[..., None].to(keys.dtype) for bias in biases)], dim=-1)
    padded = [functional.pad(x, (0, width - x.shape[-1])) for x in (queries, keys, values)]
    if queries.device.type == "cpu":
        mixed, lse = attention_ops._scaled_dot_product_flash_attention_for_cpu(*padded, 0.0, False, scale=scale)[:2]
    elif _has_flash_kernels(queries):
        mixed, lse = attention_ops._scaled_dot_product_flash_attention(*padded, 0.0, False, scale=scale)[:2]
    else:
        mixed, lse = attention_ops._scaled_dot_product_efficient_attention(*padded, None, True, scale=scale)[:2]
    return mixed[..., : values.shape[-1]], lse[..., : queries.shape[2]].to(working_dtype(queries.dtype))


def _has_flash_kernels(x: torch.Tensor) -> bool:
    """Half precision on compute capability 8.0 and later. V100 and T4 have memory-efficient attention only."""
    return x.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(x.device) >= (8, 0)


@functools.lru_cache(maxsize=16)
def _groups(spans: tuple[Span, ...]) -> tuple[tuple[Span, ...], ...]:
    """Spans of similar length. Padding all to the longest would compute many pairs of tokens for nothing."""
    longest = max(span.stop - span.start for span in spans)
    step = max(SMALLEST_GROUP_STEP, -(-longest // SPAN_GROUPS))
    groups: dict[int, list[Span]] = {}
    for span in spans:
        groups.setdefault((span.stop - span.start - 1) // step, []).append(span)
    return tuple(map(tuple, groups.values()))


def _are_full_rows(spans: tuple[Span, ...], x_BLD: torch.Tensor) -> bool:
    """Whether the spans are all rows of the batch, in order. Then nothing has to be gathered."""
    batch, length, _ = x_BLD.shape
    return spans == tuple(Span(row, 0, length) for row in range(batch))


@cached_on_device
def _real_tokens(spans: tuple[Span, ...]) -> torch.Tensor:
    """Where a padded span has tokens, bool [S, N]."""
    lengths = [span.stop - span.start for span in spans]
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@cached_on_device
def _tokens(spans: tuple[Span, ...], length: int) -> torch.Tensor:
    """Numbers of the spans' tokens among all tokens of the batch, int64 [S, N]; a short span repeats its last token."""
    longest = max(span.stop - span.start for span in spans)
    starts_S1 = torch.tensor([[span.row * length + span.start] for span in spans])
    stops_S1 = torch.tensor([[span.row * length + span.stop] for span in spans])
    return torch.minimum(starts_S1 + torch.arange(longest), stops_S1 - 1)


@cached_on_device
def _real_places(spans: tuple[Span, ...], length: int) -> torch.Tensor:
    """Of all real tokens, the number in the padded spans and the number in the batch, int64 [2, R]."""
    longest = max(span.stop - span.start for span in spans)
    padded = [number * longest + n for number, span in enumerate(spans) for n in range(span.stop - span.start)]
    in_batch = [span.row * length + n for span in spans for n in range(span.start, span.stop)]
    return torch.tensor([padded, in_batch])


@cached_on_device
def _rows(spans: tuple[Span, ...], batch: int) -> torch.Tensor:
    """Whether a span belongs to a row, bool [B, S]."""
    return torch.arange(batch)[:, None] == torch.tensor([span.row for span in spans])
