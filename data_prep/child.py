"""Running a function in a forked process, whose memory, threads and modules end with it.

In: a function. Out: its result, which travels back as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from data_prep.shards import DataError


def in_child(work: Callable[[], Any], what: str) -> Any:
    """The result of `work()`, computed in a fork. Call this before any thread starts.

    Args:
        work: a function whose result can be written as JSON.
        what: the task, for the error text ("The process that was WHAT ended ...").

    Raises:
        DataError: `work` raised one, or the process ended without a result.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run_and_exit(lambda: _work_and_reply(work, writing))
    os.close(writing)
    try:
        with open(reading, "rb") as reply:
            text = reply.read()
    except BaseException:  # Ctrl-C: the result is no longer needed
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise DataError(
            f"The process that was {what} ended with status {status} (negative: killed by that signal; -9 is mostly too "
            "little memory). Nothing was written. Its own output is above."
        )
    found = json.loads(text)
    if "error" in found:
        raise DataError(found["error"])
    return found["result"]


def _work_and_reply(work: Callable[[], Any], writing: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the parent's tokenizers do not exist here
    try:
        found = {"result": work()}
    except DataError as error:
        found = {"error": str(error)}
    with open(writing, "wb") as reply:
        reply.write(json.dumps(found).encode("utf-8", "surrogatepass"))


def run_and_exit(work: Callable[[], None]) -> NoReturn:
    """Run `work()` as the rest of a forked process, which must never return into the parent's code."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)
