"""Requests to stop a run: signals, a STOP file, the end of the job's time, a launcher that has ended.

In: the path of the STOP file, and how long before the end of the job to save. Out: `StopRequests.reason`.
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
    signal.SIGHUP,  # the terminal or the connection has closed
    signal.SIGXCPU,  # the limit of CPU time; the kernel sends it every second, and kills at the hard limit
)


class StopRequests:
    """Remembers the first request to stop. The trainer asks all ranks before it stops.

    The end of the job's time is `SLURM_JOB_END_TIME` (seconds since the epoch) less a margin, which grows with the
    duration of the saves that this run has seen.
    """

    def __init__(self, stop_file: Path, margin_s: float):
        self._stop_file = stop_file
        self._leftover = _identity(stop_file)
        self._signal: signal.Signals | None = None
        self._launcher_ended = self._is_meeting = False
        self._end_s = time.monotonic() + job_end_s() - time.time()
        self.margin_s = margin_s

    def agree_on_deadline(self, left_s: float) -> None:
        """Set the time left in seconds to the same value on all ranks, independent of their clocks."""
        self._end_s = time.monotonic() + left_s

    def listen(self) -> None:
        """Install the signal handlers."""
        self._is_meeting = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: a hangup is no request
                signal.signal(number, self._on_signal)

    def end_immediately(self) -> None:
        """Let a signal end this process: until the ranks have met, Python handlers do not run and nothing is to be saved."""
        self._is_meeting = True
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)

    def launcher_ended(self) -> None:
        """Called from another thread. Nothing above this rank would notice its end or forward a signal any more."""
        self._launcher_ended = True
        if self._is_meeting:
            os._exit(128 + signal.SIGTERM)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = self._signal or signal.Signals(number)

    def saw_save(self, seconds: float) -> None:
        """A save took this long: leave time for three of them."""
        self.margin_s = max(self.margin_s, 3 * seconds)

    def saw_earlier_saves(self, seconds: float) -> None:
        """The slowest save of an earlier attempt. It reserves half of the time left at most, so that there is time to train."""
        self.margin_s = max(self.margin_s, min(3 * seconds, (self._end_s - time.monotonic()) / 2))

    def forget_leftover(self) -> None:
        """Delete a STOP file that existed before this attempt began. One made since then is a request to stop."""
        if self._leftover is not None and self._leftover == _identity(self._stop_file):
            try:
                self._stop_file.unlink(missing_ok=True)
            except OSError as error:  # a directory, for example: it would stop every start after its first step
                set_aside(self._stop_file, error)

    @property
    def reason(self) -> str | None:
        """Why this rank asks to stop, or None."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        if self._launcher_ended:
            return "the launcher has ended"
        if time.monotonic() > self._end_s - self.margin_s:
            return f"deadline: less than {self.margin_s:.0f} s to the end of the job's time"
        return f"file {self._stop_file.name}" if self._stop_file.exists() else None


def _identity(file: Path) -> tuple[int, int] | None:
    """Inode and modification time of a file: whether it is the same one as before, independent of any other clock."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
