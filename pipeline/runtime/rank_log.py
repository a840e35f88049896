"""Copies what a rank prints into `logs/rank0.log` of the run directory: one file per rank, attempts one after another.

In: this process's Python output. Out: the same on the console and in the file. Native libraries write past Python, so their
text reaches only the console.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from data_prep.shards import DataError
from pipeline.errors import UserError
from pipeline.runtime.noncritical_files import open_log


class _Tee:
    """A text stream that also writes to a file. A full disk under either of them costs lines, never the run."""

    def __init__(self, console: TextIO, file: TextIO):
        self._console, self._file = console, file

    def write(self, text: str) -> int:
        if "\r" not in text:  # a progress bar redraws itself
            with contextlib.suppress(OSError, ValueError):
                self._file.write(text)
                self._file.flush()
        with contextlib.suppress(OSError):
            self._console.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)


def log_crash(log: Path, error: Exception) -> None:
    """Append the traceback of an error that ended this process before `tee_output`, unless it is one that a user can fix."""
    is_teed = isinstance(sys.stderr, _Tee)  # then the interpreter's own traceback reaches the log
    if isinstance(error, UserError | DataError) or is_teed:
        return
    with contextlib.suppress(OSError), open_log(log, "a") as file:
        file.write(_first_line() + "".join(traceback.format_exception(error)))


def tee_output(log: Path) -> None:
    """From now on, append everything that this process prints to `log` too."""
    try:
        file = open_log(log, "a")
    except OSError as error:
        print(f"warning: the log {log} cannot be written, the run continues without it: {error}", flush=True)
        return
    file.write(_first_line())
    consoles = {id(stream): _Tee(stream, file) for stream in (sys.stdout, sys.stderr)}
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for handler in [handler for logger in [logging.root, *loggers] for handler in logger.handlers]:
        held = vars(handler).get("stream")  # handlers keep the stream that they were made with
        if id(held) in consoles:
            vars(handler)["stream"] = consoles[id(held)]
    sys.stdout, sys.stderr = consoles[id(sys.stdout)], consoles[id(sys.stderr)]


def _first_line() -> str:
    """The first line of an attempt."""
    return f"-- {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"
