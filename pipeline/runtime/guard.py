"""What keeps a run from being lost or from going on in vain: stop requests, sick batches, hung ranks.

In: signals, a STOP file, losses and skipped steps. Out: `StopRequests.reason`, `SickRunError` with the batch named in
`bad_batch.json`, and a watchdog that dumps every thread's stack and ends the process. Used by trainer.py.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_HUNG, SickRunError, UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class GuardConfig:
    """When a run is sick or hung."""

    max_bad_steps: int = 8  # non-finite steps in a row before the run stops
    hang_timeout_s: float = 1800.0  # no finished step, save or evaluation for so long: dump stacks and end

    def __post_init__(self) -> None:
        if self.max_bad_steps < 1 or self.hang_timeout_s <= 0:
            raise UserError("guard.max_bad_steps must be at least 1 and guard.hang_timeout_s positive")


class StopRequests:
    """Remembers the first wish to stop. The trainer asks all ranks before it acts on it."""

    def __init__(self, stop_file: Path):
        self._stop_file = stop_file
        self._signal: signal.Signals | None = None

    def listen(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = self._signal or signal.Signals(number)

    @property
    def reason(self) -> str | None:
        """Why this rank wishes to stop, or None."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        return f"file {self._stop_file.name}" if self._stop_file.exists() else None


class BadStepCounter:
    """Counts non-finite steps in a row and stops the run, naming the batch, when there are too many.

    Dynamic fp16 loss scaling overflows on purpose while it looks for its scale: such a step counts only once the scale
    has fallen to its floor of 1, or when the loss itself is not finite.
    """

    def __init__(self, config: GuardConfig, report: Path):
        self._config = config
        self._report = report
        self.in_a_row = 0

    def observe(
        self, step: int, loss: float, skipped: bool, loss_scale: float, rows: Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Raises `SickRunError` at the K-th bad step in a row; `rows()` names the rows of the global batch."""
        bad = not math.isfinite(loss) or (skipped and loss_scale <= 1.0)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row < self._config.max_bad_steps:
            return
        self._report.write_text(json.dumps({"step": step, "loss": str(loss), "rows": rows()}, indent=1))
        raise SickRunError(
            f"{self.in_a_row} steps in a row were not finite, the last one step {step} (loss {loss}). No parameter was "
            f"changed by them. {self._report} names languages and rows of the last batch. Look at that text, lower "
            "optimizer.lr, or use ds_configs/zero2_bf16.json"
        )


class Watchdog:
    """Ends the process when nothing was finished for `timeout_s`: a rank that waits for a dead one waits for ever."""

    def __init__(self, timeout_s: float, stacks: Path):
        self._timeout_s = timeout_s
        self._stacks = stacks
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()

    def feed(self) -> None:
        """Something was finished."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout_s / 4)):
            if time.monotonic() - self._last > self._timeout_s:
                self._bite()

    def _bite(self) -> None:
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with open(self._stacks, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"error: nothing finished for {self._timeout_s:.0f} s; the stacks of all threads are in {self._stacks}. "
            "Another rank has died or hangs: look at its log",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_HUNG)
