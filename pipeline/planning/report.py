"""A plan as text for the console and as figures for programs.

In: a `PlanReport`. Out: Markdown text, or a tree of numbers in bytes and seconds that can be written as JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.planning.memory import GIB
from pipeline.planning.plan import SECONDS_PER_DAY, Plan, Planner
from pipeline.planning.preparation import CC100_FILES_GB, CC100_TEXT_GB, Preparation
from pipeline.planning.scaling import Point, scaling_knee


@dataclass(frozen=True)
class PlanReport:
    """The plan of a run, and the alternatives that the report compares it with."""

    planner: Planner
    plan: Plan
    largest_micro_batch: int | None
    preparation: Preparation
    stages: dict[int, Plan | None]
    points_of: dict[int, list[Point]]  # ZeRO stage -> numbers of GPUs
    alone: dict[str, Plan]  # of a run with several students: each one's own run

    @property
    def points(self) -> list[Point]:
        return self.points_of[self.plan.setting.stage]

    @property
    def separate_s(self) -> float:
        """Seconds of the students' own runs, one after the other."""
        return sum(plan.run_s for plan in self.alone.values())


def text(report: PlanReport) -> str:
    """The complete report. Every figure in it is a prediction."""
    planner, plan = report.planner, report.plan
    setting, device, step = plan.setting, planner.hardware.device, plan.step
    mfu = step.flops / (step.total * device.flops_per_s(setting.precision))
    micro = f"{setting.micro_batch} rows x {setting.accumulation} x {plan.num_gpus} GPUs"
    share = [[name, f"{seconds * 1e3:.1f}", f"{seconds / step.total:.0%}"] for name, seconds in step.parts.items()]
    parts = [[name, f"{size / GIB:.2f}"] for name, size in plan.memory.parts.items()]
    backends = ", ".join(dict.fromkeys(f"`{each.setting.backend}`" for each in report.alone.values() or [plan]))
    sections = [
        f"# {planner.recipe_path} on {plan.nodes} x {plan.gpus_per_node} {device.name}: a prediction (method: docs/planning.md)",
        *(f"warning: {warning}" for warning in plan.warnings),
        f"ZeRO-{setting.stage}, {setting.precision}, teacher in {setting.teacher_precision}, "
        f"loss by {backends}, micro-batch {micro} of {setting.seq_len} tokens",
        "",
        f"## Memory per GPU, GiB (peak: {plan.memory.moment})",
        _table(["part", "GiB"], [*parts, ["all", f"{plan.memory.total / GIB:.2f} of {device.memory_gib:g}"]]),
        f"largest micro-batch that fits: {report.largest_micro_batch}",
        "",
        "## One optimizer step, ms",
        _table(["part", "ms", "share"], [*share, ["all", f"{step.total * 1e3:.1f}", "100%"]]),
        f"{step.flops / 1e12:.1f} TFLOP per GPU, {mfu:.0%} of the peak; "
        f"{planner.recipe.global_batch * setting.seq_len / step.total / 1e3:.0f} thousand tokens/s",
        f"in {step.host_wait_s * 1e3:.1f} ms of it the GPU waits for the host, which needs "
        f"{planner.hardware.assumptions.launch_s * 1e6:g} us to start a kernel (--launch-us)",
        "",
        "## The run",
        *_run_lines(planner, plan, report.preparation),
        "",
        *(_lines_of_students(report) if report.alone else ()),
        "## ZeRO stages on the same GPUs",
        _stages_table(planner, report.stages),
        "",
        "## More GPUs, same global batch",
        _scaling_table(report.points),
        scaling_knee(report.points),
    ]
    return "\n".join(sections)


def _run_lines(planner: Planner, plan: Plan, preparation: Preparation) -> list[str]:
    recipe, keeping = planner.recipe, planner.recipe.checkpoint
    kept = keeping.num_newest_and_best(len(recipe.members())) + keeping.num_milestones(recipe.steps)
    size_gb = plan.checkpoint_bytes / 1e9
    return [
        f"{plan.run_s / SECONDS_PER_DAY:.2f} days, {plan.gpu_hours:.0f} GPU-hours for {recipe.steps} steps "
        f"and {preparation.tokens_needed / 1e9:.1f} G tokens ({preparation.epochs:.2g} times the shards)",
        f"checkpoint: {size_gb:.2f} GB, training waits {plan.checkpoint_stall_s:.2f} s, written within "
        f"{plan.checkpoint_write_s:.0f} s; {kept} are kept: {kept * size_gb:.0f} GB",
        f"held-out evaluation: {plan.evaluation_s:.1f} s every {recipe.eval_every} steps",
        f"shards: {preparation.tokens / 1e9:.2f} G tokens, {preparation.shard_gb:.1f} GB",
        f"preparation: {'none, the shards exist' if preparation.done else _hours_of_preparation(preparation)}",
    ]


