"""What keeps a run from being lost or from going on in vain: stop requests, sick batches, hung ranks.

In: signals, a STOP file, losses and skipped steps. Out: `StopRequests.reason`, `SickRunError` with the batch named in
`bad_batch.json`, and a watchdog that dumps every thread's stack and ends the process. Used by trainer.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.errors import EXIT_HUNG, SickRunError, UserError
from pipeline.ranges import LARGEST_INT, LONGEST_S, check_ranges
from pipeline.runtime.beside import make_way_for_directory, make_way_for_file, set_aside
from pipeline.runtime.clocks import job_end_s

ProcessMark = list[Any]
TIME_FOR_OTHER_STACKS_S = 3.0  # ranks that wait for the same dead one notice within a second of each other
BACKSTOP_MARGIN_S = 30.0  # beyond the watchdog's own patience; it needs a few seconds once it has begun
TIME_FOR_CONSOLE_S = 2.0
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,  # the terminal or the connection has gone
    signal.SIGXCPU,  # the limit of CPU time; the kernel sends it again every second, and kills at the hard limit
)


@dataclass
class GuardConfig:
    """When a run is sick or hung."""

    max_bad_steps: int = 8  # non-finite steps in a row before the run stops
    hang_timeout_s: float = 1800.0  # no finished step or evaluation batch for so long: dump stacks and end
    slow_timeout_s: float = 3600.0  # the same for the first step (kernels load) and for saves (disks queue)
    deadline_margin_s: float = 120.0  # save this long before the job's end, or three saves if that is longer
    spike_window: int = 200  # steps that a loss is compared with
    spike_sigmas: float = 8.0  # a loss so many standard deviations above their mean is reported as a spike
    spikes: Literal["log", "skip"] = "log"  # skip: no parameter is changed by such a step; spikes.jsonl names its rows
    verify_shards: bool = False  # before step 1, hash every shard file (sizes are always checked)

    def __post_init__(self) -> None:
        if self.max_bad_steps < 1 or self.spike_window < 2:
            raise UserError("guard.max_bad_steps must be at least 1 and guard.spike_window at least 2")
        if min(self.hang_timeout_s, self.slow_timeout_s, self.deadline_margin_s, self.spike_sigmas) <= 0:
            raise UserError("guard's timeouts, deadline_margin_s and spike_sigmas must be positive")
        timeouts = dict.fromkeys(("hang_timeout_s", "slow_timeout_s", "deadline_margin_s"), (0, LONGEST_S))
        check_ranges(self, "guard", {**timeouts, "max_bad_steps": (1, LARGEST_INT), "spike_window": (2, 10**6)})


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


class SpikeDetector:
    """Says when a loss stands far above those of the last steps (its z-score against a window)."""

    def __init__(self, config: GuardConfig):
        self._sigmas, self._skips = config.spike_sigmas, config.spikes == "skip"
        self.losses: deque[float] = deque(maxlen=config.spike_window)  # goes into checkpoints: it decides over steps

    def is_to_skip(self, loss: float) -> bool:
        """Whether a step with this loss, which is the same number on all ranks, must change nothing."""
        return self._skips and self._score(loss) is not None

    def z_score(self, loss: float) -> float | None:
        """The z-score of a spike, None for an ordinary loss. Spikes and non-finite losses do not enter the window."""
        score = self._score(loss)
        if score is None and math.isfinite(loss):
            self.losses.append(loss)
        return score

    def _score(self, loss: float) -> float | None:
        window = self.losses
        if math.isfinite(loss) and len(window) >= max(2, (window.maxlen or 0) // 10):
            # a floor of one percent keeps a flat curve from calling every ripple a spike
            deviation = max(statistics.pstdev(window), 0.01 * abs(statistics.fmean(window)))
            score = (loss - statistics.fmean(window)) / deviation
            if score > self._sigmas:
                return score
        return None


def record_spike(file: Path, step: int, loss: float, score: float, skipped: bool, rows: list[dict[str, Any]]) -> None:
    """Add a spike and the rows of its global batch to `file`."""
    entry = {"step": step, "loss": loss, "sigmas": round(score, 1), "skipped": skipped, "rows": rows}
    make_way_for_file(file)
    with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as lines:  # a full disk ends no run
        lines.write(json.dumps(entry) + "\n")


def leave_word(file: Path, text: str) -> None:
    """Write a marker or report at a run's end. A full disk costs the file, never the exit code."""
    try:
        make_way_for_file(file)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"warning: {file} not written: {error}", flush=True)


