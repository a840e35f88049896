"""Where a run is: running, finished, stopped or failed, why, what to do, and how much time is left.

In: the files of a student and its points of `metrics.jsonl`. Out: a `RunState`. Nothing is written, and no lock is taken.
"""

from __future__ import annotations

import html
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.ownership import LOCK_NAME, Owner
from data_prep.shards import DataError
from pipeline.comparison.students import LOSS, early_end
from pipeline.report.timeline import Points, duration
from pipeline.runtime.checkpoint_files import committed_steps
from pipeline.runtime.json_files import read_json_if_there
from pipeline.runtime.run_paths import RunPaths

RUNNING, FINISHED, STOPPED, FAILED, ENDED_EARLY = "running", "finished", "stopped", "failed", "ended early"
SIGN_S = 300.0  # an owner on another machine touches its lock every 5 s; clocks of two machines may differ by minutes
WINDOW = 50  # logged intervals from which the time left is estimated
LAST_BYTES, LONGEST_LINE = 4096, 300


@dataclass(frozen=True)
class RunState:
    """The state of one student's training.

    Attributes:
        name: one of the constants above
        why: sentences of plain text
        fix: what to do; empty where nothing is to be done
        left_s: seconds from the last report to the last step; None unless it is running and has reported twice
    """

    name: str
    why: str
    fix: str = ""
    left_s: float | None = None

    def html(self) -> str:
        """The line at the top of a page."""
        kind = self.name.replace(" ", "-")
        text = html.escape(" ".join(filter(None, (self.why, self.fix))))
        return f'<p class="state {kind}"><b>{html.escape(self.name)}</b> {text}</p>'


def run_state(paths: RunPaths, metrics: Points, steps: int | None, state: dict[str, Any]) -> RunState:
    """The state of a student.

    Args:
        metrics: its points, at least one
        steps: of its recipe; None where the recipe is not known
        state: `state.json` of its newest checkpoint; empty without one
    """
    step = metrics[-1]["step"]
    if ended := early_end(state):
        return RunState(ENDED_EARLY, f"It ended at step {ended[0]:,}: {ended[1].rstrip('. ')}.")
    if paths.done.is_file() or (steps is not None and step >= steps):
        return RunState(FINISHED, f"All {step:,} steps are done.")
    if owner := _owner(paths.directory):
        left_s = time_left_s(paths, metrics, steps)
        end = "" if left_s is None else f" At this speed it ends at about {_clock(metrics[-1]['time_s'] + left_s)}."
        said = f"Last report {_clock(metrics[-1]['time_s'])}, by {owner}.{end}"
        return RunState(RUNNING, said, f"To save and stop it: touch {shlex.quote(str(paths.stop))}", left_s)
    resume = _resume(paths)
    diverged = read_json_if_there(paths.bad_batch).get("step")
    if type(diverged) is int and diverged >= step:
        why = f"It diverged: the loss of step {diverged + 1:,} was not finite. {paths.bad_batch} names the text of that step."
        return RunState(FAILED, why, f"Look at that text, or lower optimizer.lr. {resume}")
    if paths.preempted.is_file():
        why = _first_line(paths.preempted) or "stopped on request"
        return RunState(STOPPED, f"{why[0].upper()}{why[1:].rstrip('.')}.", resume)
    if paths.failed.is_file():
        return RunState(FAILED, _first_line(paths.failed) or "The job failed.", f"Remove the cause. {resume}")
    return RunState(FAILED, _end_without_marker(paths), f"Read {paths.log(0)}. {resume}")


def _owner(run_dir: Path) -> Owner | None:
    """The process that trains in the run directory, if there is one."""
    path = run_dir / LOCK_NAME
    try:
        owner = Owner.read(path)
        if owner is None or owner.is_dead():
            return None
        is_here = owner.is_dead() is False
        return owner if is_here or time.time() - path.stat().st_mtime < SIGN_S else None
    except (DataError, OSError):
        return None


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(time_s))


def _resume(paths: RunPaths) -> str:
    saved = committed_steps(paths.checkpoints)
    where = (
        f"it resumes from the checkpoint of step {saved[-1]:,}" if saved else "it has no checkpoint and begins again"
    )
    return f"Start the same command again: {where}."


def _end_without_marker(paths: RunPaths) -> str:
    attempts = read_json_if_there(paths.restarts, list)
    if attempts and isinstance(attempts[-1], dict) and attempts[-1].get("ended") == "OUT_OF_MEMORY":
        return "Memory ran out."
    line = _last_line(paths.log(0))
    said = f" The last line of its log: {line}" if line else ""
    return f"No process trains it, and it left no marker file: it crashed or was killed.{said}"


def _first_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[0][:LONGEST_LINE] if text else ""


def _last_line(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - LAST_BYTES, 0))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:LONGEST_LINE] if lines else ""


def time_left_s(paths: RunPaths, metrics: Points, steps: int | None) -> float | None:
    """Seconds from the last report to the last step, with saves and evaluations, at the speed of the last intervals of the
    newest start. None before its second report."""
    attempts = read_json_if_there(paths.restarts, list)
    began_s = attempts[-1].get("time_s") if attempts and isinstance(attempts[-1], dict) else None
    since_s = began_s if isinstance(began_s, int | float) else 0.0
    logged = [point for point in metrics if LOSS in point and point["time_s"] >= since_s][-WINDOW:]
    if steps is None or len(logged) < 2 or logged[-1]["step"] <= logged[0]["step"]:
        return None
    first, last = logged[0], logged[-1]
    return (last["time_s"] - first["time_s"]) / (last["step"] - first["step"]) * (steps - last["step"])


def progress_facts(metrics: Points, steps: int | None, state: RunState) -> dict[str, str]:
    """Step, and of a running training the time that was left at its last report, as label and text."""
    step = metrics[-1]["step"]
    shown = {"step": f"{step:,}" if steps is None else f"{step:,} of {steps:,}"}
    if state.left_s is not None:
        shown["time left"] = duration(state.left_s / 3600)
    return shown
