"""The `triton` backend: loss and gradient of a self-relation in two passes of fused kernels, for CUDA devices.

The first pass computes row sums and KL, the second the complete gradient (10) of docs/method.md. No map leaves the chip,
nothing is added atomically, and the host reads nothing. Relations of two tensors (Q-K) are computed by `flash` in half
precision and by `chunked` in fp32. Triton comes with torch's CUDA builds; it is imported at first use.

Shape suffixes: B rows, L positions, D channels, S spans, T tiles.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from types import ModuleType
from typing import Any

import torch

from pipeline.distillation.relations.backends import (
    BACKENDS,
    NotUsableHereError,
    RelationInputs,
    RelationSums,
    Span,
    cached_on_device,
    relation_backend,
)

NAME = "triton"
LOG2_E = math.log2(math.e)
SMALLEST_PRODUCT = 16  # channels: tensor cores multiply no fewer, so smaller heads are padded with zeros while loading
MAX_HEAD_DIM = 128
# Tokens of a tile. Compiled for compute capability 8.0 and 9.0, larger tiles need too many registers or spill them.
TILE_SIDE, TILE_SIDE_FP32, MAX_HEAD_DIM_OF_LARGE_TILES = 64, 32, 64
logger = logging.getLogger(__name__)


@relation_backend(NAME)
def fused_relation(inputs: RelationInputs, with_gradient: bool) -> RelationSums:
    """Sums of KL per row and, if asked for, the gradient. Operands have the inputs' precision, all else is fp32."""
    if inputs.teacher_keys_BLD is not None or inputs.student_keys_BLD is not None:
        return BACKENDS[_backend_of_pairs(inputs.student_BLD.dtype)](inputs, with_gradient)
    kernels = _kernels(inputs)
    x_T, x_S, spans, num_heads = (
        inputs.teacher_BLD.contiguous(),
        inputs.student_BLD.contiguous(),
        inputs.spans,
        inputs.num_heads,
    )
    batch, length, _ = x_S.shape
    constants = constants_of(inputs)
    spans_S2, tiles_T5 = (
        _span_table(x_S.device, spans, length),
        _tile_table(x_S.device, spans, length, constants["SIDE"]),
    )
    scales = [LOG2_E * constants[head_dim] ** -0.5 for head_dim in ("HEAD_T", "HEAD_S")]

    diagonals = x_S.new_empty(2, len(spans), num_heads, dtype=torch.float32)
    shifts, factors = x_S.new_empty(2, 2, num_heads, batch * length, dtype=torch.float32)
    kl = x_S.new_zeros(batch, _num_slots(spans, constants["SIDE"]), num_heads, dtype=torch.float32)
    sizes = (num_heads, len(spans))
    launch = functools.partial(_launch, num_heads=num_heads, constants=constants)
    launch(kernels.diagonals_kernel, len(spans), x_T, x_S, diagonals, spans_S2, *sizes, *scales)
    rows, layout = (x_T, x_S, diagonals, shifts, factors), (tiles_T5, *sizes, batch * length, *scales)
    launch(kernels.sums_kernel, len(tiles_T5), *rows, kl, *layout)
    kl_B = kl.sum((1, 2))
    if not with_gradient:
        return RelationSums(kl_B, None, None)
    is_padded = sum(span.stop - span.start for span in spans) < batch * length
    gradient_BLD = torch.zeros_like(x_S) if is_padded else torch.empty_like(x_S)
    launch(kernels.gradient_kernel, len(tiles_T5), *rows, gradient_BLD, *layout)
    return RelationSums(kl_B, gradient_BLD, None)


def _launch(
    kernel: Any, num_places: int, x_T: torch.Tensor, *arguments, num_heads: int, constants: dict[str, int]
) -> None:
    """Start a kernel with one program per place (span or tile) and head. It is compiled at its first start."""
    try:
        with torch.cuda.device_of(x_T):
            kernel[(num_places * num_heads,)](x_T, *arguments, **constants)
    except Exception as problem:  # Triton's errors, its C compiler's, its cache directory's
        if "[CUDA]" in str(problem):  # the device failed, not the build
            raise
        line = next(iter(str(problem).splitlines()), "")
        raise NotUsableHereError(
            NAME, f"Triton cannot build its kernels ({type(problem).__name__}: {line})"
        ) from problem


