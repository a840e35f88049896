"""Bytes on one GPU, by part, at the moment of an optimizer step when most are allocated.

In: the encoders, their traced costs and a `Setting`, for each student of the run. Out: `Memory`. The rules follow what
DeepSpeed 0.19 allocates (docs/planning.md gives each); benchmarks/bench_plan.py compares them with a profiler's count of a
real step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.distillation.relations.chunked import TILE_ENTRIES_CPU, TILE_ENTRIES_GPU
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.meta_models import ADAM_BYTES, Encoders
from pipeline.planning.trace import PassCost, StudentCost

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30
PREFETCHED_ELEMENTS = 50_000_000  # that ZeRO-3 gathers ahead (DeepSpeed's default)
# Measured on one H200: bytes of the fused kernels' prototype per head and position; and what `flash` held at four shapes in
# terms of its concatenated inputs (1.27 to 1.35), because attention returns more tensors.
TRITON_BYTES = 116
FLASH_TEMPORARIES = 1.28
PARTS = ("teacher", "student", "gradients", "optimizer", "activations", "loss tiles", "buffers")
TEACHERS_MOMENT = "teacher's forward"


@dataclass(frozen=True)
class Setting:
    """What one GPU runs: the result of a recipe, a DeepSpeed JSON and a cluster."""

    stage: int
    precision: str
    teacher_precision: str
    world_size: int
    gpus_per_node: int
    micro_batch: int
    accumulation: int
    seq_len: int
    relation_heads: int
    num_relations: int  # losses per micro-batch: pairs x layers, and one for `tail: relation`
    reduce_bucket: int  # elements
    persistence_threshold: int  # ZeRO-3: smaller parameters are not partitioned
    overlap: bool
    offload: bool
    teacher_partitioned: bool
    on_cpu: bool
    backend: str = "chunked"  # of the relation loss
    num_mixed_relations: int = 0  # those of two different tensors, such as q-k
    fused_adam: bool = False

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.gpus_per_node)

    @property
    def gpus_in_node(self) -> int:
        return min(self.world_size, self.gpus_per_node)

    @property
    def bytes_each(self) -> int:
        return BYTES[self.precision]


@dataclass
class Memory:
    """Bytes by part at the `moment` when their sum is largest."""

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Trained:
    """One student of a run: its encoders with the run's teacher, its traced passes, and its setting."""

    encoders: Encoders
    cost: StudentCost
    setting: Setting


def memory_of(teacher: PassCost, students: dict[str, Trained], assumptions: Assumptions) -> Memory:
    """The largest of four moments: teacher's forward, and loss, backward and optimizer of one of the students.

    Args:
        teacher: its only forward
        students: by name, in the order of their turns; a run with one student names it ""
    """
    moments: dict[tuple[str, str], tuple[Counter[str], Counter[str]]] = {}
    for name, student in students.items():
        lasting = Counter(lasting_parts(student.encoders, student.setting))
        for other, resting in students.items():
            if other != name:
                lasting.update(resting_parts(resting.encoders, resting.setting))
        needed_later = 0 if name == list(students)[-1] else teacher.kept_bytes
        for moment, temporary in _moments(teacher, student, needed_later):
            moments[moment, name] = (lasting, temporary)
    (moment, name), (lasting, temporary) = max(moments.items(), key=lambda item: (item[1][0] + item[1][1]).total())
    parts = lasting + temporary
    if not next(iter(students.values())).setting.on_cpu:
        parts["buffers"] += int(assumptions.fixed_gib * GIB + assumptions.fragmentation * temporary.total())
    of_student = f" of {name}" if name and moment != TEACHERS_MOMENT else ""
    return Memory({part: parts[part] for part in PARTS}, moment + of_student)


def _moments(teacher: PassCost, student: Trained, needed_later: int) -> Iterator[tuple[str, Counter[str]]]:
    """The moments of one student's turn with their temporary bytes by part.

    `needed_later`: bytes of the teacher's results that are kept for students whose turn is later.
    """
    encoders, cost, setting = student.encoders, student.cost, student.setting
    gradients = _gradients_between_micro_steps(encoders, setting)
    yield TEACHERS_MOMENT, Counter({"activations": teacher.peak_bytes, "gradients": gradients})
    activations = teacher.kept_bytes + cost.forward.peak_bytes
    tiles = loss_workspace(encoders, setting)
    yield "loss", Counter({"activations": activations, "loss tiles": tiles, "gradients": gradients})
    later = Counter({"activations": needed_later})
    yield "backward", later + Counter(_in_backward(encoders, cost.backward, setting))
    yield "optimizer", later + Counter(_in_optimizer(encoders, setting))


