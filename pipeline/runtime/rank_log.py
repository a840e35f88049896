"""What a rank prints, kept in the run directory too: `logs/rank0.log`, one file per rank, lives one after another.

In: this process's Python output. Out: the same on the console and in the file. Text that native libraries write past
Python reaches the console only. Used by run.py.
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
from pipeline.runtime.noncritical_files import make_way_for_directory, make_way_for_file


class _Tee:
    """A text stream that also goes to a file. A full disk, below the file or below a redirected console, costs lines, never
    the run."""

    def __init__(self, console: TextIO, file: TextIO):
        self._console, self._file = console, file

    def write(self, text: str) -> int:
        if "\r" not in text:  # a progress bar draws itself again and again
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
    """What ended this process before `tee_output` is appended to `log`; nothing is made for what a user can mend."""
    the_interpreter_will_tell = isinstance(sys.stderr, _Tee)
    if isinstance(error, UserError | DataError) or the_interpreter_will_tell:
        return
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(_beginning() + "".join(traceback.format_exception(error)))


def tee_output(log: Path) -> None:
    """From now on whatever this process prints is appended to `log`, too."""
    try:
        make_way_for_directory(log.parent)
        log.parent.mkdir(parents=True, exist_ok=True)
        make_way_for_file(log)
        file = open(log, "a", encoding="utf-8")
    except OSError as error:
        print(f"warning: the log {log} cannot be written, going on without it: {error}", flush=True)
        return
    file.write(_beginning())
    consoles = {id(stream): _Tee(stream, file) for stream in (sys.stdout, sys.stderr)}
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for handler in [handler for logger in [logging.root, *loggers] for handler in logger.handlers]:
        held = vars(handler).get("stream")  # handlers hold the stream that was there before
        if id(held) in consoles:
            vars(handler)["stream"] = consoles[id(held)]
    sys.stdout, sys.stderr = consoles[id(sys.stdout)], consoles[id(sys.stderr)]


def _beginning() -> str:
    """The line that a life opens with."""
    return f"-- {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"