def constants_of(inputs: RelationInputs) -> dict[str, int]:
    """What a kernel is compiled for: channels of a head, the same padded, and tokens of a tile."""
    head_T, head_S = (x_BLD.shape[-1] // inputs.num_heads for x_BLD in (inputs.teacher_BLD, inputs.student_BLD))
    padded_T, padded_S = (max(SMALLEST_PRODUCT, 1 << (head_dim - 1).bit_length()) for head_dim in (head_T, head_S))
    is_small = torch.float32 in (inputs.teacher_BLD.dtype, inputs.student_BLD.dtype)
    is_small = is_small or max(head_T, head_S) > MAX_HEAD_DIM_OF_LARGE_TILES
    side = TILE_SIDE_FP32 if is_small else TILE_SIDE
    return {"HEAD_T": head_T, "HEAD_S": head_S, "PADDED_T": padded_T, "PADDED_S": padded_S, "SIDE": side}


@cached_on_device
def _span_table(spans: tuple[Span, ...], length: int) -> torch.Tensor:
    """First token (of all tokens of the batch) and number of tokens of each span, int32 [S, 2]."""
    return torch.tensor([[span.row * length + span.start, span.stop - span.start] for span in spans], dtype=torch.int32)


@cached_on_device
def _tile_table(spans: tuple[Span, ...], length: int, side: int) -> torch.Tensor:
    """First token, number of tokens, first query, number of the span, and slot of the KL, of each tile, int32 [T, 5].

    A slot is the tile's number in its row, plus those of the rows before. So a row's slots are added in one fixed order.
    """
    num_slots = _num_slots(spans, side)
    used = dict.fromkeys((span.row for span in spans), 0)
    tiles = []
    for number, (row, start, stop) in enumerate(spans):
        for first_query in range(0, stop - start, side):
            tiles.append([row * length + start, stop - start, first_query, number, row * num_slots + used[row]])
            used[row] += 1
    return torch.tensor(tiles, dtype=torch.int32)


@functools.lru_cache(maxsize=16)
def _num_slots(spans: tuple[Span, ...], side: int) -> int:
    """The largest number of tiles of a row."""
    tiles: dict[int, int] = {}
    for row, start, stop in spans:
        tiles[row] = tiles.get(row, 0) + -(-(stop - start) // side)
    return max(tiles.values())


def _kernels(inputs: RelationInputs) -> ModuleType:
    """The compiled kernels' module. Raises `NotUsableHereError` where they cannot run."""
    device, widest = inputs.student_BLD.device.type, max(inputs.teacher_BLD.shape[-1], inputs.student_BLD.shape[-1])
    dtypes = (inputs.teacher_BLD.dtype, inputs.student_BLD.dtype)
    if torch.float64 in dtypes:
        raise NotUsableHereError(NAME, "its kernels have no float64")
    if widest > MAX_HEAD_DIM * inputs.num_heads:
        raise NotUsableHereError(NAME, f"{inputs.num_heads} heads of {widest} channels are wider than {MAX_HEAD_DIM}")
    if importlib.util.find_spec("triton") is None:
        raise NotUsableHereError(NAME, "Triton is not installed (torch's CUDA builds bring it)")
    from pipeline.distillation.relations import _triton_kernels

    is_interpreted = not isinstance(_triton_kernels.sums_kernel, _triton_kernels.triton.JITFunction)
    if is_interpreted and torch.bfloat16 in dtypes:
        raise NotUsableHereError(NAME, "Triton's interpreter has no bfloat16")
    if device != "cuda" and not is_interpreted:
        raise NotUsableHereError(NAME, f"its kernels are compiled for CUDA, and the tensors are on `{device}`")
    return _triton_kernels


def _backend_of_pairs(dtype: torch.dtype) -> str:
    """The backend of relations of two tensors, whose maps are not symmetric."""
    name = "flash" if dtype in (torch.float16, torch.bfloat16) else "chunked"
    _report_pairs(name)
    return name


@functools.cache
def _report_pairs(name: str) -> None:
    """Said once in a process."""
    logger.warning(f"relation backend {NAME}: relations of two tensors, such as q-k, are computed by `{name}`")