def lasting_parts(encoders: Encoders, setting: Setting) -> dict[str, int]:
    """Bytes that are allocated from the first step to the last."""
    ranks, teacher_bytes = setting.world_size, BYTES[setting.teacher_precision]
    teacher = encoders.teacher_parameters * teacher_bytes
    if setting.teacher_partitioned:
        # A rank's partition, the parameters that are gathered ahead (at most all), and this rank's part of those to send.
        largest = max(parameter.numel() for parameter in encoders.teacher.parameters()) * teacher_bytes
        gathered = min(teacher, PREFETCHED_ELEMENTS * teacher_bytes + largest)
        teacher = teacher // ranks + gathered + gathered // ranks
    student = encoders.student_parameters * setting.bytes_each
    if setting.stage == 3:
        student += student // ranks  # gathered parameters stay from forward to backward: up to 1e9 of them
    optimizer = 0 if setting.offload else ADAM_BYTES * encoders.trained_parameters // ranks
    return {"teacher": teacher, "student": student, "optimizer": optimizer}


def resting_parts(encoders: Encoders, setting: Setting) -> dict[str, int]:
    """Bytes that a student holds while another student of the run has its turn. The teacher is counted once, with that one."""
    ranks, each = setting.world_size, setting.bytes_each
    parts = {"optimizer": lasting_parts(encoders, setting)["optimizer"]}
    if setting.stage != 3:
        gradients = _gradients_between_micro_steps(encoders, setting)
        return {**parts, "student": encoders.student_parameters * each, "gradients": gradients}
    # ZeRO-3 releases large gathered parameters after backward. Its gradient partition and its bucket stay.
    partition = encoders.trained_parameters * each // ranks
    sizes = [parameter.numel() for parameter in encoders.student.parameters()]
    small = sum(size for size in sizes if size <= setting.persistence_threshold)
    return {
        **parts,
        "student": (encoders.student_parameters // ranks + small) * each,
        "gradients": partition,
        "buffers": _bucket(encoders, setting),
    }


def _gradients_between_micro_steps(encoders: Encoders, setting: Setting) -> int:
    if setting.accumulation == 1:
        return 0
    share = 1 if setting.stage == 1 else setting.world_size
    return encoders.trained_parameters * setting.bytes_each // share


def _in_backward(encoders: Encoders, backward: PassCost, setting: Setting) -> dict[str, int]:
    """The largest moment of backward: its beginning, or its end, when the embedding's dense gradient is computed."""
    trained, each = encoders.trained_parameters, setting.bytes_each
    owned = trained * each // setting.world_size * (2 if setting.accumulation > 1 and setting.stage > 1 else 1)
    return {"activations": backward.peak_bytes, "gradients": owned, "buffers": _bucket(encoders, setting)}


def _bucket(encoders: Encoders, setting: Setting) -> int:
    """Where gradients are collected until they are reduced."""
    bucket = setting.reduce_bucket * setting.bytes_each * (2 if setting.overlap else 1)
    return min(bucket, encoders.trained_parameters * setting.bytes_each) if setting.stage == 3 else bucket


def _in_optimizer(encoders: Encoders, setting: Setting) -> dict[str, int]:
    """This rank's gradients, as reduced and in fp32, and the temporaries of AdamW's update."""
    if setting.offload:
        return {"gradients": encoders.trained_parameters * setting.bytes_each // setting.world_size}
    owned = encoders.trained_parameters // setting.world_size
    # torch's single-tensor AdamW (CPU) holds two temporaries, the foreach one (GPU) one, the fused one none
    temporaries = 0 if setting.fused_adam else 8 if setting.on_cpu else 4
    return {"gradients": owned * (setting.bytes_each + 4), "buffers": owned * temporaries}


def loss_workspace(encoders: Encoders, setting: Setting) -> int:
    """Bytes that the relation loss holds in addition to its inputs and the gradient that it keeps."""
    length, heads = setting.seq_len, setting.relation_heads
    width_T, width_S = encoders.teacher.widths[0], encoders.student.widths[0]
    positions = setting.micro_batch * length
    if setting.backend == "triton" and not setting.num_mixed_relations:
        return TRITON_BYTES * heads * positions
    if setting.backend in ("flash", "triton"):
        channels = flash_widths(width_T // heads, width_S // heads, setting.precision)[0]
        per_position = heads * 4 * channels * setting.bytes_each + 2 * 4 * (width_T + width_S)
        return int(FLASH_TEMPORARIES * positions * per_position)
    budget = TILE_ENTRIES_CPU if setting.on_cpu else TILE_ENTRIES_GPU
    rows = min(setting.micro_batch, max(1, budget // (heads * length**2)))
    heads_per_tile = min(heads * rows, max(1, budget // length**2))
    queries = min(length, max(1, budget // (heads_per_tile * length)))
    maps = 2 * 4 * heads_per_tile * length * queries
    return maps + 4 * rows * length * (width_T + 3 * width_S)


def flash_widths(head_T: int, head_S: int, precision: str) -> list[int]:
    """Channels per head of the `flash` backend's four attention calls, with their bias channels, in multiples of 8."""
    biases = 1 if precision == "fp32" else 3
    return [-(-n // 8) * 8 for n in (head_T + head_S, head_S, head_S + biases, max(head_T + biases, head_S))]
