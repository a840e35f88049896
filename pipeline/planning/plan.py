"""What a run needs on one cluster: memory, time, traffic, disk.

In: a recipe, a DeepSpeed JSON and `Hardware`. Out: a `Plan`, or a `UserError` that names the changes with which the run
fits. `Planner` traces each micro-batch once and then plans any ZeRO stage and number of nodes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import Recipe
from pipeline.distillation.relations.selection import NUM_TIMED_ROWS
from pipeline.errors import UserError
from pipeline.planning.communication import Collective, collectives_of
from pipeline.planning.devices import Hardware
from pipeline.planning.memory import GIB, Memory, Setting, Trained, memory_of
from pipeline.planning.meta_models import ADAM_BYTES, Encoders, build_encoders, read_config
from pipeline.planning.timing import (
    PLANNED_BACKENDS,
    Counted,
    StepTime,
    hooks_of_pass,
    loss_s,
    pass_s,
    relation_s,
    step_time,
)
from pipeline.planning.trace import PassCost, StudentCost, trace_student, trace_teacher
from pipeline.runtime import ds_config
from pipeline.runtime.ds_config import Precisions, split_batch

NUM_CC100_LANGUAGES = 116
SECONDS_PER_DAY = 86_400
P = TypeVar("P", bound="Planner")


def with_recomputed_activations(recipe: Recipe) -> tuple[str, Recipe]:
    """The options with which every student recomputes its activations, and the recipe with them. Empty where all do."""
    differences = recipe.students or {"": {}}
    keys = dict.fromkeys(
        f"students.{name}.student" if "checkpointing" in differences[name].get("student", {}) else "student"
        for name, member in recipe.members().items()
        if not member.student.checkpointing
    )
    words = " ".join(f"--set {key}.checkpointing=true" for key in keys)
    students = recipe.students and {
        name: {**changes, "student": {**changes.get("student", {}), "checkpointing": True}}
        for name, changes in recipe.students.items()
    }
    student = dataclasses.replace(recipe.student, checkpointing=True)
    return words, dataclasses.replace(recipe, student=student, students=students)


@dataclass
class Plan:
    """One run on one cluster."""

    setting: Setting
    nodes: int
    gpus_per_node: int
    memory: Memory
    step: StepTime
    collectives: list[Collective]
    checkpoint_bytes: int
    checkpoint_stall_s: float  # the snapshot, while training waits
    checkpoint_write_s: float  # in the background
    evaluation_s: float
    run_s: float
    warnings: list[str]

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpu_hours(self) -> float:
        return self.run_s * self.num_gpus / 3600


class Planner:
    """Plans of one recipe and one DeepSpeed JSON on one kind of device."""

    def __init__(
        self,
        recipe: Recipe,
        recipe_path: Path,
        ds_path: Path,
        hardware: Hardware,
        teacher_config: Path | None = None,
    ):
        self.recipe, self.recipe_path, self.ds_path = recipe, recipe_path, ds_path
        self.hardware, self.teacher_config = hardware, teacher_config
        self._teacher_costs: dict[tuple, PassCost] = {}
        self._student_costs: dict[tuple, StudentCost] = {}

    @cached_property
    def encoders(self) -> Encoders:
        return build_encoders(self.recipe, read_config(self.recipe.teacher, self.teacher_config))

    @property
    def parameters(self) -> dict[str, int]:
        """Of the models as they run in training, and of the student's trained and untrained part."""
        encoders = self.encoders
        return {
            "teacher": encoders.teacher_parameters,
            "student": encoders.student_parameters,
            "trained": encoders.trained_parameters,
            "untrained": encoders.sizes.untrained,
        }

    def with_changes(self, **changes: Any) -> Planner:
        """A planner for a recipe whose student or teacher placement differs."""
        return self.like(type(self), dataclasses.replace(self.recipe, **changes))

    def like(self, kind: type[P], recipe: Recipe) -> P:
        """A planner for another recipe with the same teacher, JSON and device. It shares the traces."""
        other = kind(recipe, self.recipe_path, self.ds_path, self.hardware, self.teacher_config)
        other._teacher_costs, other._student_costs = self._teacher_costs, self._student_costs
        return other

    # -- settings

    def setting(
        self, nodes: int, gpus_per_node: int, stage: int | None = None, micro_batch: int | None = None
    ) -> Setting:
        """What one GPU of the cluster runs. Raises `UserError` where recipe, JSON and device do not agree."""
        recipe, relations, device = self.recipe, self.recipe.relations, self.hardware.device
        num_gpus = nodes * gpus_per_node
        batch = split_batch(recipe.global_batch, micro_batch or recipe.micro_batch_per_gpu, num_gpus)
        on_cpu = device.name == "cpu"
        can = Precisions(not on_cpu, device.bf16, device.bf16, device.name)
        config, self.warnings = ds_config.resolve(
            self.ds_path, str(self.recipe_path), recipe.optimizer, batch, num_gpus, can
        )
        zero = config["zero_optimization"]
        precision = ds_config.precision_of(config)
        teacher_precision: str = recipe.teacher_options.dtype
        if teacher_precision == "auto":
            half = "bf16" if device.bf16 else "fp16"
            teacher_precision = precision if precision != "fp32" else half
        num_layers = len(relations.layers or [None])
        setting = Setting(
            stage=stage or zero["stage"],
            precision=precision,
            teacher_precision=teacher_precision,
            world_size=num_gpus,
            gpus_per_node=gpus_per_node,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
            seq_len=recipe.seq_len,
            relation_heads=relations.heads,
            num_relations=num_layers * len(relations.pairs) + (relations.tail == "relation"),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            overlap=bool(zero.get("overlap_comm", (stage or zero["stage"]) == 3)),
            offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            teacher_partitioned=recipe.teacher_options.placement == "zero3",
            on_cpu=on_cpu,
            backend="chunked" if relations.backend == "auto" else relations.backend,
            num_mixed_relations=num_layers * sum(pair[0] != pair[-1] for pair in relations.pairs),
            fused_adam=bool(config["optimizer"]["params"].get("fused")),
        )
        return self._with_chosen_backend(setting) if relations.backend == "auto" else setting

    def _with_chosen_backend(self, setting: Setting) -> Setting:
        """The backend that a run chooses on its first batch on a GPU: the fastest for Q-Q of a few rows, as
        relations/selection.py times it. On a CPU, and on GPUs without the kernels of the others, it is `chunked`."""
        if setting.on_cpu or not self.hardware.device.flash:
            return setting
        rows = min(setting.micro_batch, NUM_TIMED_ROWS)

        def timed_s(backend: str) -> float:
            return relation_s(self.encoders, dataclasses.replace(setting, micro_batch=rows), backend, self.hardware)

        return dataclasses.replace(setting, backend=min(PLANNED_BACKENDS, key=timed_s))

    # -- plans

    def plan(self, nodes: int, gpus_per_node: int, stage: int | None = None, micro_batch: int | None = None) -> Plan:
        """The plan of one cluster, whether the run fits or not."""
        setting = self.setting(nodes, gpus_per_node, stage, micro_batch)
        teacher, student = self.costs(setting)
        collectives = collectives_of(self.encoders, setting)
        step = step_time(Counted(self.encoders, teacher, student, collectives), setting, self.hardware)
        stall_s, write_s = self._checkpoint_s(setting)
        evaluation_s = self._evaluation_s(setting, teacher, student)
        return Plan(
            setting=setting,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            memory=memory_of(teacher, {"": Trained(self.encoders, student, setting)}, self.hardware.assumptions),
            step=step,
            collectives=collectives,
            checkpoint_bytes=self.encoders.sizes.checkpoint_bytes,
            checkpoint_stall_s=stall_s,
            checkpoint_write_s=write_s,
            evaluation_s=evaluation_s,
            run_s=self.run_s(step.total, stall_s, evaluation_s),
            warnings=self.warnings,
        )

    def run_s(self, step_s: float, stall_s: float, evaluation_s: float) -> float:
        """Seconds of the run: steps, the stalls of its checkpoints, and evaluations, of which one is before the first step."""
        recipe = self.recipe
        return (
            recipe.steps * step_s
            + recipe.steps / recipe.save_every * stall_s
            + (recipe.steps / recipe.eval_every + 1) * evaluation_s
        )

    def plans_alone(self, nodes: int, gpus_per_node: int) -> dict[str, Plan]:
        """Name -> the plan of that student's own run. A run with one student has nothing to compare."""
        return {}

    def costs(self, setting: Setting) -> tuple[PassCost, StudentCost]:
        """The traced micro-batch of teacher and student. Equal ones are traced once."""
        teacher, student = self.encoders.teacher, self.encoders.student
        rows, length, gradients_stay = setting.micro_batch, setting.seq_len, setting.stage == 1
        teacher_key = (*teacher.layers, teacher.with_output, rows, setting.teacher_precision)
        if teacher_key not in self._teacher_costs:
            self._teacher_costs[teacher_key] = trace_teacher(teacher, rows, length, setting.teacher_precision)
        uses = self._gradients_per_tap()
        key = (self._student_key, uses, rows, setting.precision, gradients_stay)
        if key not in self._student_costs:
            self._student_costs[key] = trace_student(student, rows, length, setting.precision, uses, gradients_stay)
        return self._teacher_costs[teacher_key], self._student_costs[key]

    @cached_property
    def _student_key(self) -> tuple:
        """What decides the operations of the student's passes: students of a sweep are often equal in it."""
        student = self.encoders.student
        return (student.model.config.to_json_string(), repr(self.recipe.student), *student.layers, student.with_output)

    def _gradients_per_tap(self) -> int:
        """Gradients that the loss keeps for each of Q, K and V. A relation of two different tensors keeps two."""
        kept = sum(1 if pair[0] == pair[-1] else 2 for pair in self.recipe.relations.pairs)
        return -(-kept // 3)

    def _checkpoint_s(self, setting: Setting) -> tuple[float, float]:
        """Seconds of the snapshot and of writing: every rank its fp32 weights and moments, rank 0 the untrained weights."""
        state = ADAM_BYTES * self.encoders.trained_parameters
        untrained = self.encoders.sizes.checkpoint_bytes - state
        rate = self.hardware.assumptions.checkpoint_gb_s * 1e9
        stall_s = state / setting.world_size / self.hardware.host_copy_bytes_per_s
        return stall_s, state / setting.nodes / rate + untrained / rate

    def _evaluation_s(self, setting: Setting, teacher: PassCost, student: StudentCost) -> float:
        """The held-out rows of every language, forward only, divided among the ranks."""
        languages = len(self.recipe.languages or []) or NUM_CC100_LANGUAGES
        batches = -(-self.recipe.heldout_rows * languages // (setting.micro_batch * setting.world_size))
        one = pass_s(teacher, setting.teacher_precision, self.hardware)
        hooks = hooks_of_pass(self.encoders, setting, is_backward=False)
        one += pass_s(student.forward, setting.precision, self.hardware, hooks)
        return batches * (one + loss_s(self.encoders, setting, self.hardware))

    # -- does it fit

    def fits(self, plan: Plan) -> bool:
        return plan.memory.total <= self.hardware.device.memory_gib * GIB

    def largest_micro_batch(self, nodes: int, gpus_per_node: int, stage: int | None = None) -> int | None:
        """The largest divisor of a rank's rows that fits; None where not even one row does."""
        per_rank = self.recipe.global_batch // (nodes * gpus_per_node)
        divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        best = None
        while divisors:  # memory grows with the micro-batch, so a binary search finds it
            middle = len(divisors) // 2
            if self.fits(self.plan(nodes, gpus_per_node, stage, divisors[middle])):
                best, divisors = divisors[middle], divisors[middle + 1 :]
            else:
                divisors = divisors[:middle]
        return best

    def check_fits(self, plan: Plan) -> None:
        """Raises `UserError` where the plan does not fit: the largest part, and the changes with which it fits."""
        if self.fits(plan):
            return
        where, device = (plan.nodes, plan.gpus_per_node), self.hardware.device
        remedies = [text for text, fits in self._remedies(plan, where) if fits]
        largest = max(plan.memory.parts, key=plan.memory.parts.__getitem__)
        advice = "No single change would make it fit: use GPUs with more memory, or more GPUs"
        if remedies:
            advice = f"What would fit: {'; or '.join(remedies)}"
        raise UserError(
            f"{self.recipe_path} with {self.ds_path} does not fit on {device.name}: it needs "
            f"{plan.memory.total / GIB:.1f} GiB per GPU of {device.memory_gib} at its peak ({plan.memory.moment}; "
            f"the largest part is {largest}, {plan.memory.parts[largest] / GIB:.1f} GiB). {advice}"
        )

    def _remedies(self, plan: Plan, where: tuple[int, int]) -> list[tuple[str, bool]]:
        """Single changes, the cheapest first, and whether the run fits with each."""
        micro_batch = self.largest_micro_batch(*where)
        found = [(f"--set micro_batch_per_gpu={micro_batch}", micro_batch is not None)]
        words, changed = with_recomputed_activations(self.recipe)
        if words:
            other = self.like(type(self), changed)
            found.append((f"{words} (a third more work)", other.fits(other.plan(*where))))
        for stage in range(plan.setting.stage + 1, 4):
            found.append((f"ZeRO stage {stage}", self.fits(self.plan(*where, stage))))
        if not plan.setting.teacher_partitioned:
            options = dataclasses.replace(self.recipe.teacher_options, placement="zero3")
            other = self.with_changes(teacher_options=options)
            found.append(("--set teacher_options.placement=zero3", other.fits(other.plan(*where))))
            if micro_batch is None:
                both = other.largest_micro_batch(*where)
                text = f"--set teacher_options.placement=zero3 --set micro_batch_per_gpu={both}"
                found.append((text, both is not None))
        return found
