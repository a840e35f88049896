"""Loss spikes and non-finite steps, and the recipe section `guard` that says what to do about them.

In: the loss of each step and whether it was skipped. Out: z-scores, `spikes.jsonl`, and `DivergedRunError` with the rows of
the last batch in `bad_batch.json`.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import DivergedRunError, UserError
from pipeline.recipe.ranges import LARGEST_INT, LONGEST_S, check_ranges
from pipeline.runtime.noncritical_files import open_log, write_file_or_warn


@dataclass
class GuardConfig:
    """When a run counts as diverged or hung, and when it stops before the end of its job."""

    max_bad_steps: int = 8  # non-finite steps in a row before the run stops
    hang_timeout_s: float = 1800.0  # no step or evaluation batch finished for this long: dump stacks and exit
    slow_timeout_s: float = 3600.0  # the same for the first step (kernels load) and for saves (disks queue)
    deadline_margin_s: float = 120.0  # save this long before the end of the job, or three saves if that is longer
    spike_window: int = 200  # number of earlier steps that a loss is compared with
    spike_sigmas: float = 8.0  # a loss this many standard deviations above their mean is reported as a spike
    spikes: Literal["log", "skip"] = "log"  # skip: such a step changes no parameter; spikes.jsonl names its rows
    verify_shards: bool = False  # before step 1, hash every shard file (sizes are always checked)

    def __post_init__(self) -> None:
        if min(self.hang_timeout_s, self.slow_timeout_s, self.deadline_margin_s, self.spike_sigmas) <= 0:
            raise UserError("guard's timeouts, deadline_margin_s and spike_sigmas must be positive")
        timeouts = dict.fromkeys(("hang_timeout_s", "slow_timeout_s", "deadline_margin_s"), (0, LONGEST_S))
        check_ranges(self, "guard", {**timeouts, "max_bad_steps": (1, LARGEST_INT), "spike_window": (2, 10**6)})


class SpikeDetector:
    """Compares a loss with those of the last steps by its z-score."""

    def __init__(self, config: GuardConfig):
        self._sigmas, self._skips = config.spike_sigmas, config.spikes == "skip"
        self.losses: deque[float] = deque(
            maxlen=config.spike_window
        )  # saved in checkpoints: it decides which steps skip

    @property
    def skip_above(self) -> float | None:
        """The loss above which a step must change no parameter, the same number on all ranks. None: no step is skipped."""
        return self._limit() if self._skips else None

    def z_score(self, loss: float) -> float | None:
        """The z-score of a spike; None for an ordinary loss. Spikes and non-finite losses are not added to the window."""
        limit = self._limit()
        if not math.isfinite(loss):
            return None
        if limit is not None and loss > limit:
            mean, deviation = self._mean_and_deviation()
            return (loss - mean) / deviation
        self.losses.append(loss)
        return None

    def _limit(self) -> float | None:
        """The highest ordinary loss; None until the window has a tenth of its losses."""
        if len(self.losses) < max(2, (self.losses.maxlen or 0) // 10):
            return None
        mean, deviation = self._mean_and_deviation()
        return mean + self._sigmas * deviation

    def _mean_and_deviation(self) -> tuple[float, float]:
        mean = statistics.fmean(self.losses)
        # at least one percent of the mean: on a flat curve every small change would be a spike
        return mean, max(statistics.pstdev(self.losses), 0.01 * abs(mean))


def record_spike(file: Path, step: int, loss: float, score: float, skipped: bool, rows: list[dict[str, Any]]) -> None:
    """Append a spike and the rows of its global batch to `file`."""
    entry = {"step": step, "loss": loss, "sigmas": round(score, 1), "skipped": skipped, "rows": rows}
    with contextlib.suppress(OSError), open_log(file, "a") as lines:  # a full disk must not end a run
        lines.write(json.dumps(entry) + "\n")


class NonFiniteStepCounter:
    """Counts non-finite steps in a row and stops the run, naming the batch, when there are too many.

    Dynamic fp16 loss scaling overflows on purpose while it searches for its scale. Such a step counts only once the scale has
    reached its minimum, or when the loss itself is not finite.
    """

    def __init__(self, config: GuardConfig, report: Path, loss_scale_floor: float = 1.0, writes: bool = True):
        """
        Args:
            report: the file that names the rows of the last batch
            loss_scale_floor: lowest loss scale; infinite where the scale is fixed
            writes: True on one rank. Losses and skipped steps are the same on all ranks.
        """
        self._config = config
        self._report = report
        self._floor = loss_scale_floor
        self._writes = writes
        self.in_a_row = 0

    def observe(
        self, step: int, loss: float, skipped: bool, loss_scale: float, rows: Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Count a step.

        Args:
            rows: returns the rows of the step's global batch
        Raises:
            DivergedRunError: this was the `guard.max_bad_steps`-th non-finite step in a row
        """
        is_counted = not math.isfinite(loss) or (skipped and loss_scale <= self._floor)
        self.in_a_row = self.in_a_row + 1 if is_counted else 0
        if self.in_a_row < self._config.max_bad_steps:
            return
        if self._writes:
            write_file_or_warn(self._report, json.dumps({"step": step, "loss": str(loss), "rows": rows()}, indent=1))
        raise DivergedRunError(
            f"{self.in_a_row} steps in a row were not finite, the last one step {step} (loss {loss}). No parameter was "
            f"changed by them. {self._report} names languages and rows of the last batch. Look at that text, lower "
            "optimizer.lr, or use ds_configs/zero2_bf16.json"
        )
