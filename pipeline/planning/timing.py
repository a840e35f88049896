"""Seconds of one optimizer step on one GPU, by part, from what the rehearsal counted and what the device table says.

In: passages, collectives, a `Device`. Out: `StepTime`. A part takes as long as its products and its memory traffic one
after the other, and never less than the host needs to start its kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.planning.assumptions import Assumptions
from pipeline.planning.communication import Collective, seconds_of, small_reduces_s
from pipeline.planning.devices import Device
from pipeline.planning.memory import Setting, flash_widths
from pipeline.planning.meta_models import Encoders
from pipeline.planning.trace import Passage, StudentPassages

TILE = 128  # rows and columns of the result that one multiprocessor works on
SPLIT = 1024  # length of the sum that is worth a tile of its own (split-K, as in weight gradients)
ADAM_TRAFFIC_BYTES = (
    112  # per owned parameter: unscale, norm, clip, AdamW's passes over four fp32 tensors, the copy back
)
FLASH_LEAST_WIDTH = 32  # attention kernels pad narrower heads to this
CHUNKED_MAP_ACCESSES = (
    17  # fp32 reads and writes per map entry: relation_tiles.py, teacher's and student's map together
)
CHUNKED_KERNELS = 30  # per tile
KERNELS_PER_ATTENTION = 12  # flash backend: concatenating, padding, attending


@dataclass
class StepTime:
    """Seconds by part, and the floating-point operations of the whole step on one GPU."""

    parts: dict[str, float]
    flops: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def step_time(
    encoders: Encoders,
    teacher: Passage,
    student: StudentPassages,
    collectives: list[Collective],
    setting: Setting,
    device: Device,
    gpus_per_node: int,
    assumptions: Assumptions,
) -> StepTime:
    """One optimizer step: `accumulation` micro-batches, then communication and update."""
    repeats, ranks = setting.accumulation, setting.world_size
    of_student = [passage_s(p, setting.precision, device, assumptions) for p in (student.forward, student.backward)]
    communication = sum(seconds_of(c, device, ranks, gpus_per_node, assumptions) for c in collectives)
    if setting.overlap and setting.stage > 1:
        communication = max(0.0, communication - repeats * of_student[1])
    communication += small_reduces_s(device, ranks, gpus_per_node)
    parts = {
        "teacher": repeats * passage_s(teacher, setting.teacher_precision, device, assumptions),
        "student": repeats * sum(of_student),
        "loss": repeats * loss_s(encoders, setting, device, assumptions),
        "communication": communication,
        "optimizer": _optimizer_s(encoders, setting, device, assumptions),
        "data": repeats * setting.micro_batch * setting.seq_len * 8 / (assumptions.host_copy_gb_s * 1e9),
    }
    micro_flops = teacher.flops + student.forward.flops + student.backward.flops + loss_flops(encoders, setting)
    return StepTime(parts, repeats * micro_flops)


def passage_s(passage: Passage, precision: str, device: Device, assumptions: Assumptions) -> float:
    peak = device.flops_per_s(precision)
    products = sum(
        count * 2 * math.prod(shape) / (peak * assumptions.product_efficiency * last_wave(shape, device))
        for shape, count in passage.products.items()
    )
    attention = attention_s(passage.attention_flops, passage.exponentials, peak, device, assumptions)
    traffic = passage.traffic_bytes / (device.memory_gb_s * 1e9 * assumptions.memory_efficiency)
    return max(products + attention + traffic, passage.num_kernels * assumptions.kernel_s)


def last_wave(shape: tuple[int, int, int, int], device: Device) -> float:
    """Share of the multiprocessors that have work, over all waves of tiles; small results leave most of them idle."""
    batch, rows, summed, columns = shape
    tiles = batch * -(-rows // TILE) * -(-columns // TILE) * max(1, summed // SPLIT)
    return tiles / (-(-tiles // device.processors) * device.processors)


def attention_s(flops: float, exponentials: float, peak: float, device: Device, assumptions: Assumptions) -> float:
    return max(flops / peak, exponentials / device.exponentials_per_s) / assumptions.attention_efficiency


def loss_s(encoders: Encoders, setting: Setting, device: Device, assumptions: Assumptions) -> float:
    """All relations of one micro-batch with the backend that the setting names."""
    heads, length, rows = setting.relation_heads, setting.seq_len, setting.micro_batch
    entries = rows * heads * length**2
    head_T, head_S = (widths[0] // heads for widths in (encoders.teacher.widths, encoders.student.widths))
    memory_rate = device.memory_gb_s * 1e9 * assumptions.memory_efficiency
    if setting.flash_loss:
        widths = flash_widths(head_T, head_S, setting.precision)
        peak = device.flops_per_s(setting.precision)
        flops = sum(4 * max(width, FLASH_LEAST_WIDTH) * entries for width in widths)
        traffic = 8 * rows * length * heads * sum(widths) * setting.bytes_each
        one = attention_s(flops, 4 * entries, peak, device, assumptions) + traffic / memory_rate
        return setting.num_relations * max(one, 4 * KERNELS_PER_ATTENTION * assumptions.kernel_s)
    flops = chunked_flops_per_entry(head_T, head_S) * entries
    compute = flops / (device.flops_per_s("fp32") * assumptions.product_efficiency)
    # On a CPU a tile's maps stay in its cache.
    traffic = 0 if setting.on_cpu else 4 * CHUNKED_MAP_ACCESSES * entries
    kernels = CHUNKED_KERNELS * rows * max(1.0, heads * length**2 / 2**25)
    return setting.num_relations * max(compute + traffic / memory_rate, kernels * assumptions.kernel_s)


def loss_flops(encoders: Encoders, setting: Setting) -> int:
    """Products of the `chunked` backend in one micro-batch, whichever backend runs."""
    heads = setting.relation_heads
    head_T, head_S = (widths[0] // heads for widths in (encoders.teacher.widths, encoders.student.widths))
    entries = setting.micro_batch * heads * setting.seq_len**2
    return setting.num_relations * chunked_flops_per_entry(head_T, head_S) * entries


def chunked_flops_per_entry(head_T: int, head_S: int) -> int:
    """Per map entry: two logit products, the mixture with its column of ones, the gradient's two products."""
    return 2 * (head_T + head_S) + 2 * (head_T + head_S + 1) + 4 * head_S


def _optimizer_s(encoders: Encoders, setting: Setting, device: Device, assumptions: Assumptions) -> float:
    owned = encoders.trained_parameters / setting.world_size
    buckets = 3 * encoders.trained_parameters * setting.bytes_each  # gradients pass through buckets
    seconds = (owned * ADAM_TRAFFIC_BYTES + buckets) / (device.memory_gb_s * 1e9 * assumptions.memory_efficiency)
    if setting.offload:  # gradients go to the host, AdamW runs there at a tenth of a GPU's rate, weights come back
        seconds = owned * (2 * setting.bytes_each / (assumptions.host_copy_gb_s * 1e9) + ADAM_TRAFFIC_BYTES / 100e9)
    return seconds
