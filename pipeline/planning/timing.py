"""Seconds of one optimizer step on one GPU, by part.

In: traced costs, collectives, a `Setting` and `Hardware`. Out: `StepTime`. The time of a pass is that of its products plus
that of its memory traffic, and at least the time in which the host starts its kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.planning.communication import Collective, collective_s, small_reduces_s
from pipeline.planning.devices import Device, Hardware
from pipeline.planning.memory import Setting, flash_widths
from pipeline.planning.meta_models import Encoders
from pipeline.planning.trace import PassCost, StudentCost

TILE = 128  # rows and columns of a result that one multiprocessor computes
SPLIT = 1024  # length of the sum for which a kernel makes one more tile (split-K, as in weight gradients)
# Per owned parameter: unscale, norm, clip, AdamW's passes over four fp32 tensors, the copy back.
ADAM_TRAFFIC_BYTES = 112
FLASH_LEAST_WIDTH = 32  # attention kernels pad narrower heads to this width
# fp32 reads and writes per map entry in relations/chunked.py, of teacher and student together.
CHUNKED_MAP_ACCESSES = 17
CHUNKED_KERNELS = 30  # per tile
KERNELS_PER_ATTENTION = 12  # flash backend: concatenate, pad, attend


@dataclass
class StepTime:
    """Seconds by part, and the floating-point operations of the complete step on one GPU."""

    parts: dict[str, float]
    flops: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def step_time(
    encoders: Encoders,
    teacher: PassCost,
    student: StudentCost,
    collectives: list[Collective],
    setting: Setting,
    hardware: Hardware,
) -> StepTime:
    """One optimizer step: `accumulation` micro-batches, then communication and update."""
    repeats = setting.accumulation
    forward_s, backward_s = (pass_s(cost, setting.precision, hardware) for cost in (student.forward, student.backward))
    communication = sum(collective_s(collective, setting, hardware) for collective in collectives)
    if setting.overlap and setting.stage > 1:
        communication = max(0.0, communication - repeats * backward_s)
    parts = {
        "teacher": repeats * pass_s(teacher, setting.teacher_precision, hardware),
        "student": repeats * (forward_s + backward_s),
        "loss": repeats * loss_s(encoders, setting, hardware),
        "communication": communication + small_reduces_s(setting, hardware),
        "optimizer": _optimizer_s(encoders, setting, hardware),
        "data": repeats * setting.micro_batch * setting.seq_len * 8 / hardware.host_copy_bytes_per_s,
    }
    micro_flops = teacher.flops + student.forward.flops + student.backward.flops + loss_flops(encoders, setting)
    return StepTime(parts, repeats * micro_flops)


def pass_s(cost: PassCost, precision: str, hardware: Hardware) -> float:
    peak = hardware.device.flops_per_s(precision)
    reached = peak * hardware.assumptions.product_efficiency
    products = sum(
        count * 2 * math.prod(shape) / (reached * last_wave(shape, hardware.device))
        for shape, count in cost.products.items()
    )
    attention = attention_s(cost.attention_flops, cost.exponentials, peak, hardware)
    traffic = cost.traffic_bytes / hardware.memory_bytes_per_s
    return max(products + attention + traffic, cost.num_kernels * hardware.assumptions.kernel_s)


def last_wave(shape: tuple[int, int, int, int], device: Device) -> float:
    """Share of the multiprocessors that are busy, over all waves of tiles. Small results leave most of them idle."""
    batch, rows, summed, columns = shape
    tiles = batch * -(-rows // TILE) * -(-columns // TILE) * max(1, summed // SPLIT)
    return tiles / (-(-tiles // device.processors) * device.processors)


def attention_s(flops: float, exponentials: float, peak: float, hardware: Hardware) -> float:
    seconds = max(flops / peak, exponentials / hardware.device.exponentials_per_s)
    return seconds / hardware.assumptions.attention_efficiency


def loss_s(encoders: Encoders, setting: Setting, hardware: Hardware) -> float:
    """All relations of one micro-batch with the backend of the setting."""
    heads, length, rows = setting.relation_heads, setting.seq_len, setting.micro_batch
    device, kernel_s = hardware.device, hardware.assumptions.kernel_s
    entries = rows * heads * length**2
    head_T, head_S = _head_widths(encoders, heads)
    if setting.flash_loss:
        widths = flash_widths(head_T, head_S, setting.precision)
        peak = device.flops_per_s(setting.precision)
        flops = sum(4 * max(width, FLASH_LEAST_WIDTH) * entries for width in widths)
        traffic = 8 * rows * length * heads * sum(widths) * setting.bytes_each
        one = attention_s(flops, 4 * entries, peak, hardware) + traffic / hardware.memory_bytes_per_s
        return setting.num_relations * max(one, 4 * KERNELS_PER_ATTENTION * kernel_s)
    flops = chunked_flops_per_entry(head_T, head_S) * entries
    compute = flops / (device.flops_per_s("fp32") * hardware.assumptions.product_efficiency)
    # On a CPU a tile's maps stay in the cache.
    traffic = 0 if setting.on_cpu else 4 * CHUNKED_MAP_ACCESSES * entries
    kernels = CHUNKED_KERNELS * rows * max(1.0, heads * length**2 / 2**25)
    return setting.num_relations * max(compute + traffic / hardware.memory_bytes_per_s, kernels * kernel_s)


def loss_flops(encoders: Encoders, setting: Setting) -> int:
    """Products of the `chunked` backend in one micro-batch, whichever backend runs."""
    entries = setting.micro_batch * setting.relation_heads * setting.seq_len**2
    return setting.num_relations * chunked_flops_per_entry(*_head_widths(encoders, setting.relation_heads)) * entries


def chunked_flops_per_entry(head_T: int, head_S: int) -> int:
    """Per map entry: two logit products, the mixture with its column of ones, the two products of the gradient."""
    return 2 * (head_T + head_S) + 2 * (head_T + head_S + 1) + 4 * head_S


def _head_widths(encoders: Encoders, heads: int) -> tuple[int, int]:
    return encoders.teacher.widths[0] // heads, encoders.student.widths[0] // heads


def _optimizer_s(encoders: Encoders, setting: Setting, hardware: Hardware) -> float:
    owned = encoders.trained_parameters / setting.world_size
    if setting.offload:  # gradients go to the host, AdamW runs there at a tenth of a GPU's rate, weights come back
        return owned * (2 * setting.bytes_each / hardware.host_copy_bytes_per_s + ADAM_TRAFFIC_BYTES / 100e9)
    buckets = 3 * encoders.trained_parameters * setting.bytes_each  # gradients pass through buckets
    return (owned * ADAM_TRAFFIC_BYTES + buckets) / hardware.memory_bytes_per_s
