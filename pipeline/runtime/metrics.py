"""Writes what a run reports: TensorBoard, `metrics.jsonl`, console lines and a progress bar.

In: numbers per step. Out: files in the run directory. Only rank 0 writes; on the other ranks a `Metrics` does nothing.
`metrics.jsonl` has one object per line: `{"step": .., "samples": .., "time_s": .., tags}`.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from data_prep.durable_files import replace_file
from data_prep.shards import read_again
from pipeline.recipe.ranges import LARGEST_INT, check_ranges
from pipeline.runtime.loggers import TENSORBOARD, LoggedRun, Loggers, check_names, identifier_in
from pipeline.runtime.noncritical_files import (
    make_way_for_directory,
    make_way_for_file,
    open_log,
    set_aside,
    write_file_or_warn,
)
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.tensorboard_tags import LAYOUT, tensorboard_point, tensorboard_tag


@dataclass
class MetricsConfig:
    """How often a run reports."""

    log_every: int = 10  # steps between console lines and points of a curve
    loggers: list[str] = field(
        default_factory=lambda: [TENSORBOARD]
    )  # who shows curves: tensorboard, wandb, trackio, mlflow
    images: bool = True  # relation maps of a fixed row, teacher next to student, at every evaluation

    def __post_init__(self) -> None:
        check_ranges(self, "metrics", {"log_every": (1, LARGEST_INT)})
        check_names(self.loggers)


class Metrics:
    """Writers of one student's run; with `active=False` every call is a no-op."""

    def __init__(
        self,
        paths: RunPaths,
        active: bool,
        first_step: int,
        steps: int,
        shows_progress: bool = True,
        loggers: Sequence[str] = (TENSORBOARD,),
    ):
        """`loggers`: `metrics.loggers` of the recipe. Those other than TensorBoard are opened by `describe`."""
        self.active = active
        self._loss_weights: Mapping[str, float] = {}
        self.known_of_first_step: set[str] = set()  # tags that an earlier attempt has written
        if not active:
            return
        self._paths, self._names = paths, loggers
        self._loggers: Loggers | None = None
        self._tensorboard_dir = paths.tensorboard
        # An earlier attempt may have written past the checkpoint that this one resumes from: those steps are dropped.
        purge_step = first_step + 1 if first_step else 0
        self._purge_step: int | None = purge_step
        self._writer: SummaryWriter | None = None
        self._has_warned = False
        self._path = paths.metrics
        self._lines: TextIO | None = None
        is_hidden = not (shows_progress and sys.stderr.isatty())
        self._bar = tqdm(total=steps, initial=first_step, unit="step", desc="distil", disable=is_hidden, leave=False)
        if TENSORBOARD in loggers:
            self._attempt(lambda: make_way_for_directory(self._tensorboard_dir))
        self._on_tensorboard(lambda writer: None)  # opens it
        self._attempt(lambda: self.known_of_first_step.update(_truncate_after(self._path, first_step)))

    def describe(
        self,
        recipe_yaml: str,
        deepspeed_json: str,
        hyper_parameters: Mapping[str, Any],
        loss_weights: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Write the settings of the run to every logger, and the layout of the charts to TensorBoard.

        Args:
            loss_weights: of the parts of the loss; TensorBoard shows each part times its weight
        """
        self._loss_weights = loss_weights
        table = "\n".join(f"| {key} | {value} |" for key, value in hyper_parameters.items())
        texts = {
            "recipe": f"```yaml\n{recipe_yaml}\n```",
            "deepspeed": f"```json\n{deepspeed_json}\n```",
            "hyper-parameters": f"| key | value |\n|---|---|\n{table}",
        }
        self._on_tensorboard(lambda writer: writer.add_custom_scalars(LAYOUT))
        for tag, text in texts.items():
            self._on_tensorboard(partial(SummaryWriter.add_text, tag=tag, text_string=text))
        self._on_tensorboard(partial(_add_hyper_parameters, values=hyper_parameters))
        if self.active and set(self._names) - {TENSORBOARD}:
            self._open_loggers(hyper_parameters)

    def _open_loggers(self, hyper_parameters: Mapping[str, Any]) -> None:
        """Open the loggers that are not TensorBoard. The run's identifier is kept once they are open: a first start that
        fails is followed by another first start."""
        file = self._paths.loggers
        is_new, identifier = not file.exists(), identifier_in(file) or uuid.uuid4().hex
        name = "/".join(filter(None, [self._paths.directory.resolve().name, self._paths.student]))
        about = LoggedRun(name, identifier, self._paths.files, hyper_parameters)
        self._loggers = Loggers(self._names, about, self.say, is_new)
        if is_new:
            write_file_or_warn(file, json.dumps({"identifier": identifier}) + "\n")

    def write(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """One point on every curve. `step` counts finished optimizer steps."""
        if not self.active:
            return
        for tag, value in values.items():
            shown, weighted = tensorboard_point(tag, value, self._loss_weights)
            self._on_tensorboard(partial(SummaryWriter.add_scalar, tag=shown, scalar_value=weighted, global_step=step))
        if self._loggers is not None:
            self._loggers.write(step, values)
        row = {"step": step, "samples": samples, "time_s": round(time.time(), 3), **values}
        self._attempt(lambda: self._append(json.dumps(row) + "\n"))

    def _append(self, line: str) -> None:
        if self._lines is None:
            self._lines = open_log(self._path, "a")
        self._lines.write(line)
        self._lines.flush()  # what does not fit on the disk stays in the buffer and is written with the next line

    def image(self, tag: str, step: int, image_CHW: torch.Tensor) -> None:
        self._on_tensorboard(lambda writer: writer.add_image(tag, image_CHW, step))

    def _on_tensorboard(self, action: Callable[[SummaryWriter], object]) -> None:
        """TensorBoard's writer never recovers from a failed write, so the next call makes a new one."""

        def act() -> None:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._tensorboard_dir), purge_step=self._purge_step, flush_secs=30)
                self._purge_step = None  # only for the first file
            try:
                action(self._writer)
            except Exception:
                self._writer = None
                raise

        if self.active and TENSORBOARD in self._names:
            self._attempt(act)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Warn once instead of raising: a full disk costs points of a curve, never the run. TensorBoard has its own errors."""
        try:
            action()
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                self.say(f"warning: metrics not written, the run continues without them: {error}")

    def advance(self) -> None:
        if self.active:
            self._bar.update(1)

    def say(self, line: str) -> None:
        """Print one console line, above the progress bar where there is one."""
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.active:
            self._bar.close()
            if self._loggers is not None:
                self._loggers.close()
            if self._writer is not None:
                self._attempt(self._writer.close)
            if self._lines is not None:
                self._attempt(self._lines.close)


def _add_hyper_parameters(writer: SummaryWriter, values: Mapping[str, Any]) -> None:
    """TensorBoard's HParams tab. `add_hparams` would make a run of its own for them."""
    settings = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()
    }
    for summary in hparams(settings, {tensorboard_tag(tag): 0.0 for tag in ("heldout/mean", "loss/total")}):
        writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]  # it is None only after close


def _truncate_after(path: Path, first_step: int) -> set[str]:
    """Drop lines of steps that will be done again, and a line that a kill cut short.

    Returns:
        the tags of step `first_step`
    """
    make_way_for_file(path)
    if not path.exists():
        return set()
    kept, tags, num_bad = [], set(), 0
    lines = read_again(path, path.read_bytes).split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode())
            if 0 < first_step >= row["step"]:  # a run that starts at step 0 measures it again
                kept.append(line.decode())
                tags |= set(row) if row["step"] == first_step else set()
        except (ValueError, KeyError, TypeError, RecursionError):
            num_bad += number < len(lines) and bool(line.strip())  # the last one was cut short by a kill
    if num_bad:
        set_aside(path, f"{num_bad} lines are not points of a curve; the others are kept")
    replace_file(path, "".join(line + "\n" for line in kept))
    return tags
