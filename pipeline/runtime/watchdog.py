"""Ends a rank that has made no progress for too long, with the stacks of all ranks of its host on disk.

In: a GuardConfig and a file for the stacks. Out: exit code 4.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from data_prep.ownership import start_ticks
from pipeline.errors import EXIT_HUNG
from pipeline.runtime.anomalies import GuardConfig
from pipeline.runtime.noncritical_files import open_log

ProcessIdentity = list[Any]

TIME_FOR_OTHER_STACKS_S = 3.0  # ranks that wait for the same dead one notice within a second of each other
BACKSTOP_MARGIN_S = 30.0  # faulthandler's timer beyond the watchdog's own, which needs a few seconds to finish
TIME_FOR_CONSOLE_S = 2.0


class Watchdog:
    """Ends the process when nothing was finished for a while: a rank that waits for a dead one would wait indefinitely.

    `stacks` receives the stacks of this rank: when its time is over, when another rank of this host reports a hang, or on
    SIGQUIT. The file of an earlier attempt is kept under another name. A call that holds the interpreter lock also stops the
    watchdog's thread. For that case faulthandler's own timer, which needs no interpreter, writes the stacks and exits.
    """

    def __init__(self, config: GuardConfig, stacks: Path):
        self._config = config
        self._stacks = stacks
        self._file: IO[str] | None = None
        self._due = math.inf
        self._siblings: list[ProcessIdentity] = []
        self._stopped = threading.Event()
        self._was_enabled = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def register_local_ranks(self, siblings: list[ProcessIdentity]) -> None:
        """Ranks on this host that are killed with this one: a stopped process does not react to a launcher's SIGTERM."""
        host, pid = socket.gethostname(), os.getpid()
        self._siblings = [identity for identity in siblings if identity[0] == host and identity[1] != pid]

    def __enter__(self) -> Watchdog:
        self._file = self._open_stacks()
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(file=self._file, all_threads=True)  # on SIGBUS or SIGSEGV
        # `kill -QUIT` asks a rank for its stacks; the handler is C code, so it runs during any call
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
                self._stacks.parent.rmdir()  # a run that never began leaves no empty directories
                self._stacks.parent.parent.rmdir()

    def _open_stacks(self) -> IO[str]:
        """The file for stacks; the console where it cannot be opened, because a log must not end a run."""
        try:
            _keep_earlier(self._stacks)
            return open_log(self._stacks, "w")
        except OSError as error:
            print(f"warning: {self._stacks} cannot be written, stacks go to the console: {error}", flush=True)
            return open(2, "w", encoding="utf-8", closefd=False)

    def feed(self) -> None:
        """A step or batch was finished: start to count again."""
        self._wait(self._config.hang_timeout_s)

    def feed_before_slow_work(self) -> None:
        """The same, before work that may take longer than a step."""
        self._wait(max(self._config.slow_timeout_s, self._config.hang_timeout_s))

    def _wait(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds
        if self._file is not None:
            faulthandler.dump_traceback_later(seconds + BACKSTOP_MARGIN_S, file=self._file, exit=True)

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._config.hang_timeout_s / 4)):
            if time.monotonic() > self._due:
                self._end_process()

    def _end_process(self) -> None:
        assert self._file is not None
        faulthandler.dump_traceback(self._file, all_threads=True)
        console = threading.Thread(target=self._print_error, daemon=True)
        console.start()
        console.join(TIME_FOR_CONSOLE_S)  # the reader of a full pipe may hang as well
        self._send_to_siblings(signal.SIGQUIT, signal.SIGCONT)  # a stopped process answers once it continues
        if self._stopped.wait(TIME_FOR_OTHER_STACKS_S):
            return  # the stopped rank continued and finished the run meanwhile, so the exit code is the run's
        self._send_to_siblings(signal.SIGKILL)
        os._exit(EXIT_HUNG)

    def _print_error(self) -> None:
        print(
            f"error: nothing finished in time (guard.hang_timeout_s is {self._config.hang_timeout_s:.0f}); the stacks of "
            f"all threads are in {self._stacks}. Another rank has died or hangs: look at its log",
            file=sys.stderr,
            flush=True,
        )

    def _send_to_siblings(self, *numbers: signal.Signals) -> None:
        for identity in self._siblings:
            for number in numbers:
                if process_identity(identity[1]) == identity:  # the system may have given the number to another process
                    os.kill(identity[1], number)


def _keep_earlier(stacks: Path) -> None:
    """Rename the stacks of an earlier attempt to `earlier-1-stacks-rank0.txt`, those of the next one to `earlier-2-...`."""
    if stacks.is_file() and stacks.stat().st_size > 0:
        numbers = itertools.count(1)
        names = (stacks.with_name(f"earlier-{number}-{stacks.name}") for number in numbers)
        stacks.rename(next(name for name in names if not name.exists()))


def process_identity(pid: int) -> ProcessIdentity | None:
    """Host, number and start time (clock ticks since boot) of a process. No other process ever has all three."""
    started = start_ticks(pid)
    return None if started is None else [socket.gethostname(), pid, started]