def _lines_of_students(report: PlanReport) -> list[str]:
    """The run of all students next to one run for each of them."""
    rows = [[f"{name} alone", *_cost(plan)] for name, plan in report.alone.items()]
    gpu_hours = sum(plan.gpu_hours for plan in report.alone.values())
    rows.append(["sum of these", "", "", "", f"{report.separate_s / SECONDS_PER_DAY:.2f}", f"{gpu_hours:.0f}", ""])
    rows.append(["this run", *_cost(report.plan)])
    header = ["run", "GiB per GPU", "step ms", "teacher ms", "days", "GPU-hours", "checkpoint GB"]
    return [
        f"## {len(report.alone)} students: one run for each, and this run",
        _table(header, rows),
        f"this run takes {report.plan.run_s / report.separate_s:.2f} of the time of the {len(report.alone)} runs together: "
        "the teacher runs once for all students",
        "",
    ]


def _cost(plan: Plan) -> list[str]:
    times = [plan.step.total * 1e3, plan.step.parts["teacher"] * 1e3]
    run = [f"{plan.run_s / SECONDS_PER_DAY:.2f}", f"{plan.gpu_hours:.0f}", f"{plan.checkpoint_bytes / 1e9:.2f}"]
    return [f"{plan.memory.total / GIB:.2f}", *(f"{milliseconds:.1f}" for milliseconds in times), *run]


def _hours_of_preparation(preparation: Preparation) -> str:
    corpus = f" (CC-100; {CC100_FILES_GB:.0f} GB as .xz)" if preparation.text_gb == CC100_TEXT_GB else ""
    return (
        f"{preparation.text_gb:.0f} GB of text{corpus}, {preparation.core_hours:.0f} core-hours, "
        f"{preparation.wall_hours:.1f} h on the given cores"
    )


def _stages_table(planner: Planner, stages: dict[int, Plan | None]) -> str:
    rows = []
    for stage, plan in stages.items():
        if plan is None:
            rows.append([f"ZeRO-{stage}", "-", "-", "-", "not possible"])
            continue
        figures = [f"{plan.memory.total / GIB:.2f}", f"{plan.step.total * 1e3:.1f}"]
        figures += [f"{plan.step.parts['communication'] * 1e3:.2f}", "fits" if planner.fits(plan) else "does not fit"]
        rows.append([f"ZeRO-{stage}", *figures])
    return _table(["stage", "GiB per GPU", "step ms", "communication ms", ""], rows)


def _scaling_table(points: list[Point]) -> str:
    rows = []
    for point in points:
        plan = point.plan
        if plan is None:
            rows.append([str(point.num_gpus), "-", "-", "-", "-", "-", "-", point.why_not])
            continue
        micro = f"{plan.setting.micro_batch} x {plan.setting.accumulation}"
        figures = [f"{plan.step.total * 1e3:.1f}", f"{plan.step.parts['communication'] / plan.step.total:.0%}"]
        figures += [f"{plan.run_s / SECONDS_PER_DAY:.2f}", f"{plan.gpu_hours:.0f}", f"{point.efficiency:.0%}"]
        rows.append([str(point.num_gpus), micro, *figures, point.why_not])
    header = ["GPUs", "micro-batch", "step ms", "communication", "days", "GPU-hours", "of perfect", ""]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns are aligned on a console too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(report: PlanReport) -> dict[str, Any]:
    """Everything in the report, in bytes and seconds."""
    planner = report.planner
    return {
        "recipe": str(planner.recipe_path),
        "deepspeed": str(planner.ds_path),
        "device": dataclasses.asdict(planner.hardware.device),
        "assumptions": dataclasses.asdict(planner.hardware.assumptions),
        "parameters": planner.parameters,
        "plan": plan_figures(report.plan),
        "largest_micro_batch": report.largest_micro_batch,
        "preparation": dataclasses.asdict(report.preparation),
        "stages": {stage: None if other is None else plan_figures(other) for stage, other in report.stages.items()},
        "scaling": {stage: list(map(_point_figures, points)) for stage, points in report.points_of.items()},
        **(_figures_of_students(report) if report.alone else {}),
    }


def _figures_of_students(report: PlanReport) -> dict[str, Any]:
    """`students`: the plan of each one's own run. `ratio`: seconds of this run by those of the separate ones."""
    alone = {name: plan_figures(plan) for name, plan in report.alone.items()}
    return {"students": alone, "separate_s": report.separate_s, "ratio": report.plan.run_s / report.separate_s}


def _point_figures(point: Point) -> dict[str, Any]:
    return {
        "gpus": point.num_gpus,
        "fits": point.fits,
        "efficiency": point.efficiency,
        "why_not": point.why_not,
        "plan": None if point.plan is None else plan_figures(point.plan),
    }


def plan_figures(plan: Plan) -> dict[str, Any]:
    """One plan as plain numbers."""
    tree = dataclasses.asdict(plan)
    tree["memory"]["total"] = plan.memory.total
    tree["step"]["total"] = plan.step.total
    return {**tree, "gpus": plan.num_gpus, "gpu_hours": plan.gpu_hours}
