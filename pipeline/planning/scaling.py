"""The same run at other ZeRO stages and on more GPUs: where adding GPUs is no longer efficient, and why.

In: a `Planner`. Out: `Point`s, a sentence that names the part with the largest growth, and the plot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pipeline.errors import UserError
from pipeline.planning.plan import Plan, Planner

MOST_GPUS = 512
STAGES = (1, 2, 3)
SCALING_KNEE = 0.8  # of perfect speed-up: below this share the report says that more GPUs are not efficient
COLOURS = {
    "teacher": "#4477aa",
    "student": "#66ccee",
    "loss": "#228833",
    "communication": "#ee6677",
    "optimizer": "#ccbb44",
    "data": "#bbbbbb",
}
REASONS = {
    "teacher": "its kernels are too small to fill a GPU, or to keep the host ahead of it",
    "student": "the host starts as many kernels and hooks for few rows as for many",
    "loss": "its kernels are too small to fill a GPU, or to keep the host ahead of it",
    "communication": "the same bytes are sent for few rows as for many",
    "optimizer": "on every GPU the host starts as many kernels, and all gradients are copied through buckets",
    "data": "rows are copied",
}


@dataclass
class Point:
    """One number of GPUs. `plan` is None where the batch does not divide, and `why_not` says so."""

    num_gpus: int
    plan: Plan | None
    fits: bool
    efficiency: float  # GPU-seconds of the first point that fits, divided by this one's
    why_not: str = ""


def scale(planner: Planner, gpus_per_node: int, stage: int | None = None) -> list[Point]:
    """1, 2, 4, ... GPUs of one node, then 2, 4, 8, ... nodes.

    Each point has the largest micro-batch that divides a rank's rows and is not above the recipe's.
    """
    counts = [n for n in (2**i for i in range(10)) if n <= gpus_per_node]
    counts += [gpus_per_node * 2**i for i in range(10) if counts[-1] < gpus_per_node * 2**i <= MOST_GPUS]
    points: list[Point] = []
    for num_gpus in counts:
        rows = planner.recipe.global_batch // num_gpus
        if planner.recipe.global_batch % num_gpus:
            points.append(Point(num_gpus, None, False, 0.0, "global_batch does not divide"))
            continue
        micro = max(m for m in range(1, min(rows, planner.recipe.micro_batch_per_gpu) + 1) if rows % m == 0)
        in_node = min(num_gpus, gpus_per_node)
        plan = planner.plan(num_gpus // in_node, in_node, stage, micro)
        first = next((p.plan for p in points if p.plan and p.fits), plan)
        efficiency = first.step.total * first.num_gpus / (plan.step.total * num_gpus)
        fits = planner.fits(plan)
        points.append(Point(num_gpus, plan, fits, efficiency, "" if fits else "does not fit"))
    return points


def scaling_knee(points: list[Point]) -> str:
    """A sentence: where the speed-up falls below `SCALING_KNEE` of perfect, and the part whose GPU-seconds grow most."""
    planned = [(point, point.plan) for point in points if point.plan and point.fits]
    if not planned:
        return "nothing fits"
    first = planned[0][1]
    for point, plan in planned:
        if point.efficiency < SCALING_KNEE:
            growth = {
                part: seconds * point.num_gpus - first.step.parts[part] * first.num_gpus
                for part, seconds in plan.step.parts.items()
            }
            total = sum(max(0.0, value) for value in growth.values())
            worst = max(growth, key=growth.__getitem__)
            return (
                f"Scaling knee at {point.num_gpus} GPUs ({point.efficiency:.0%} of perfect). "
                f"{growth[worst] / total:.0%} of the lost efficiency is {worst}: {REASONS[worst]}."
            )
    last = planned[-1][0]
    return f"No scaling knee up to {last.num_gpus} GPUs ({last.efficiency:.0%} of perfect)."


def compare_stages(planner: Planner, nodes: int, gpus_per_node: int) -> dict[int, Plan | None]:
    """The same cluster at each stage; None where recipe and JSON do not allow such a run."""
    plans: dict[int, Plan | None] = {}
    for stage in STAGES:
        try:
            plans[stage] = planner.plan(nodes, gpus_per_node, stage)
        except UserError:
            plans[stage] = None
    return plans


def draw(points_of: dict[int, list[Point]], stage: int, title: str, path: Path) -> None:
    """Left: GPU-seconds of a step by part over the number of GPUs. Right: share of perfect speed-up per ZeRO stage."""
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    chosen = [(point.num_gpus, point.plan) for point in points_of[stage] if point.plan]
    places = range(len(chosen))
    below = [0.0] * len(chosen)
    for part, colour in COLOURS.items():
        heights = [plan.step.parts[part] * num_gpus for num_gpus, plan in chosen]
        bars.bar(places, heights, 0.75, bottom=below, color=colour, label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    bars.set_xticks(places, [str(num_gpus) for num_gpus, _ in chosen])
    bars.set(xlabel="GPUs", ylabel="GPU-seconds per step", title=f"ZeRO-{stage}: flat is perfect scaling")
    bars.legend(fontsize=8)
    for other, points in points_of.items():
        fitting = [point for point in points if point.plan and point.fits]
        lines.plot([p.num_gpus for p in fitting], [p.efficiency for p in fitting], marker="o", label=f"ZeRO-{other}")
    lines.axhline(SCALING_KNEE, color="grey", linestyle=":", linewidth=1)
    lines.set_xscale("log", base=2)
    lines.set_xticks([num_gpus for num_gpus, _ in chosen], [str(num_gpus) for num_gpus, _ in chosen])
    lines.set(xlabel="GPUs", ylabel="share of perfect speed-up", ylim=(0, 1.05), title="predicted, not measured")
    lines.legend()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
