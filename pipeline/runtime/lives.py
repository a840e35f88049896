"""The lives of a run: one entry per start, in `lives.json`, so that a crash loop is noticed.

A life that ends without having saved anything new and without having been asked to stop has crashed. After three such
lives in a row the run falls back to the checkpoint before the newest; after six it stops: starting again unchanged
would burn a cluster for nothing. Rank 0 alone uses this.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.runtime.beside import make_way_for_file, read_json_beside, set_aside

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


class Lives:
    """Reads and appends to `lives.json`; every change is written to a temporary name and renamed."""

    def __init__(self, run_dir: Path, writes: bool = True):
        """`writes`: rank 0, which sets a file of another shape aside; crashes are then counted from this start on."""
        self._path = run_dir / "lives.json"
        self._lives: list[dict[str, Any]] = []
        if not writes:
            return
        found = read_json_beside(self._path)
        if isinstance(found, list) and all(map(_is_entry, found)):
            self._lives = found
        elif found is not None or self._path.exists():
            set_aside(self._path, "not the starts of a run")

    @property
    def crashes_in_a_row(self) -> int:
        """Lives at the end of the list that neither saved nor were asked to stop."""
        count = 0
        for life in reversed(self._lives):
            if life["saved_steps"] or life["ended"]:
                break
            count += 1
        return count

    @property
    def slowest_save_s(self) -> float:
        """Of the last life that saved: what a save may take on the disks of these days."""
        return next((life["slowest_save_s"] for life in reversed(self._lives) if "slowest_save_s" in life), 0.0)

    def begin(self, first_step: int, world_size: int) -> None:
        life = {"first_step": first_step, "saved_steps": [], "ended": None, "time_s": round(time.time(), 1)}
        self._lives.append({**life, "host": socket.gethostname(), "world_size": world_size})
        self._write()

    def saved(self, step: int, seconds: float) -> None:
        life = self._lives[-1]
        life["saved_steps"].append(step)
        life["slowest_save_s"] = round(max(seconds, life.get("slowest_save_s", 0.0)), 1)
        self._write()

    def end(self, how: str) -> None:
        """The life ends as it should: "DONE" or "PREEMPTED"."""
        self._lives[-1]["ended"] = how
        self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".tmp")
        try:
            make_way_for_file(partial)
            make_way_for_file(self._path)
            with open(partial, "w", encoding="utf-8") as file:
                file.write(json.dumps(self._lives, indent=1))
                file.flush()
                os.fsync(file.fileno())  # a rename before the content, and a power failure would leave it empty
            partial.replace(self._path)
        except OSError as error:  # a full disk: this life goes on, its entry comes with the next one
            print(f"warning: {self._path} not written, going on: {error}", flush=True)
