"""Runs commands with a time limit, and ends everything that they have started.

In: a command, a limit, a log file. Out: exit code and seconds. The command has a session of its own, so that a launcher's
ranks end with it.
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


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    seconds: float


class Process:
    """A command that runs in the root of the repository; its output is appended to `log`."""

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
            self._end_session()
        return Ended(code, time.monotonic() - self._began)

    def _end_session(self) -> None:
        """Also after a good end: a rank that outlives its launcher would take the GPU from the next part."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def last_lines(log: Path, count: int = 12) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]) if log.is_file() else ""
