"""Trace one training step on torch's `meta` device, where operations have shapes and no data.

In: tapped encoders on `meta`, a micro-batch and a precision. Out: a `PassCost` for each forward or backward pass: matrix
products by shape, memory traffic, kernels, bytes kept and bytes at the peak. Nothing is computed, so that even a large step
is traced in a fraction of a second.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.distillation.tap import TappedEncoder
from pipeline.runtime.ds_config import DTYPES

ATTENTION = "minilm_trace"  # the name under which transformers finds the attention function below
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::_unsafe_view")


@dataclass
class PassCost:
    """What one forward or backward pass does on one GPU."""

    products: Counter[tuple[int, int, int, int]] = field(default_factory=Counter)  # (batch, M, K, N) of each product
    attentions: Counter[tuple[int, int, int, int, bool]] = field(default_factory=Counter)  # (B, H, L, d, is backward)
    traffic_bytes: int = 0  # read and written by all kernels
    num_kernels: int = 0
    kept_bytes: int = 0  # allocated at the end of the pass
    peak_bytes: int = 0  # most bytes allocated at any moment of the pass

    @property
    def product_flops(self) -> int:
        return sum(2 * math.prod(shape) * count for shape, count in self.products.items())

    @property
    def attention_flops(self) -> int:
        """Two products in forward (logits, mixture), five in backward, which computes the logits again."""
        return sum(
            (10 if backward else 4) * rows * heads * length**2 * width * count
            for (rows, heads, length, width, backward), count in self.attentions.items()
        )

    @property
    def flops(self) -> int:
        return self.product_flops + self.attention_flops

    @property
    def exponentials(self) -> int:
        return sum(r * h * length**2 * count for (r, h, length, _, _), count in self.attentions.items())


class OpTracer(TorchDispatchMode):
    """Counts every operation, and the bytes of every tensor from its allocation until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self._allocated: dict[int, weakref.ref] = {}
        self._bytes = 0
        self._cost = PassCost()

    def end_pass(self) -> PassCost:
        """The cost since the last call. Tensors that are still allocated count in the next pass too."""
        finished, self._cost = self._cost, PassCost(peak_bytes=self._bytes)
        finished.kept_bytes = self._bytes
        return finished

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
            inputs, outputs = _tensors([arguments, keywords]), _tensors(result)
            self._count(function._schema.name, inputs, outputs)
            for tensor in outputs:
                self._add_allocation(tensor)
        return result

    def _count(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        cost = self._cost
        if not outputs or name in _NO_KERNEL:
            return
        cost.num_kernels += 1
        cost.traffic_bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *outputs])
        if name in _PRODUCTS:
            left, right = inputs[-2:]
            batch = left.shape[0] if left.dim() == 3 else 1
            cost.products[batch, left.shape[-2], left.shape[-1], right.shape[-1]] += 1
        elif name in ("minilm_plan::attention", "minilm_plan::attention_backward"):
            backward = name.endswith("backward")
            query_BHLd = inputs[1] if backward else inputs[0]
            cost.attentions[(*query_BHLd.shape, backward)] += 1

    def _add_allocation(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._allocated:
            return

        def freed(_: weakref.ref) -> None:
            if self._allocated.pop(key, None) is not None:
                self._bytes -= size

        self._allocated[key] = weakref.ref(storage, freed)
        self._bytes += size
        self._cost.peak_bytes = max(self._cost.peak_bytes, self._bytes)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# -- attention with the memory of a fused kernel: it keeps the log-sums of each row, not the attention map


@torch.library.custom_op("minilm_plan::attention", mutates_args=())
def attention(query_BHLd: torch.Tensor, key_BHLd: torch.Tensor, value_BHLd: torch.Tensor) -> list[torch.Tensor]:
    """Mixture [B, L, H, d] and log-sums [B, H, L]; shapes only."""
    batch, heads, length, width = query_BHLd.shape
    log_sums_BHL = query_BHLd.new_empty(batch, heads, length, dtype=torch.float32)
    return [query_BHLd.new_empty(batch, length, heads, width), log_sums_BHL]


@torch.library.custom_op("minilm_plan::attention_backward", mutates_args=())
def attention_backward(
    grad_BLHd: torch.Tensor,
    query_BHLd: torch.Tensor,
    key_BHLd: torch.Tensor,
    value_BHLd: torch.Tensor,
    mixed_BLHd: torch.Tensor,
    log_sums_BHL: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of query, key and value; shapes only."""
    return [torch.empty_like(x_BHLd) for x_BHLd in (query_BHLd, key_BHLd, value_BHLd)]


for operation in (attention, attention_backward):
    operation.register_fake(operation._init_fn)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, gradients):
    return tuple(attention_backward(gradients[0], *ctx.saved_tensors))


attention.register_autograd(_backward, setup_context=_save)


def _attend(module, query, key, value, mask, **options):
    """transformers' interface to attention."""
    return attention(query, key, value)[0], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


# -- the two models


def trace_teacher(teacher: TappedEncoder, rows: int, seq_len: int, precision: str) -> PassCost:
    """One forward pass of the frozen teacher. It keeps Q, K, V, and the output where a tail term needs it."""
    teacher.to(DTYPES[precision])
    with torch.no_grad(), OpTracer() as tracer:
        results = _run(teacher, rows, seq_len)
        cost = tracer.end_pass()
    del results
    return cost


@dataclass
class StudentCost:
    """The student's forward pass up to the loss, and its backward pass."""

    forward: PassCost
    backward: PassCost


def trace_student(
    student: TappedEncoder, rows: int, seq_len: int, precision: str, relations_per_tap: int, gradients_stay: bool
) -> StudentCost:
    """One forward and one backward pass.

    Args:
        relations_per_tap: gradients that the loss keeps for each of Q, K and V
        gradients_stay: on their parameters until the optimizer step (ZeRO-1); False: each is freed when it is ready (2, 3)
    """
    student.to(DTYPES[precision])
    handles = [] if gradients_stay else [_free_gradient(p) for p in student.parameters() if p.requires_grad]
    with OpTracer() as tracer:
        results = _run(student, rows, seq_len)
        losses = [_Loss.apply(x_BLD, relations_per_tap) for x_BLD in _tensors(results)]
        forward = tracer.end_pass()
        del results
        torch.autograd.backward(losses)
        backward = tracer.end_pass()
    for handle in handles:
        handle.remove()
    student.zero_grad(set_to_none=True)
    return StudentCost(forward, backward)


class _Loss(torch.autograd.Function):
    """Keeps for backward what relations/loss.py keeps: one finished gradient for each use of a tensor."""

    @staticmethod
    def forward(context, x_BLD, uses):
        context.save_for_backward(*(torch.empty_like(x_BLD) for _ in range(uses)))
        return x_BLD.new_zeros(())

    @staticmethod
    def backward(context, gradient):
        total = None
        for kept_BLD in context.saved_tensors:
            scaled_BLD = kept_BLD * gradient
            total = scaled_BLD if total is None else total.add_(scaled_BLD)
        return total, None


def _free_gradient(parameter: torch.nn.Parameter):
    def drop(p: torch.Tensor) -> None:
        p.grad = None

    return parameter.register_post_accumulate_grad_hook(drop)


def _run(encoder: TappedEncoder, rows: int, seq_len: int):
    """The encoder's results for ids without values. Without a mask DeBERTa would search the ids for padding, so it gets one."""
    ids_BL = torch.zeros(rows, seq_len, dtype=torch.long, device="meta")
    needs_mask = encoder.model.config.model_type == "deberta-v2"
    return encoder(ids_BL, torch.ones_like(ids_BL) if needs_mask else None)
