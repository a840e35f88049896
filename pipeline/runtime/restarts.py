"""The attempts of a run: one entry per start in `restarts.json`, so that a crash loop is noticed.

An attempt that ended without a new checkpoint and without a stop request has crashed, unless memory ran out. After three
crashes in a row the run resumes from the checkpoint before the newest. After six it stops: another start would repeat the
crash. Only rank 0 writes.

Older versions called the file `lives.json`. It is read where `restarts.json` does not exist. The first entry that is
written goes to `restarts.json`, after all entries of the old file, and the old file is deleted.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.runtime.noncritical_files import read_json_or_warn, set_aside, write_file_or_warn

FALL_BACK_AFTER = 3
GIVE_UP_AFTER = 6
FILE, FORMER_FILE = "restarts.json", "lives.json"


def restarts_file(run_dir: Path) -> Path:
    """The file with the attempts of a run: `restarts.json`, or `lives.json` where only that exists."""
    is_former = (run_dir / FORMER_FILE).exists() and not (run_dir / FILE).exists()
    return run_dir / (FORMER_FILE if is_former else FILE)


class Restarts:
    """Reads the attempts of a run and records this one."""

    def __init__(self, run_dir: Path, writes: bool = True):
        """`writes`: on rank 0. A file of another shape is renamed, and crashes are counted from this attempt on."""
        self._run_dir = run_dir
        self._attempts: list[dict[str, Any]] = []
        if not writes:
            return
        path = restarts_file(run_dir)
        found = read_json_or_warn(path)
        if isinstance(found, list) and all(map(_is_entry, found)):
            self._attempts = found
        elif found is not None or path.exists():
            set_aside(path, "not the attempts of a run")

    @property
    def crashes_in_a_row(self) -> int:
        """Number of the latest attempts that neither saved a checkpoint nor were asked to stop."""
        count = 0
        for attempt in reversed(self._attempts):
            if attempt["saved_steps"] or attempt["ended"]:
                break
            count += 1
        return count

    @property
    def slowest_save_s(self) -> float:
        """Seconds of the slowest save of the latest attempt that saved: an estimate for this attempt's saves."""
        return next(
            (attempt["slowest_save_s"] for attempt in reversed(self._attempts) if "slowest_save_s" in attempt), 0.0
        )

    def begin(self, first_step: int, world_size: int) -> None:
        attempt = {"first_step": first_step, "saved_steps": [], "ended": None, "time_s": round(time.time(), 1)}
        self._attempts.append({**attempt, "host": socket.gethostname(), "world_size": world_size})
        self._write()

    def saved(self, step: int, seconds: float) -> None:
        attempt = self._attempts[-1]
        attempt["saved_steps"].append(step)
        attempt["slowest_save_s"] = round(max(seconds, attempt.get("slowest_save_s", 0.0)), 1)
        self._write()

    def end(self, how: str) -> None:
        """Record that the attempt did not crash. `how`: "DONE", "PREEMPTED", "OUT_OF_MEMORY", or "NOT_BEGUN" where a
        logger cannot be opened."""
        self._attempts[-1]["ended"] = how
        self._write()

    def _write(self) -> None:
        if write_file_or_warn(self._run_dir / FILE, json.dumps(self._attempts, indent=1)):
            with contextlib.suppress(OSError):
                (self._run_dir / FORMER_FILE).unlink(missing_ok=True)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("saved_steps"), list)
        and "ended" in entry
        and type(entry.get("slowest_save_s", 0.0)) in (int, float)
        and entry.get("slowest_save_s", 0.0) >= 0
    )
