"""A plan as text for the console and as figures for programs. Used by command.py alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.planning.memory import GIB
from pipeline.planning.plan import SECONDS_PER_DAY, Plan, Planner
from pipeline.planning.preparation import CC100_FILES_GB, CC100_TEXT_GB, Preparation
from pipeline.planning.scaling import Point


def text(
    planner: Planner,
    plan: Plan,
    largest: int | None,
    preparation: Preparation,
    stages: dict[int, Plan | None],
    points: list[Point],
    scaling_knee: str,
) -> str:
    """The whole report; every line of it is a prediction."""
    setting, device, step = plan.setting, planner.device, plan.step
    mfu = step.flops / (step.total * device.flops_per_s(setting.precision))
    of = f"{plan.nodes} x {plan.gpus_per_node} {device.name}"
    micro = f"{setting.micro_batch} rows x {setting.accumulation} x {plan.num_gpus} GPUs"
    loss = "flash" if setting.flash_loss else "chunked"
    share = [[name, f"{seconds * 1e3:.1f}", f"{seconds / step.total:.0%}"] for name, seconds in step.parts.items()]
    parts = [[name, f"{size / GIB:.2f}"] for name, size in plan.memory.parts.items()]
    sections = [
        f"# {planner.recipe_path} on {of}: a prediction (docs/planning.md says what it rests on)",
        *(f"warning: {warning}" for warning in plan.warnings),
        f"ZeRO-{setting.stage}, {setting.precision}, teacher in {setting.teacher_precision}, loss by `{loss}`, "
        f"micro-batch {micro} of {setting.seq_len} tokens",
        "",
        f"## Memory per GPU, GiB (fullest: {plan.memory.moment})",
        _table(["part", "GiB"], [*parts, ["all", f"{plan.memory.total / GIB:.2f} of {device.memory_gib:g}"]]),
        f"largest micro-batch that fits: {largest}",
        "",
        "## One optimizer step, ms",
        _table(["part", "ms", "share"], [*share, ["all", f"{step.total * 1e3:.1f}", "100%"]]),
        f"{step.flops / 1e12:.1f} TFLOP per GPU, {mfu:.0%} of the peak; "
        f"{planner.recipe.global_batch * setting.seq_len / step.total / 1e3:.0f} thousand tokens/s",
        "",
        "## The run",
        *_run_lines(planner, plan, preparation),
        "",
        "## ZeRO stages on the same GPUs",
        _stages_table(planner, stages),
        "",
        "## More GPUs, same global batch",
        _scaling_table(points),
        scaling_knee,
    ]
    return "\n".join(sections)


def _run_lines(planner: Planner, plan: Plan, preparation: Preparation) -> list[str]:
    recipe = planner.recipe
    kept = recipe.checkpoint.keep + (
        recipe.steps // recipe.checkpoint.keep_every if recipe.checkpoint.keep_every else 0
    )
    size_gb = plan.checkpoint_bytes / 1e9
    done = "none, the shards are there" if preparation.there else _hours_of_preparation(preparation)
    return [
        f"{plan.run_s / SECONDS_PER_DAY:.2f} days, {plan.gpu_hours:.0f} GPU-hours for {recipe.steps} steps "
        f"and {preparation.tokens_needed / 1e9:.1f} G tokens ({preparation.epochs:.2g} times the shards)",
        f"checkpoint: {size_gb:.2f} GB, training waits {plan.checkpoint_stall_s:.2f} s, written within "
        f"{plan.checkpoint_write_s:.0f} s; {kept} are kept: {kept * size_gb:.0f} GB",
        f"held-out evaluation: {plan.evaluation_s:.1f} s every {recipe.eval_every} steps",
        f"shards: {preparation.tokens / 1e9:.2f} G tokens, {preparation.shard_gb:.1f} GB",
        f"preparation: {done}",
    ]


def _hours_of_preparation(preparation: Preparation) -> str:
    corpus = f" (CC-100; {CC100_FILES_GB:.0f} GB as .xz)" if preparation.text_gb == CC100_TEXT_GB else ""
    return (
        f"{preparation.text_gb:.0f} GB of text{corpus}, {preparation.core_hours:.0f} core-hours, "
        f"{preparation.wall_hours:.1f} h on the cores given"
    )


def _stages_table(planner: Planner, stages: dict[int, Plan | None]) -> str:
    rows = []
    for stage, plan in stages.items():
        if plan is None:
            rows.append([f"ZeRO-{stage}", "-", "-", "-", "refused"])
            continue
        communication = plan.step.parts["communication"]
        verdict = "fits" if planner.fits(plan) else "does not fit"
        cells = [
            f"{plan.memory.total / GIB:.2f}",
            f"{plan.step.total * 1e3:.1f}",
            f"{communication * 1e3:.2f}",
            verdict,
        ]
        rows.append([f"ZeRO-{stage}", *cells])
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
    """Markdown whose columns line up on a console too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(
    planner: Planner,
    plan: Plan,
    largest: int | None,
    preparation: Preparation,
    stages: dict[int, Plan | None],
    points_of: dict[int, list[Point]],
) -> dict[str, Any]:
    """Everything in the report, in bytes and seconds."""
    return {
        "recipe": str(planner.recipe_path),
        "deepspeed": str(planner.ds_path),
        "device": dataclasses.asdict(planner.device),
        "assumptions": dataclasses.asdict(planner.assumptions),
        "parameters": {
            "teacher": planner.encoders.teacher_parameters,
            "student": planner.encoders.student_parameters,
            "trained": planner.encoders.trained_parameters,
            "carried": planner.encoders.untrained_parameters,
        },
        "plan": plan_figures(plan),
        "largest_micro_batch": largest,
        "preparation": dataclasses.asdict(preparation),
        "stages": {stage: None if other is None else plan_figures(other) for stage, other in stages.items()},
        "scaling": {
            stage: [
                {
                    "gpus": point.num_gpus,
                    "fits": point.fits,
                    "efficiency": point.efficiency,
                    "why_not": point.why_not,
                    "plan": None if point.plan is None else plan_figures(point.plan),
                }
                for point in points
            ]
            for stage, points in points_of.items()
        },
    }


def plan_figures(plan: Plan) -> dict[str, Any]:
    """One plan as plain numbers."""
    tree = dataclasses.asdict(plan)
    tree["memory"]["total"] = plan.memory.total
    tree["step"]["total"] = plan.step.total
    return {**tree, "gpus": plan.num_gpus, "gpu_hours": plan.gpu_hours}
