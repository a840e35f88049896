"""Requests to stop: signals, a STOP file, the end of the job's time, a launcher that has gone.

In: where the STOP file would be, and how long before the job's end to save. Out: `StopRequests.reason`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from pipeline.runtime.clocks import job_end_s
from pipeline.runtime.noncritical_files import set_aside

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,  # the terminal or the connection has gone
    signal.SIGXCPU,  # the limit of CPU time; the kernel sends it again every second, and kills at the hard limit
)


class StopRequests:
    """Remembers the first wish to stop. The trainer asks all ranks before it acts on it.

    Wishes come from signals, from a STOP file, and from the end of the job's time (`SLURM_JOB_END_TIME`, seconds since
    the epoch) less a margin that grows with the saves that this run has seen.
    """

    def __init__(self, stop_file: Path, margin_s: float):
        self._stop_file = stop_file
        self._leftover = _identity(stop_file)
        self._signal: signal.Signals | None = None
        self._orphaned = self._is_meeting = False
        self._end_s = time.monotonic() + job_end_s() - time.time()
        self.margin_s = margin_s

    def agree_on_deadline(self, left_s: float) -> None:
        """All ranks have this much time, whatever their clocks say."""
        self._end_s = time.monotonic() + left_s

    def listen(self) -> None:
        self._is_meeting = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: a hangup is no wish
                signal.signal(number, self._on_signal)

    def end_at_once(self) -> None:
        """Before the ranks have met there is nothing to save, and a rank that waits for the others hears no handler."""
        self._is_meeting = True
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)

    def launcher_has_gone(self) -> None:
        """Called from another thread: nobody above this rank would notice its end, or pass a signal on."""
        self._orphaned = True
        if self._is_meeting:
            os._exit(128 + signal.SIGTERM)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = self._signal or signal.Signals(number)

    def saw_save(self, seconds: float) -> None:
        """A save took so long: leave room for three of them."""
        self.margin_s = max(self.margin_s, 3 * seconds)

    def saw_earlier_saves(self, seconds: float) -> None:
        """The slowest save of an earlier life. One slow day must not leave a life no time to train: half of it at most."""
        self.margin_s = max(self.margin_s, min(3 * seconds, (self._end_s - time.monotonic()) / 2))

    def forget_leftover(self) -> None:
        """Delete a STOP file that was there before this life began; one made since then is a wish to stop."""
        if self._leftover is not None and self._leftover == _identity(self._stop_file):
            try:
                self._stop_file.unlink(missing_ok=True)
            except OSError as error:  # a directory, for one: it would stop every start after its first step
                set_aside(self._stop_file, error)

    @property
    def reason(self) -> str | None:
        """Why this rank wishes to stop, or None."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        if self._orphaned:
            return "the launcher has gone"
        if time.monotonic() > self._end_s - self.margin_s:
            return f"deadline: less than {self.margin_s:.0f} s to the end of the job's time"
        return f"file {self._stop_file.name}" if self._stop_file.exists() else None


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file this is and when it was last touched; no clock of another machine has a say."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
