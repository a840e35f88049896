"""The parts of the training loss, each times its weight, so that they add up to the total.

In: the points of `metrics.jsonl`, where `loss/PART` is without its weight, and the recipe's relations. Out: label, weight
and curve of each part, a table with their sum, and whether they add up.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.comparison.students import LOSS
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import OUTPUT, POOLED, part_weights
from pipeline.report.html_parts import table
from pipeline.report.timeline import Points, series

PREFIX = "loss/"
OF_A_SPIKE = f"{PREFIX}spike_sigmas"  # logged next to the parts, and none of them
TOLERANCE = 1e-3  # relative: total and parts are averages of 32-bit numbers over ranks and micro-batches


@dataclass(frozen=True)
class Part:
    """One part of the loss.

    Attributes:
        tag: of its values without the weight
        weight: None where the recipe has no such part, so that its weight is not known
        label: what a legend shows, with the weight
    """

    tag: str
    weight: float | None
    label: str

    def weighted(self, metrics: Points) -> list[tuple[int, float]]:
        """(step, value times weight)."""
        factor = 1.0 if self.weight is None else self.weight
        return [(step, value * factor) for step, value in series(metrics, self.tag)]


def part_label(name: str, relations: RelationsConfig | None) -> str:
    """A part of the loss in words: what it compares, and between which layers."""
    relation, _, layers = name.partition("@")
    if layers:
        return f"{relation}, layer {layers.replace('>', ' → ')}"
    if relations is None or name not in (OUTPUT, POOLED):
        return name
    if name == POOLED:
        return f"pooled output ({relations.pooled_distance})"
    return f"output ({'squared error' if 'mse' in relations.tail_terms else 'relation'})"


def loss_parts(metrics: Points, relations: RelationsConfig | None) -> list[Part]:
    """The parts that the points have, in the order of the recipe. `relations`: None where the recipe is not known."""
    weights: Mapping[str, float] = {} if relations is None else part_weights(relations)
    logged = {tag for point in metrics for tag in point if tag.startswith(PREFIX)} - {LOSS, OF_A_SPIKE}
    names = [*weights, *sorted(tag.removeprefix(PREFIX) for tag in logged)]
    parts = []
    for name in dict.fromkeys(names):
        if (tag := f"{PREFIX}{name}") in logged:
            weight = weights.get(name)
            words = part_label(name, relations)
            parts.append(Part(tag, weight, f"{words}, without weight" if weight is None else f"{weight:g} × {words}"))
    return parts


def loss_table(metrics: Points, parts: list[Part]) -> str:
    """First and last value of every part times its weight, their sum, and the total that training logged."""
    points = [point for point in metrics if LOSS in point and all(part.tag in point for part in parts)]
    if not points or not parts or any(part.weight is None for part in parts):
        return ""
    first, last = points[0], points[-1]
    weights = [part.weight or 0.0 for part in parts]
    ends = [[point[part.tag] * weight for point in (first, last)] for part, weight in zip(parts, weights, strict=True)]
    sums = [sum(column) for column in zip(*ends, strict=True)]
    share = [f"{end / sums[1]:.0%}" if sums[1] > 0 and math.isfinite(sums[1]) else "" for _, end in ends]
    rows = [
        [part.label, *(f"{value:.4f}" for value in values), of_sum]
        for part, values, of_sum in zip(parts, ends, share, strict=True)
    ]
    rows.append(["sum of the parts", *(f"{value:.4f}" for value in sums), ""])
    rows.append(["total, as logged", f"{first[LOSS]:.4f}", f"{last[LOSS]:.4f}", ""])
    return table(["weight × part", f"step {first['step']:,}", f"step {last['step']:,}", "share"], rows)


def sum_note(metrics: Points, parts: list[Part]) -> str:
    """Whether the parts add up to the total, as HTML; where they do not, at how many points and why."""
    if any(part.weight is None for part in parts):
        unknown = ", ".join(part.tag.removeprefix(PREFIX) for part in parts if part.weight is None)
        return html.escape(
            f"The recipe in the run directory has no weight for {unknown}, so the parts need not add up."
        )
    points = [point for point in metrics if LOSS in point and all(part.tag in point for part in parts)]
    finite = [point for point in points if math.isfinite(point[LOSS])]
    differ = [point["step"] for point in finite if not _adds_up(point[LOSS], _sum(point, parts))]
    if not differ:
        return "The parts, each times its weight, add up to the total."
    return (
        f"At {len(differ):,} of {len(finite):,} points, first at step {differ[0]:,}, the parts do not add up to the total: "
        "the run was resumed with other weights, and the ones here are those of its recipe.yaml now."
    )


def _sum(point: Mapping[str, float], parts: list[Part]) -> float:
    return sum(point[part.tag] * (part.weight or 0.0) for part in parts)


def _adds_up(total: float, parts_sum: float) -> bool:
    return math.isclose(total, parts_sum, rel_tol=TOLERANCE, abs_tol=1e-6)
