"""Seconds of one optimizer step on one GPU, by part.

In: traced costs, collectives, a `Setting` and `Hardware`. Out: `StepTime`. The time of a pass is that of its products plus
that of its memory traffic, and at least the time in which the host starts its kernels and runs DeepSpeed's hooks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipeline.distillation.relations.chunked import TILE_ENTRIES_GPU
from pipeline.planning.communication import Collective, collective_s, small_reduces_s
from pipeline.planning.devices import Device, Hardware
from pipeline.planning.memory import Setting, flash_widths
from pipeline.planning.meta_models import Encoders
from pipeline.planning.trace import PassCost, StudentCost

TILE = 128  # rows and columns of a result that one multiprocessor computes
SPLIT = 1024  # length of the sum for which a kernel makes one more tile (split-K, as in weight gradients)
# Bytes per owned parameter: unscale, norm, clip, AdamW's passes over four fp32 tensors, the copy back.
ADAM_TRAFFIC_BYTES = 112
FUSED_ADAM_TRAFFIC_BYTES = 52  # the same with one pass of AdamW, 28 bytes
# The host's work in DeepSpeed's own Python, in kernels of `launch_s`. Kernels are counted (ZeRO-1 and -2 with the
# multi-tensor checks of runtime/); the three others are fitted to one step of XLM-R-large's student on one H200.
OPTIMIZER_LAUNCHES, ZERO3_OPTIMIZER_LAUNCHES = 110, 462
LAUNCHES_PER_TENSOR = 3  # optimizer: slices, flattening and copies of each trained tensor
LAUNCHES_PER_GRADIENT = 11  # backward: the hook that copies a finished gradient into its bucket
LAUNCHES_PER_ZERO3_MODULE = 28  # forward and backward each: gather before, release after
FLASH_LEAST_WIDTH = 32  # attention kernels pad narrower heads to this width
FLASH_ACCESSES = 20  # counted: reads and writes per entry of `flash_widths`, outside attention
FLASH_LAUNCHES = 100  # counted, per relation
FUSED_LEAST_WIDTH = 16  # of a head, in products on tensor cores
FUSED_LAUNCHES = 12  # per relation
# fp32 reads and writes per map entry in relations/chunked.py, of teacher and student together; kernels per tile (counted).
CHUNKED_MAP_ACCESSES = 17
CHUNKED_LAUNCHES = 60


@dataclass
class StepTime:
    """Seconds by part, and the floating-point operations of the complete step on one GPU."""

    parts: dict[str, float]
    flops: float
    host_wait_s: float  # of the parts together: the GPU is idle while the host starts kernels

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Counted:
    """What was counted of one micro-batch, and of the communication of one step."""

    encoders: Encoders
    teacher: PassCost
    student: StudentCost
    collectives: list[Collective]


def step_time(counted: Counted, setting: Setting, hardware: Hardware) -> StepTime:
    """One optimizer step: `accumulation` micro-batches, then communication and update."""
    infinitely_fast = replace(hardware, assumptions=replace(hardware.assumptions, launch_s=0.0))
    parts, busy = (_parts_s(counted, setting, on) for on in (hardware, infinitely_fast))
    teacher, student = counted.teacher, counted.student
    micro_flops = teacher.flops + student.forward.flops + student.backward.flops + loss_flops(counted.encoders, setting)
    return StepTime(parts, setting.accumulation * micro_flops, sum(parts.values()) - sum(busy.values()))


def _parts_s(counted: Counted, setting: Setting, hardware: Hardware) -> dict[str, float]:
    """Seconds of each part of a step."""
    encoders, student, repeats = counted.encoders, counted.student, setting.accumulation
    forward_s, backward_s = (
        pass_s(cost, setting.precision, hardware, hooks_of_pass(encoders, setting, is_backward))
        for is_backward, cost in ((False, student.forward), (True, student.backward))
    )
    communication = sum(collective_s(collective, setting, hardware) for collective in counted.collectives)
    if setting.overlap and setting.stage > 1:
        communication = max(0.0, communication - repeats * backward_s)
    return {
        "teacher": repeats * pass_s(counted.teacher, setting.teacher_precision, hardware),
        "student": repeats * (forward_s + backward_s),
        "loss": repeats * loss_s(encoders, setting, hardware),
        "communication": communication + small_reduces_s(setting, hardware),
        "optimizer": _optimizer_s(encoders, setting, hardware),
        "data": repeats * setting.micro_batch * setting.seq_len * 8 / hardware.host_copy_bytes_per_s,
    }


def pass_s(cost: PassCost, precision: str, hardware: Hardware, num_hooks: int = 0) -> float:
    """The device's time for the pass, or the host's to start its kernels and to run its hooks, whichever is longer."""
    peak = hardware.device.flops_per_s(precision)
    reached = peak * hardware.assumptions.product_efficiency
    products = sum(
        count * 2 * math.prod(shape) / (reached * last_wave(shape, hardware.device))
        for shape, count in cost.products.items()
    )
    attention = attention_s(cost.attention_flops, cost.exponentials, peak, hardware)
    traffic = cost.traffic_bytes / hardware.memory_bytes_per_s
    return max(products + attention + traffic, (cost.num_kernels + num_hooks) * hardware.assumptions.launch_s)


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
    mixed = setting.num_mixed_relations
    of_mixed = setting.backend
    if of_mixed == "triton":  # has no kernels for them (relations/fused.py)
        of_mixed = "chunked" if setting.precision == "fp32" else "flash"
    return (setting.num_relations - mixed) * relation_s(
        encoders, setting, setting.backend, hardware
    ) + mixed * relation_s(encoders, setting, of_mixed, hardware)


def relation_s(encoders: Encoders, setting: Setting, backend: str, hardware: Hardware) -> float:
    """One relation of one micro-batch, with its gradient."""
    return _BACKENDS_S[backend](setting, _head_widths(encoders, setting.relation_heads), hardware)


def _entries(setting: Setting) -> int:
    """Entries of one model's relation maps."""
    return setting.micro_batch * setting.relation_heads * setting.seq_len**2


