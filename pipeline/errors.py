"""Exit codes and the exceptions behind them. Every command line of `pipeline` ends in `exit_code_of`."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from data_prep.command_line import EXIT_USER, code_without_traceback, let_first_rank_print, print_bytes_as_they_come
from data_prep.shards import DataError, Explained

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_DIVERGED = 3
EXIT_HUNG = 4


class UserError(Explained):
    """A problem that the user can fix. The message says what is wrong, where, and how to fix it."""


class DivergedRunError(RuntimeError):
    """The run cannot continue (non-finite loss, crash loop): an unchanged restart will not help."""


@contextlib.contextmanager
def about_student(name: str) -> Iterator[None]:
    """A `UserError` of the block names the student, in a run with several, and so do the `--set` options of its fix."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"(?<=--set )('?)(?=(student|relations|optimizer)\.)", rf"\1students.{name}.", str(error))
        raise (UserError(f"students.{name}: {text}") if name else error) from None


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown key: the nearest known key, or all of them."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"did you mean `{nearest[0]}`?" if nearest else f"known here: {', '.join(known)}."


def exit_code_of(main: Callable[[], object]) -> int:
    """Run `main` and return the exit code. Errors that a user can fix are printed as one paragraph without a traceback."""
    print_bytes_as_they_come()
    try:
        main()
        sys.stdout.flush()  # inside `try`, so that a closed pipe gives no traceback
    except (UserError, DataError, DivergedRunError) as error:
        let_first_rank_print()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_DIVERGED if isinstance(error, DivergedRunError) else EXIT_USER
    except (Exception, KeyboardInterrupt) as error:
        return code_without_traceback(error)
    return EXIT_DONE


def run_to_exit(main: Callable[[], object]) -> NoReturn:
    """Run `main` and end this process immediately with its exit code. A bug prints its traceback.

    The interpreter's own shutdown is left out. After an error it would destroy the process group, and with NCCL that can wait
    for ranks that wait for this one. After success the threads of the collective library can abort it (seen in one of about
    fifty runs on CPU), which would change the exit code to 134. All results are on disk when `main` returns.
    """
    try:
        code = exit_code_of(main)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = EXIT_BUG
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has ended
            stream.flush()
    os._exit(code)
