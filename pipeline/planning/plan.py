"""From a recipe, a DeepSpeed JSON and a machine to what the run will need: memory, time, traffic, disk.

In: the two files and a device. Out: a `Plan` for one cluster, and what would fit where it does not. `Planner` rehearses each
micro-batch once and answers for any ZeRO stage and number of nodes. Used by command.py, scaling.py and bench_plan.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import Recipe
from pipeline.distillation.relations.loss import check_heads
from pipeline.errors import UserError
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.communication import Collective, collectives_of
from pipeline.planning.devices import Device
from pipeline.planning.memory import ADAM_BYTES, GIB, Memory, Setting, memory_of
from pipeline.planning.meta_models import Encoders, build_encoders
from pipeline.planning.timing import StepTime, loss_s, passage_s, step_time
from pipeline.planning.trace import Passage, StudentPassages, trace_student, trace_teacher
from pipeline.runtime import ds_config
from pipeline.runtime.ds_config import Precisions, split_batch

NUM_CC100_LANGUAGES = 116
SECONDS_PER_DAY = 86_400


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
    checkpoint_write_s: float  # beside training
    evaluation_s: float
    run_s: float
    warnings: list[str] = field(default_factory=list)

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
        device: Device,
        assumptions: Assumptions = Assumptions(),  # noqa: B008  (frozen)
        teacher_config: Path | None = None,
    ):
        self.recipe, self.recipe_path, self.ds_path = recipe, recipe_path, ds_path
        self.device, self.assumptions, self.teacher_config = device, assumptions, teacher_config
        self._teacher_passages: dict[tuple, Passage] = {}
        self._student_passages: dict[tuple, StudentPassages] = {}

    @cached_property
    def encoders(self) -> Encoders:
        return build_encoders(self.recipe, self.teacher_config)

    def with_changes(self, **changes: Any) -> Planner:
        """A planner for a recipe whose student or teacher placement differs; the teacher's passages stay as they were."""
        recipe = dataclasses.replace(self.recipe, **changes)
        other = Planner(recipe, self.recipe_path, self.ds_path, self.device, self.assumptions, self.teacher_config)
        other._teacher_passages = self._teacher_passages
        return other

    # -- settings

    def setting(self, num_gpus: int, stage: int | None = None, micro_batch: int | None = None) -> Setting:
        """What one GPU of `num_gpus` will run. Raises `UserError` where recipe, JSON and device do not agree."""
        recipe, relations = self.recipe, self.recipe.relations
        batch = split_batch(recipe.global_batch, micro_batch or recipe.micro_batch_per_gpu, num_gpus)
        on_cpu = self.device.name == "cpu"
        can = Precisions(not on_cpu, self.device.bf16, self.device.bf16, self.device.name)
        config, self.warnings = ds_config.resolve(
            self.ds_path, str(self.recipe_path), recipe.optimizer, batch, num_gpus, can
        )
        zero = config["zero_optimization"]
        precision = ds_config.precision_of(config)
        teacher_precision: str = recipe.teacher_options.dtype
        if teacher_precision == "auto":
            half = "bf16" if self.device.bf16 else "fp16"
            teacher_precision = precision if precision != "fp32" else half
        num_layers = len(relations.layers or [None])
        check_heads(self.encoders.student.widths[0], relations.heads, "student")
        setting = Setting(
            stage=stage or zero["stage"],
            precision=precision,
            teacher_precision=teacher_precision,
            world_size=num_gpus,
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
            flash_loss=relations.backend == "flash",
        )
        return self._with_fastest_loss(setting) if relations.backend == "auto" else setting

    def _with_fastest_loss(self, setting: Setting) -> Setting:
        """The backend that the first batch would choose on a GPU; on a CPU it is always `chunked`."""
        if setting.on_cpu or not self.device.flash:
            return setting
        flash = dataclasses.replace(setting, flash_loss=True)
        return min(setting, flash, key=lambda s: loss_s(self.encoders, s, self.device, self.assumptions))

    # -- plans

    def plan(self, nodes: int, gpus_per_node: int, stage: int | None = None, micro_batch: int | None = None) -> Plan:
        """Everything about one cluster, whether it fits or not."""
        setting = self.setting(nodes * gpus_per_node, stage, micro_batch)
        teacher, student = self.passages(setting)
        collectives = collectives_of(self.encoders, setting)
        memory = memory_of(self.encoders, teacher, student, setting, self.assumptions)
        step = step_time(
            self.encoders, teacher, student, collectives, setting, self.device, gpus_per_node, self.assumptions
        )
        plan = Plan(setting, nodes, gpus_per_node, memory, step, collectives, 0, 0.0, 0.0, 0.0, 0.0, self.warnings)
        self._add_checkpoints(plan)
        plan.evaluation_s = self._evaluation_s(plan, teacher, student)
        steps = self.recipe.steps
        plan.run_s = (
            steps * step.total
            + steps / self.recipe.save_every * plan.checkpoint_stall_s
            + (steps / self.recipe.eval_every + 1) * plan.evaluation_s
        )
        return plan

    def passages(self, setting: Setting) -> tuple[Passage, StudentPassages]:
        """The rehearsed micro-batch, from memory where it has been rehearsed before."""
        rows, stays = setting.micro_batch, setting.stage == 1
        if (rows, setting.teacher_precision) not in self._teacher_passages:
            self._teacher_passages[rows, setting.teacher_precision] = trace_teacher(
                self.encoders.teacher, rows, setting.seq_len, setting.teacher_precision
            )
        key = (rows, setting.precision, stays)
        if key not in self._student_passages:
            self._student_passages[key] = trace_student(
                self.encoders.student, rows, setting.seq_len, setting.precision, self._gradients_per_tap(), stays
            )
        return self._teacher_passages[rows, setting.teacher_precision], self._student_passages[key]

    def _gradients_per_tap(self) -> int:
        """How many gradients the loss keeps for each of Q, K and V; a relation of two tensors keeps two."""
        kept = sum(1 if pair[0] == pair[-1] else 2 for pair in self.recipe.relations.pairs)
        return -(-kept // 3)

    def _add_checkpoints(self, plan: Plan) -> None:
        """fp32 weights and moments from every rank, and what is carried along from the first."""
        state = ADAM_BYTES * self.encoders.trained_parameters
        plan.checkpoint_bytes = state + 4 * self.encoders.untrained_parameters
        plan.checkpoint_stall_s = state / plan.num_gpus / (self.assumptions.host_copy_gb_s * 1e9)
        rate = self.assumptions.checkpoint_gb_s * 1e9
        plan.checkpoint_write_s = state / plan.nodes / rate + 4 * self.encoders.untrained_parameters / rate

    def _evaluation_s(self, plan: Plan, teacher: Passage, student: StudentPassages) -> float:
        """The held-out rows of every language, forward only, spread over the ranks."""
        setting, languages = plan.setting, len(self.recipe.languages or []) or NUM_CC100_LANGUAGES
        batches = -(-self.recipe.heldout_rows * languages // (setting.micro_batch * plan.num_gpus))
        one = passage_s(teacher, setting.teacher_precision, self.device, self.assumptions)
        one += passage_s(student.forward, setting.precision, self.device, self.assumptions)
        return batches * (one + loss_s(self.encoders, setting, self.device, self.assumptions))

    # -- does it fit

    def fits(self, plan: Plan) -> bool:
        return plan.memory.total <= self.device.memory_gib * GIB

    def largest_micro_batch(self, nodes: int, gpus_per_node: int, stage: int | None = None) -> int | None:
        """The largest divisor of a rank's rows that fits; None where not even one row does."""
        per_rank = self.recipe.global_batch // (nodes * gpus_per_node)
        divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        best = None
        while divisors:  # memory grows with the micro-batch, so halve the candidates
            middle = len(divisors) // 2
            if self.fits(self.plan(nodes, gpus_per_node, stage, divisors[middle])):
                best, divisors = divisors[middle], divisors[middle + 1 :]
            else:
                divisors = divisors[:middle]
        return best

    def refuse(self, plan: Plan) -> None:
        """A `UserError` that says what is too large and which changes would make it fit."""
        where = (plan.nodes, plan.gpus_per_node)
        remedies = [text for text, fits in self._remedies(plan, where) if fits]
        largest = max(plan.memory.parts, key=plan.memory.parts.__getitem__)
        advice = "No single change would make it fit: take GPUs with more memory, or more of them"
        if remedies:
            advice = f"What would fit: {'; or '.join(remedies)}"
        raise UserError(
            f"{self.recipe_path} with {self.ds_path} does not fit on {self.device.name}: "
            f"{plan.memory.total / GIB:.1f} GiB per GPU of {self.device.memory_gib} at its fullest ({plan.memory.moment}; "
            f"most of it {largest}, {plan.memory.parts[largest] / GIB:.1f} GiB). {advice}"
        )

    def _remedies(self, plan: Plan, where: tuple[int, int]) -> list[tuple[str, bool]]:
        """Single changes, the cheapest first, and whether each is enough."""
        micro_batch = self.largest_micro_batch(*where)
        found = [(f"--set micro_batch_per_gpu={micro_batch}", micro_batch is not None)]
        if not self.recipe.student.checkpointing:
            other = self.with_changes(student=dataclasses.replace(self.recipe.student, checkpointing=True))
            found.append(("--set student.checkpointing=true (a third more work)", other.fits(other.plan(*where))))
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