class BadStepCounter:
    """Counts non-finite steps in a row and stops the run, naming the batch, when there are too many.

    Dynamic fp16 loss scaling overflows on purpose while it looks for its scale: such a step counts only once the scale
    has fallen to its floor, or when the loss itself is not finite. `loss_scale_floor`: infinite for a fixed scale.
    Loss and skipped steps are the same on all ranks, so the one that `writes` knows all there is to write.
    """

    def __init__(self, config: GuardConfig, report: Path, loss_scale_floor: float = 1.0, writes: bool = True):
        self._config = config
        self._report = report
        self._floor = loss_scale_floor
        self._writes = writes
        self.in_a_row = 0

    def observe(
        self, step: int, loss: float, skipped: bool, loss_scale: float, rows: Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Raises `SickRunError` at the K-th bad step in a row; `rows()` names the rows of the global batch."""
        bad = not math.isfinite(loss) or (skipped and loss_scale <= self._floor)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row < self._config.max_bad_steps:
            return
        if self._writes:
            leave_word(self._report, json.dumps({"step": step, "loss": str(loss), "rows": rows()}, indent=1))
        raise SickRunError(
            f"{self.in_a_row} steps in a row were not finite, the last one step {step} (loss {loss}). No parameter was "
            f"changed by them. {self._report} names languages and rows of the last batch. Look at that text, lower "
            "optimizer.lr, or use ds_configs/zero2_bf16.json"
        )


class Watchdog:
    """Ends the process when nothing was finished for a while: a rank that waits for a dead one waits for ever.

    `stacks` takes the stacks of this rank, when it bites, when another rank of this host does, or on SIGQUIT; those of an
    earlier life are kept under another name. Where a call that never gives the interpreter back keeps the watchdog
    itself from running, faulthandler's own thread, which needs no interpreter, writes the stacks and ends the process.
    """

    def __init__(self, config: GuardConfig, stacks: Path):
        self._config = config
        self._stacks = stacks
        self._file: IO[str] | None = None
        self._due = math.inf
        self._siblings: list[ProcessMark] = []
        self._stopped = threading.Event()
        self._was_enabled = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def take_along(self, siblings: list[ProcessMark]) -> None:
        """Ranks on this host that end with this one: a stopped process does not hear a launcher's SIGTERM."""
        self._siblings = [mark for mark in siblings if mark[0] == socket.gethostname() and mark[1] != os.getpid()]

    def __enter__(self) -> Watchdog:
        self._file = self._open_stacks()
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(file=self._file, all_threads=True)  # where a SIGBUS or SIGSEGV happened
        # `kill -QUIT` asks a rank for its stacks; the handler is C code, so it answers out of any call
        faulthandler.register(signal.SIGQUIT, file=self._file, all_threads=True)
        self.feed_before_slow_work()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGQUIT)
        faulthandler.disable()
        if self._was_enabled:
            with contextlib.suppress(OSError, ValueError):  # a stream without descriptor, as in a notebook
                faulthandler.enable()
        with contextlib.suppress(OSError):
            if self._stacks.is_file() and self._stacks.stat().st_size == 0:
                self._stacks.unlink()
                self._stacks.parent.rmdir()  # a run that was refused leaves no empty directories
                self._stacks.parent.parent.rmdir()

    def _open_stacks(self) -> IO[str]:
        """The file for stacks; the console where a directory cannot be written, for a log ends no run."""
        try:
            make_way_for_directory(self._stacks.parent)
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            make_way_for_file(self._stacks)
            _set_aside(self._stacks)
            return open(self._stacks, "w", encoding="utf-8")
        except OSError as error:
            print(f"warning: {self._stacks} cannot be written, stacks go to the console: {error}", flush=True)
            return open(2, "w", encoding="utf-8", closefd=False)

    def feed(self) -> None:
        """Something was finished."""
        self._wait(self._config.hang_timeout_s)

    def feed_before_slow_work(self) -> None:
        """What comes next may take longer than a step."""
        self._wait(max(self._config.slow_timeout_s, self._config.hang_timeout_s))

    def _wait(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds
        if self._file is not None:
            faulthandler.dump_traceback_later(seconds + BACKSTOP_MARGIN_S, file=self._file, exit=True)

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._config.hang_timeout_s / 4)):
            if time.monotonic() > self._due:
                self._bite()

    def _bite(self) -> None:
        assert self._file is not None
        faulthandler.dump_traceback(self._file, all_threads=True)
        speaker = threading.Thread(target=self._say_so, daemon=True)
        speaker.start()
        speaker.join(TIME_FOR_CONSOLE_S)  # whoever reads a full pipe may hang as well
        self._send_to_siblings(signal.SIGQUIT, signal.SIGCONT)  # a stopped process answers once it goes on
        time.sleep(TIME_FOR_OTHER_STACKS_S)
        self._send_to_siblings(signal.SIGKILL)
        os._exit(EXIT_HUNG)

    def _say_so(self) -> None:
        print(
            f"error: nothing finished in time (guard.hang_timeout_s is {self._config.hang_timeout_s:.0f}); the stacks of "
            f"all threads are in {self._stacks}. Another rank has died or hangs: look at its log",
            file=sys.stderr,
            flush=True,
        )

    def _send_to_siblings(self, *numbers: signal.Signals) -> None:
        for mark in self._siblings:
            for number in numbers:
                if process_mark(mark[1]) == mark:  # the number may belong to somebody else by now
                    os.kill(mark[1], number)


def _set_aside(stacks: Path) -> None:
    """Rename what an earlier life has left: `earlier-1-stacks-rank0.txt`, the next one 2."""
    if stacks.exists() and stacks.stat().st_size > 0:
        numbers = itertools.count(1)
        names = (stacks.with_name(f"earlier-{number}-{stacks.name}") for number in numbers)
        stacks.rename(next(name for name in names if not name.exists()))


def process_mark(pid: int) -> ProcessMark | None:
    """Host, number and start time (clock ticks since boot) of a process: together they name it for good."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return [socket.gethostname(), pid, int(fields[19])]
