"""Bytes on one GPU, by part, at the fullest moment of an optimizer step.

In: the encoders, the rehearsal's passages and a `Setting`. Out: `Memory`. The rules follow what DeepSpeed 0.19 allocates
(docs/planning.md names each); benchmarks/bench_plan.py compares them with the profiler's count of a real step.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.distillation.relations.chunked import TILE_ENTRIES_CPU, TILE_ENTRIES_GPU
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.meta_models import Encoders
from pipeline.planning.trace import Passage, StudentPassages

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ADAM_BYTES = 12  # fp32 weight and two moments
GIB = 2**30
PREFETCHED_ELEMENTS = 50_000_000  # ZeRO-3 gathers so many at once (DeepSpeed's default)


@dataclass(frozen=True)
class Setting:
    """What a recipe, a DeepSpeed JSON and a machine come to for one GPU."""

    stage: int
    precision: str
    teacher_precision: str
    world_size: int
    micro_batch: int
    accumulation: int
    seq_len: int
    relation_heads: int
    num_relations: int  # losses per micro-batch: pairs x layers, and one for `tail: relation`
    reduce_bucket: int  # elements
    persistence_threshold: int  # ZeRO-3: smaller parameters stay whole
    overlap: bool
    offload: bool
    teacher_partitioned: bool
    on_cpu: bool
    flash_loss: bool

    @property
    def bytes_each(self) -> int:
        return BYTES[self.precision]


@dataclass
class Memory:
    """Bytes by part; `moment` is when they are all there at once."""

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory_of(
    encoders: Encoders, teacher: Passage, student: StudentPassages, setting: Setting, assumptions: Assumptions
) -> Memory:
    """The fullest of four moments: teacher's forward, loss, backward, optimizer."""
    lasting = lasting_parts(encoders, setting)
    kept_gradients = _gradients_between_micro_steps(encoders, setting)
    moments = {
        "teacher's forward": {"activations": teacher.peak_bytes, "gradients": kept_gradients},
        "loss": {
            "activations": teacher.kept_bytes + student.forward.peak_bytes,
            "loss tiles": loss_workspace(encoders, setting),
            "gradients": kept_gradients,
        },
        "backward": _in_backward(encoders, student.backward, setting),
        "optimizer": _in_optimizer(encoders, setting),
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {**lasting, "loss tiles": 0, **moments[moment]}
    buffers = parts.pop("buffers", 0)
    if not setting.on_cpu:
        coming_and_going = sum(moments[moment].values())
        buffers += int(assumptions.fixed_gib * GIB + assumptions.fragmentation * coming_and_going)
    order = ("teacher", "student", "gradients", "optimizer", "activations", "loss tiles")
    return Memory({**{name: parts.get(name, 0) for name in order}, "buffers": buffers}, moment)


def lasting_parts(encoders: Encoders, setting: Setting) -> dict[str, int]:
    """What is there from the first step to the last."""
    each, ranks = setting.bytes_each, setting.world_size
    teacher = encoders.teacher_parameters * BYTES[setting.teacher_precision]
    largest = max(parameter.numel() for parameter in encoders.teacher.parameters()) * BYTES[setting.teacher_precision]
    if setting.teacher_partitioned:
        # A rank's share; what is gathered ahead (whole small teachers), and this rank's part of it once more, to send.
        gathered = min(teacher, PREFETCHED_ELEMENTS * BYTES[setting.teacher_precision] + largest)
        teacher = teacher // ranks + gathered + gathered // ranks
    student = encoders.student_parameters * each
    if setting.stage == 3:
        student += student // ranks  # gathered parameters stay from forward to backward: up to 1e9 of them
    optimizer = 0 if setting.offload else ADAM_BYTES * encoders.trained_parameters // ranks
    return {"teacher": teacher, "student": student, "optimizer": optimizer}


def _gradients_between_micro_steps(encoders: Encoders, setting: Setting) -> int:
    if setting.accumulation == 1:
        return 0
    share = 1 if setting.stage == 1 else setting.world_size
    return encoders.trained_parameters * setting.bytes_each // share


def _in_backward(encoders: Encoders, backward: Passage, setting: Setting) -> dict[str, int]:
    """The end of backward, where the embedding's dense gradient comes last, or its beginning, whichever is fuller."""
    trained, each = encoders.trained_parameters, setting.bytes_each
    owned = trained * each // setting.world_size * (2 if setting.accumulation > 1 and setting.stage > 1 else 1)
    bucket = setting.reduce_bucket * each * (2 if setting.overlap else 1)
    if setting.stage == 3:
        bucket = min(bucket, trained * each)
    return {"activations": backward.peak_bytes, "gradients": owned, "buffers": bucket}


def _in_optimizer(encoders: Encoders, setting: Setting) -> dict[str, int]:
    """This rank's gradients as they came and in fp32, and what AdamW holds while it updates."""
    if setting.offload:
        return {"gradients": encoders.trained_parameters * setting.bytes_each // setting.world_size}
    owned = encoders.trained_parameters // setting.world_size
    temporaries = 8 if setting.on_cpu else 4  # torch's single-tensor AdamW (CPU) holds two, the foreach one (GPU) one
    return {"gradients": owned * (setting.bytes_each + 4), "buffers": owned * temporaries}


def loss_workspace(encoders: Encoders, setting: Setting) -> int:
    """What the relation loss holds beside its input and the gradient that it keeps."""
    length, heads = setting.seq_len, setting.relation_heads
    width_T, width_S = encoders.teacher.widths[0], encoders.student.widths[0]
    if setting.flash_loss:
        channels = flash_widths(width_T // heads, width_S // heads, setting.precision)[0]
        per_position = heads * 4 * channels * setting.bytes_each + 2 * 4 * (width_T + width_S)
        return setting.micro_batch * length * per_position
    budget = TILE_ENTRIES_CPU if setting.on_cpu else TILE_ENTRIES_GPU
    heads_per_tile = min(heads, max(1, budget // length**2))
    queries = min(length, max(1, budget // (heads_per_tile * length)))
    maps = 2 * 4 * heads_per_tile * length * queries
    return maps + 4 * length * (width_T + 3 * width_S)


def flash_widths(head_T: int, head_S: int, precision: str) -> list[int]:
    """Channels per head of the `flash` backend's four attention calls: biases ride along, padded to multiples of 8."""
    biases = 1 if precision == "fp32" else 3
    return [-(-n // 8) * 8 for n in (head_T + head_S, head_S, head_S + biases, max(head_T + biases, head_S))]
