"""Runs commands with a time limit, and ends everything that they have started.

In: a command, a limit, a log file. Out: exit code and seconds. Each command has a session of its own, so that a launcher's ranks
end with it. A part that is ended itself first ends its commands (`end_all_on_term`).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import REPO

TIMED_OUT = 124  # as of the command `timeout`
POLL_S = 0.5
GRACE_S = 3.0  # from TERM to KILL


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    seconds: float


class Process:
    """A command that runs in the root of the repository; its output is appended to `log`."""

    running: set[Process] = set()  # noqa: RUF012  (of this process, for `end_all_on_term`)

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._began = time.monotonic()
        with open(log, "a", encoding="utf-8") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            self._process = subprocess.Popen(
                command,
                cwd=REPO,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self.running.add(self)

    def wait(self, limit_s: float, meanwhile: Callable[[], object] = lambda: None) -> Ended:
        """Wait for the end, or end it. `meanwhile` is called about twice a second."""
        try:
            while (code := self._process.poll()) is None:
                if time.monotonic() - self._began > limit_s:
                    code = TIMED_OUT
                    break
                meanwhile()
                time.sleep(POLL_S)
        finally:
            self.end()
        return Ended(code, time.monotonic() - self._began)

    def end(self) -> None:
        """TERM, then KILL for the session. Also after a good end: a rank that outlives its launcher would keep the GPU."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.running.discard(self)


def end_all_on_term() -> None:
    """On SIGTERM end this process and the commands that it waits for."""

    def end(*_: object) -> None:
        for process in list(Process.running):
            process.end()
        os._exit(TIMED_OUT)

    signal.signal(signal.SIGTERM, end)


def reason_in(log: Path) -> str:
    """The last error paragraph of a command of this project, or its last lines."""
    lines = last_lines(log, 200).splitlines()
    return next((line for line in reversed(lines) if line.startswith("error: ")), "\n".join(lines[-4:]))


def last_lines(log: Path, count: int = 12) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]) if log.is_file() else ""
