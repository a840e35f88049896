"""How long the parts of a training step take on the device, without making the host wait for it.

In: marks in the order of execution, `mark(part)` after a part was launched. Out: seconds per part of one step. On a GPU the
marks are CUDA events, read when the step is known to be finished; on a CPU they are the clock. Where a GPU waits for the
host to launch a part's kernels, that time belongs to the part.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from pipeline.distillation.distiller import LOSS, STUDENT, TEACHER

OPTIMIZER, OTHER = "optimizer", "other"
PARTS = (TEACHER, STUDENT, LOSS, OPTIMIZER)  # `student` is its forward and its backward
Moment = torch.cuda.Event | float


class StepClock:
    """Marks of one step after the other. Outside a step `mark` does nothing, so that evaluations are not counted."""

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Moment]] | None = None

    def begin_step(self) -> None:
        self._marks = [(OTHER, self._now())]

    def mark(self, part: str) -> None:
        """What was launched since the mark before belongs to `part`."""
        if self._marks is not None:
            self._marks.append((part, self._now()))

    def end_step(self) -> Callable[[], dict[str, float]]:
        """A function that returns the seconds per part, for a time when the device has finished the step."""
        marks, self._marks = self._marks or [], None

        def seconds() -> dict[str, float]:
            totals: dict[str, float] = defaultdict(float)
            for (_, before), (part, after) in itertools.pairwise(marks):
                totals[part] += _seconds_between(before, after)
            return dict(totals)

        return seconds

    def _now(self) -> Moment:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3  # milliseconds
