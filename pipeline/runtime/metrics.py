"""What a run shows: TensorBoard, `metrics.jsonl`, one console line per interval and a progress bar.

In: numbers per step from trainer.py. Out: files under the run directory, written by rank 0 alone; the other ranks hold
a `Metrics` that does nothing. `metrics.jsonl` has one object per line, `{"step": .., "samples": .., "time_s": .., tags}`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.runtime.board import LAYOUT, board_tag


@dataclass
class MetricsConfig:
    """How often a run reports."""

    log_every: int = 10  # steps between console lines and points of a curve
    images: bool = True  # relation maps of a fixed row, teacher beside student, at every evaluation

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise UserError("metrics.log_every must be at least 1")


class Metrics:
    """Writers of one run; with `active=False` every call is a no-op."""

    def __init__(self, run_dir: Path, active: bool, first_step: int, steps: int):
        self.active = active
        self.known_of_first_step: set[str] = set()  # tags that an earlier life has written
        if not active:
            return
        self._board_dir = run_dir / "tensorboard"
        # What a killed life wrote past the checkpoint that this life resumes from is dropped: purge_step and later.
        purge_step = first_step + 1 if first_step else 0
        self._board: SummaryWriter | None = SummaryWriter(str(self._board_dir), purge_step=purge_step, flush_secs=30)
        self._has_warned = False
        path = run_dir / "metrics.jsonl"
        self.known_of_first_step = _truncate_after(path, first_step)
        self._lines = open(path, "a", encoding="utf-8")
        self._bar = tqdm(
            total=steps, initial=first_step, unit="step", desc="distil", disable=not sys.stderr.isatty(), leave=False
        )

    def describe(self, recipe_yaml: str, deepspeed_json: str, hyper_parameters: Mapping[str, Any]) -> None:
        table = "\n".join(f"| {key} | {value} |" for key, value in hyper_parameters.items())
        texts = {
            "recipe": f"```yaml\n{recipe_yaml}\n```",
            "deepspeed": f"```json\n{deepspeed_json}\n```",
            "hyper-parameters": f"| key | value |\n|---|---|\n{table}",
        }
        self._on_board(lambda board: board.add_custom_scalars(LAYOUT))
        for tag, text in texts.items():
            self._on_board(partial(SummaryWriter.add_text, tag=tag, text_string=text))

    def write(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """One point on every curve. `step` counts finished optimizer steps."""
        if not self.active:
            return
        for tag, value in values.items():
            self._on_board(partial(SummaryWriter.add_scalar, tag=board_tag(tag), scalar_value=value, global_step=step))
        row = {"step": step, "samples": samples, "time_s": round(time.time(), 3), **values}
        self._going_on(lambda: self._append(json.dumps(row) + "\n"))

    def _append(self, line: str) -> None:
        self._lines.write(line)
        self._lines.flush()  # what does not fit on the disk stays in the buffer and goes with the next line

    def image(self, tag: str, step: int, image_CHW: torch.Tensor) -> None:
        self._on_board(lambda board: board.add_image(tag, image_CHW, step))

    def _on_board(self, action: Callable[[SummaryWriter], object]) -> None:
        """TensorBoard's writer never recovers from a failed write: it is replaced by the next call."""

        def act() -> None:
            self._board = self._board or SummaryWriter(str(self._board_dir), flush_secs=30)
            try:
                action(self._board)
            except OSError:
                self._board = None
                raise

        if self.active:
            self._going_on(act)

    def _going_on(self, action: Callable[[], object]) -> None:
        """A full disk costs points of a curve, never the run."""
        try:
            action()
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self.say(f"warning: metrics not written, going on without them: {error}")

    def advance(self) -> None:
        if self.active:
            self._bar.update(1)

    def say(self, line: str) -> None:
        """One console line, above the progress bar where there is one."""
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.active:
            self._bar.close()
            if self._board is not None:
                self._going_on(self._board.close)
            self._going_on(self._lines.close)


def _truncate_after(path: Path, first_step: int) -> set[str]:
    """Drop lines of steps that will be done again, and a line that a kill cut short. The tags that `first_step` has."""
    if not path.exists():
        return set()
    kept, tags = [], set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if 0 < first_step >= row["step"]:  # a run that begins again measures step 0 again
                kept.append(line)
                tags |= set(row) if row["step"] == first_step else set()
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    shorter.replace(path)
    return tags
