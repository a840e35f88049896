"""The plan of several students with one teacher, and of each student's run alone.

In: a recipe with `students`. Out: one `Plan` of the run that trains all of them, composed of the members' plans: the teacher
runs once, in the first member's plan, and the students take turns.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from operator import attrgetter
from typing import Any

from pipeline.distillation.models.loading import count_parameters
from pipeline.distillation.tap import TappedEncoder
from pipeline.errors import about_student
from pipeline.planning.memory import Setting, Trained, memory_of
from pipeline.planning.meta_models import Encoders, read_config, teacher_of_all
from pipeline.planning.plan import Plan, Planner
from pipeline.planning.timing import StepTime
from pipeline.planning.trace import PassCost, StudentCost


class FamilyPlanner(Planner):
    """Plans of a recipe with `students`."""

    @cached_property
    def alone(self) -> dict[str, Planner]:
        """Name -> the planner of that student's own run."""
        return {name: self.like(Planner, recipe) for name, recipe in self.recipe.members().items()}

    @cached_property
    def teacher(self) -> TappedEncoder:
        """The one that all students read."""
        config = read_config(self.recipe.teacher, self.teacher_config)
        return teacher_of_all(list(self.recipe.members().values()), config)

    @cached_property
    def _encoders_alone(self) -> dict[str, Encoders]:
        found = {}
        for name, planner in self.alone.items():
            with about_student(name):
                found[name] = planner.encoders
        return found

    @cached_property
    def _members(self) -> dict[str, _Member]:
        """Name -> the planner of that student in this run."""
        members = {name: self.like(_Member, recipe) for name, recipe in self.recipe.members().items()}
        for number, (name, member) in enumerate(members.items()):
            member.encoders = dataclasses.replace(self._encoders_alone[name], teacher=self.teacher)
            member.runs_teacher = number == 0
        return members

    @property
    def parameters(self) -> dict[str, int]:
        """Of the shared teacher, and of all students together."""
        of_students = [member.parameters for member in self._members.values()]
        students = {part: sum(each[part] for each in of_students) for part in ("student", "trained", "untrained")}
        return {"teacher": count_parameters(self.teacher), **students}

    def plan(self, nodes: int, gpus_per_node: int, stage: int | None = None, micro_batch: int | None = None) -> Plan:
        """The plan of the run that trains all students, whether it fits or not."""
        members = self._members
        plans = [member.plan(nodes, gpus_per_node, stage, micro_batch) for member in members.values()]
        first = plans[0]
        parts = {part: sum(plan.step.parts[part] for plan in plans) for part in first.step.parts}
        parts["data"] = first.step.parts["data"]  # the batch is copied once
        step = StepTime(parts, _sum(plans, "step.flops"), _sum(plans, "step.host_wait_s"))
        stall_s, evaluation_s = _sum(plans, "checkpoint_stall_s"), _sum(plans, "evaluation_s")
        costs = [member.costs(plan.setting) for member, plan in zip(members.values(), plans, strict=True)]
        # later members leave it out for the traffic, not for the memory
        partitioned = first.setting.teacher_partitioned
        students = {
            name: Trained(member.encoders, student, dataclasses.replace(plan.setting, teacher_partitioned=partitioned))
            for (name, member), (_, student), plan in zip(members.items(), costs, plans, strict=True)
        }
        return dataclasses.replace(
            first,
            memory=memory_of(costs[0][0], students, self.hardware.assumptions),
            step=step,
            collectives=[collective for plan in plans for collective in plan.collectives],
            checkpoint_bytes=_sum(plans, "checkpoint_bytes"),
            checkpoint_stall_s=stall_s,
            checkpoint_write_s=_sum(plans, "checkpoint_write_s"),
            evaluation_s=evaluation_s,
            run_s=self.run_s(step.total, stall_s, evaluation_s),
        )

    def plans_alone(self, nodes: int, gpus_per_node: int) -> dict[str, Plan]:
        """Name -> the plan of that student's own run on the same cluster."""
        return {name: planner.plan(nodes, gpus_per_node) for name, planner in self.alone.items()}

    def _remedies(self, plan: Plan, where: tuple[int, int]) -> list[tuple[str, bool]]:
        alone = all(planner.fits(planner.plan(*where)) for planner in self.alone.values())
        return [*super()._remedies(plan, where), ("one run for each student", alone)]


class _Member(Planner):
    """One student of the run. Only the first one's plan has the teacher's forward and traffic."""

    runs_teacher = True

    def setting(
        self, nodes: int, gpus_per_node: int, stage: int | None = None, micro_batch: int | None = None
    ) -> Setting:
        found = super().setting(nodes, gpus_per_node, stage, micro_batch)
        return dataclasses.replace(found, teacher_partitioned=found.teacher_partitioned and self.runs_teacher)

    def costs(self, setting: Setting) -> tuple[PassCost, StudentCost]:
        teacher, student = super().costs(setting)
        return teacher if self.runs_teacher else PassCost(), student


def _sum(plans: list[Plan], figure: str) -> Any:
    """The sum of one figure (a dotted name) over the plans."""
    return sum(map(attrgetter(figure), plans))