def _triton_s(setting: Setting, head_widths: tuple[int, int], hardware: Hardware) -> float:
    """Two passes compute each logit of both models and its exponential; the second adds the product of the gradient."""
    head_T, head_S = (max(FUSED_LEAST_WIDTH, head_dim) for head_dim in head_widths)
    peak = hardware.device.flops_per_s(setting.precision)
    flops = 2 * (2 * (head_T + head_S) + head_S) * _entries(setting)
    seconds = max(flops / peak, 4 * _entries(setting) / hardware.device.exponentials_per_s)
    return max(seconds / hardware.assumptions.fused_efficiency, FUSED_LAUNCHES * hardware.assumptions.launch_s)


def _flash_s(setting: Setting, head_widths: tuple[int, int], hardware: Hardware) -> float:
    """Four attentions, and the copies that arrange their inputs and outputs."""
    widths = flash_widths(*head_widths, setting.precision)
    peak = hardware.device.flops_per_s(setting.precision)
    flops = sum(4 * max(width, FLASH_LEAST_WIDTH) * _entries(setting) for width in widths)
    positions = setting.micro_batch * setting.seq_len * setting.relation_heads
    traffic = FLASH_ACCESSES * positions * sum(widths) * setting.bytes_each
    copies = traffic / (hardware.device.memory_gb_s * 1e9 * hardware.assumptions.strided_efficiency)
    attention = attention_s(flops, 4 * _entries(setting), peak, hardware)
    return max(attention + copies, FLASH_LAUNCHES * hardware.assumptions.launch_s)


def _chunked_s(setting: Setting, head_widths: tuple[int, int], hardware: Hardware) -> float:
    """Tile by tile. On a GPU host and device take turns: their sum, not the longer one, is what one H200 showed."""
    flops = chunked_flops_per_entry(*head_widths) * _entries(setting)
    compute = flops / (hardware.device.flops_per_s("fp32") * hardware.assumptions.product_efficiency)
    if setting.on_cpu:  # a tile's maps stay in the cache, and nothing is launched
        return compute
    tiles = max(1.0, _entries(setting) / TILE_ENTRIES_GPU)
    traffic = 4 * CHUNKED_MAP_ACCESSES * _entries(setting)
    launches_s = CHUNKED_LAUNCHES * tiles * hardware.assumptions.launch_s
    return compute + traffic / hardware.memory_bytes_per_s + launches_s


_BACKENDS_S = {"triton": _triton_s, "flash": _flash_s, "chunked": _chunked_s}
PLANNED_BACKENDS = tuple(_BACKENDS_S)


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
    """Host and device take turns: the verdict on the gradients is read before the update is launched."""
    owned = encoders.trained_parameters / setting.world_size
    host = launches_of_optimizer(encoders, setting) * hardware.assumptions.launch_s
    if setting.offload:  # gradients go to the host, AdamW runs there at a tenth of a GPU's rate, weights come back
        adam_s = owned * ADAM_TRAFFIC_BYTES / 100e9
        return host + adam_s + owned * 2 * setting.bytes_each / hardware.host_copy_bytes_per_s
    buckets = 3 * encoders.trained_parameters * setting.bytes_each  # gradients pass through buckets
    each = FUSED_ADAM_TRAFFIC_BYTES if setting.fused_adam else ADAM_TRAFFIC_BYTES
    return host + (owned * each + buckets) / hardware.memory_bytes_per_s


def launches_of_optimizer(encoders: Encoders, setting: Setting) -> int:
    """Kernels of an optimizer step, and Python's work on each trained tensor, counted as kernels."""
    if setting.on_cpu:
        return 0
    kernels = ZERO3_OPTIMIZER_LAUNCHES if setting.stage == 3 else OPTIMIZER_LAUNCHES
    return kernels + LAUNCHES_PER_TENSOR * encoders.trained_tensors


def hooks_of_pass(encoders: Encoders, setting: Setting, is_backward: bool) -> int:
    """Python's work in DeepSpeed's hooks during one pass of the student, counted as kernels."""
    if setting.on_cpu:
        return 0
    hooks = LAUNCHES_PER_ZERO3_MODULE * len(list(encoders.student.modules())) if setting.stage == 3 else 0
    return hooks + (LAUNCHES_PER_GRADIENT * encoders.trained_tensors if is_backward else 0)
