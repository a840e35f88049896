"""The held-out evaluations of a run: which step was the best, and whether training should end.

In: `[step, mean held-out loss]` of each evaluation, in order; a checkpoint's `state.json` has the list. Out: the best of
them, and the recipe's `stop_when` applied to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.recipe.ranges import LARGEST_INT, check_ranges

DIVERGED = "diverged"  # how the reason of an early end begins if the student's steps were not finite
Evaluation = tuple[int, float]  # finished steps, mean held-out loss over languages


@dataclass
class StopConfig:
    """When training ends before its last step. The learning rate is that of the complete run."""

    no_better_for: int | None = None  # held-out evaluations in a row without a lower mean loss; null: never

    def __post_init__(self) -> None:
        check_ranges(self, "stop_when", {"no_better_for": (1, LARGEST_INT)})


def best_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation with the lowest loss, the latest of equal ones. None where no loss is a number."""
    numbers = [evaluation for evaluation in evaluations if math.isfinite(evaluation[1])]
    return min(numbers, key=lambda evaluation: (evaluation[1], -evaluation[0]), default=None)


def reason_to_stop(evaluations: Sequence[Evaluation], config: StopConfig) -> str | None:
    """Why training should end after the last of `evaluations`; None where it should continue."""
    if config.no_better_for is None:
        return None
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in evaluations]
    since = len(losses) - 1 - losses.index(min(losses)) if losses else 0  # an equal loss is no better one
    if since < config.no_better_for:
        return None
    return f"no lower held-out loss in {since} evaluations (stop_when.no_better_for)"
