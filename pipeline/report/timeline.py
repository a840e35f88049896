"""The attempts, checkpoints and restarts of a run, and its cost in time.

In: the points of `metrics.jsonl`, the file with the restarts if there is one, and the checkpoints on disk. Out: `Events`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.runtime.json_files import RESTORE, read_json_if_there, read_points
from pipeline.runtime.restarts import restarts_file
from pipeline.runtime.run_paths import RunPaths, students_of

GAP_IN_INTERVALS = 10  # a pause of this many usual intervals between two lines counts as a restart
SECONDS_PER_HOUR = 3600.0

# tag -> label and format of its median
DEVICE_FIGURES = {
    "speed/model_tflops_per_device": ("TFLOP/s that the models need, per device", ",.3g"),
    "speed/mfu": ("share of the devices' peak TFLOP/s (MFU)", ".1%"),
    "speed/peak_memory_gib": ("memory of a device at its peak, GiB", ".2f"),
}

Points = list[dict[str, Any]]
Interval = tuple[dict[str, Any], float]  # an entry of the file of restarts, and when the next start was


@dataclass
class Attempt:
    """One attempt of the run.

    Attributes:
        progress: (hours since the first start, finished steps) in order
        saved_steps: those that it wrote, where the file of restarts has them
    """

    progress: list[tuple[float, int]]
    ranks: int
    saved_steps: list[int] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return self.progress[-1][0] - self.progress[0][0]


@dataclass
class Events:
    """What the time line shows."""

    attempts: list[Attempt] = field(default_factory=list)
    committed_steps: list[int] = field(default_factory=list)  # on disk
    restarts: list[int] = field(default_factory=list)  # steps from which a later attempt started

    @property
    def saved_steps(self) -> list[int]:
        """The steps of all checkpoints, ascending."""
        return sorted({*self.committed_steps, *(step for attempt in self.attempts for step in attempt.saved_steps)})

    @property
    def saved(self) -> list[tuple[float, int]]:
        """(hours, step) of the checkpoints whose time is known. Students of two groups may have one each at a step."""
        recorded = {step for attempt in self.attempts for step in attempt.saved_steps}
        unrecorded = set(self.committed_steps) - recorded
        found: dict[tuple[int, int], float] = {}
        for number, attempt in enumerate(self.attempts):
            hours = {step: hour for hour, step in attempt.progress}
            found |= {(step, number): hours[step] for step in attempt.saved_steps if step in hours}
            found |= {(step, -1): hours[step] for step in unrecorded if step in hours}
        return sorted((hour, step) for (step, _), hour in found.items())


def series(metrics: Points, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every point that has the tag."""
    return [(point["step"], point[tag]) for point in metrics if tag in point]


def _is_start(start: Any) -> bool:
    if not isinstance(start, dict) or not isinstance(start.get("saved_steps", []), list):
        return False
    return all(type(step) is int for step in start.get("saved_steps", [])) and all(
        type(start.get(key)) in (int, float) for key in ("time_s", "first_step", "world_size")
    )


def events_of(run_dir: Path, metrics: Points, committed_steps: Sequence[int], student: str = "") -> Events:
    """The events of a run. Without a file of restarts it counts as one attempt, and its pauses count as restarts.

    Args:
        student: of several, the one that `metrics` are of; only the attempts that trained it count
    """
    path = restarts_file(run_dir)
    starts = read_json_if_there(path, list)
    if not all(_is_start(start) for start in starts):
        raise UserError(f"{path} is not a list of starts with time_s, first_step and world_size. {RESTORE}.")
    if not starts:
        origin = metrics[0]["time_s"] if metrics else 0.0
        progress = [((point["time_s"] - origin) / SECONDS_PER_HOUR, point["step"]) for point in metrics]
        return Events([Attempt(progress, 1)], sorted(committed_steps), pauses(metrics))
    ends = [start["time_s"] for start in starts[1:]] + [float("inf")]
    intervals = list(zip(starts, ends, strict=True))
    if student:
        intervals = _of_student(intervals, run_dir, student, metrics) or intervals
    origin = intervals[0][0]["time_s"]
    attempts = []
    for start, end in intervals:
        times = [(point["time_s"], point["step"]) for point in metrics if start["time_s"] <= point["time_s"] < end]
        times.insert(0, (start["time_s"], start["first_step"]))
        progress = [((time_s - origin) / SECONDS_PER_HOUR, step) for time_s, step in times]
        attempts.append(Attempt(progress, start["world_size"], start.get("saved_steps", [])))
    return Events(attempts, sorted(committed_steps), [start["first_step"] for start, _ in intervals[1:]])


