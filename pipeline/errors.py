"""Exit codes and the two exceptions behind them; every command line of `pipeline` ends in `exit_code_of`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from data_prep.command_line import EXIT_USER, code_without_traceback, print_bytes_as_they_come
from data_prep.shards import DataError, Explained

EXIT_DONE = 0
EXIT_DIVERGED = 3
EXIT_HUNG = 4


class UserError(Explained):
    """Something that the user can mend. The message says what is wrong, where, and how to mend it."""


class DivergedRunError(RuntimeError):
    """The run itself is ill (non-finite loss, crash loop): starting it again unchanged will not help."""


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown key: the nearest known one, or all of them."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"did you mean `{nearest[0]}`?" if nearest else f"known here: {', '.join(known)}"


def exit_code_of(main: Callable[[], object]) -> int:
    """Run `main`; print what a user can fix as one paragraph, without a traceback, and give the exit code."""
    print_bytes_as_they_come()
    try:
        main()
        sys.stdout.flush()  # here, where a reader that has gone is no traceback
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER
    except DivergedRunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_DIVERGED
    except (Exception, KeyboardInterrupt) as error:
        return code_without_traceback(error)
    return EXIT_DONE
