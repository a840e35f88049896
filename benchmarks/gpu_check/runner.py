"""Runs the parts one after the other, each in a process with its own limit, and keeps the report on disk up to date.

In: the parts and the seconds for all of them. Out: a `PartResult` per part. The report is written again whenever a part has a new
figure, so that a check that is killed leaves what it had measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_check.figures import read_figures
from benchmarks.gpu_check.parts import Part
from benchmarks.gpu_check.processes import TIMED_OUT, Ended, Process, last_lines
from benchmarks.gpu_check.setting import Setting

LEAST_S = 10.0  # a part with less time could only start


@dataclass
class PartResult:
    """What became of one part. `state`: complete, incomplete (a row failed), failed, timed out, skipped, running."""

    part: Part
    state: str = "running"
    reason: str = ""
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.state == "complete"


def run_parts(
    parts: Sequence[Part], setting: Setting, budget_s: float, write: Callable[[list[PartResult]], None]
) -> list[PartResult]:
    """Run all parts within the budget. `write` gets the results so far."""
    end, results = time.monotonic() + budget_s, []
    for part in parts:
        result = PartResult(part)
        results.append(result)
        left = end - time.monotonic()
        if left < LEAST_S:
            result.state, result.reason = "skipped", f"no time was left of {budget_s:.0f} s"
        else:
            _run(result, setting, left, lambda: write(results))
        write(results)
        print(f"{part.name}: {result.state}, {result.seconds:.0f} s {result.reason}".rstrip(), flush=True)
    return results


def _run(result: PartResult, setting: Setting, left: float, write: Callable[[], None]) -> None:
    part, file = result.part, setting.figures(result.part.name)

    def look() -> None:
        found = read_figures(file)
        if len(found) > len(result.figures):
            result.figures = found
            write()

    command = [sys.executable, "-m", "benchmarks.gpu_check.part", part.name, str(setting.work)]
    process = Process([*command, *(["--tiny"] if setting.is_tiny else [])], setting.log(part.name))
    limit_s = min(left, part.limit_s * setting.scale.patience)
    ended = process.wait(limit_s, look)
    result.figures, result.seconds = read_figures(file), ended.seconds
    result.state, result.reason = _state(result, ended, limit_s)
    if result.state in ("failed", "incomplete"):
        print(last_lines(setting.log(part.name), 30), flush=True)


def _state(result: PartResult, ended: Ended, limit_s: float) -> tuple[str, str]:
    if ended.code == TIMED_OUT:
        return "timed out", f"ended after its limit of {limit_s:.0f} s"
    if ended.code != 0:
        return "failed", f"ended with exit code {ended.code}"
    failed = sum(line["failed"] for line in result.figures)
    return ("incomplete", f"{failed} rows failed") if failed else ("complete", "")