def _of_student(intervals: list[Interval], run_dir: Path, student: str, metrics: Points) -> list[Interval]:
    """The attempts that trained a student: those that reported about it, and those that ended before any report.

    The next attempt continues such a one. The last attempt continues the one before it, unless that had finished.
    """
    points = {
        name: read_points(path) for name in students_of(run_dir) if (path := RunPaths(run_dir, name).metrics).is_file()
    }
    points[student] = metrics
    trained = [
        {name for name, own in points.items() if any(start["time_s"] <= point["time_s"] < end for point in own)}
        for start, end in intervals
    ]
    for number in reversed(range(len(trained) - 1)):
        trained[number] = trained[number] or trained[number + 1]
    for number in range(1, len(trained)):
        if not trained[number] and intervals[number - 1][0].get("ended") != "DONE":
            trained[number] = trained[number - 1]
    return [interval for interval, names in zip(intervals, trained, strict=True) if student in names]


def pauses(metrics: Points) -> list[int]:
    """Steps after which nothing was reported for much longer than usual."""
    lines = [point for point in metrics if "loss/total" in point]
    gaps = [(after["time_s"] - before["time_s"], before["step"]) for before, after in itertools.pairwise(lines)]
    if not gaps:
        return []
    usual = sorted(gap for gap, _ in gaps)[len(gaps) // 2]
    return [step for gap, step in gaps if gap > GAP_IN_INTERVALS * usual]


def cost(
    metrics: Points, events: Events, about: dict[str, Any], tokens_per_row: int | None, later: Sequence[Points] = ()
) -> dict[str, str]:
    """What the run took: label -> figure. `later`: points of students that were added to the run, group by group."""
    groups = [metrics, *later]
    metrics = [point for group in groups for point in group]
    running = sum(attempt.hours for attempt in events.attempts)
    wall = max(attempt.progress[-1][0] for attempt in events.attempts)
    rows = sum(group[-1]["samples"] for group in groups)
    who = "student" if not later else "students"
    saving_s = sum(value for _, value in series(metrics, "speed/save_stall_seconds"))
    waits = [value for _, value in series(metrics, "speed/data_wait_share")]
    device = {"cuda": "GPU", "cpu": "CPU process"}.get(about.get("device", ""), "rank")
    shown = {
        "wall clock, first start to last line": duration(wall),
        "of that running": f"{duration(running)} in {len(events.attempts)} start(s)",
        f"{device} hours": f"{sum(attempt.hours * attempt.ranks for attempt in events.attempts):,.3g}",
        f"rows that the {who} saw": f"{rows:,}",
    }
    if isinstance(names := about.get("device_names"), list):
        shown["devices"] = ", ".join(f"{count} x {name}" for name, count in Counter(map(str, names)).items())
    if tokens_per_row:
        shown[f"tokens that the {who} saw"] = f"{rows * tokens_per_row:,}"
    if saving_s:
        shown["training waited for checkpoints"] = f"{saving_s:.1f} s"
    if waits:
        shown["training waited for data"] = f"{sum(waits) / len(waits):.2%} of the time"
    for tag, (label, unit) in DEVICE_FIGURES.items():
        if values := sorted(value for _, value in series(metrics, tag)):
            shown[label] = format(values[len(values) // 2], unit)
    skipped = [counts[-1][1] for group in groups if (counts := series(group, "optimizer/skipped_steps"))]
    if skipped:
        shown["optimizer steps skipped"] = f"{sum(skipped):.0f}"
    return shown


def training_hours(paths: RunPaths, metrics: Points) -> tuple[float, float] | None:
    """Hours in which a student was trained, saves and evaluations with them, and the same times the number of devices.

    None before its first report. Students that are trained together have the hours of all of them.
    """
    if not metrics:
        return None
    attempts = events_of(paths.directory, metrics, [], paths.student).attempts
    return sum(attempt.hours for attempt in attempts), sum(attempt.hours * attempt.ranks for attempt in attempts)


def duration(hours: float) -> str:
    """A duration in seconds, minutes or hours, whichever is readable."""
    if hours < 0.05:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:,.1f} h"
