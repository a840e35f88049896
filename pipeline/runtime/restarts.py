"""The lives of a run: one entry per start, in `lives.json`, so that a crash loop is noticed.

A life that ends without having saved anything new and without having been asked to stop has crashed. After three such
lives in a row the run falls back to the checkpoint before the newest; after six it stops: starting again unchanged
would burn a cluster for nothing. Rank 0 alone uses this.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.runtime.noncritical_files import read_json_or_warn, set_aside, write_file_or_warn

FALL_BACK_AFTER = 3
GIVE_UP_AFTER = 6


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("saved_steps"), list)
        and "ended" in entry
        and type(entry.get("slowest_save_s", 0.0)) in (int, float)
        and entry.get("slowest_save_s", 0.0) >= 0
    )


class Restarts:
    """Reads and appends to `lives.json`; every change is written to a temporary name and renamed."""

    def __init__(self, run_dir: Path, writes: bool = True):
        """`writes`: rank 0, which sets a file of another shape aside; crashes are then counted from this start on."""
        self._path = run_dir / "lives.json"
        self._attempts: list[dict[str, Any]] = []
        if not writes:
            return
        found = read_json_or_warn(self._path)
        if isinstance(found, list) and all(map(_is_entry, found)):
            self._attempts = found
        elif found is not None or self._path.exists():
            set_aside(self._path, "not the starts of a run")

    @property
    def crashes_in_a_row(self) -> int:
        """Restarts at the end of the list that neither saved nor were asked to stop."""
        count = 0
        for attempt in reversed(self._attempts):
            if attempt["saved_steps"] or attempt["ended"]:
                break
            count += 1
        return count

    @property
    def slowest_save_s(self) -> float:
        """Of the last life that saved: what a save may take on the disks of these days."""
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
        """The life ends as it should: "DONE" or "PREEMPTED"."""
        self._attempts[-1]["ended"] = how
        self._write()

    def _write(self) -> None:
        write_file_or_warn(self._path, json.dumps(self._attempts, indent=1))
