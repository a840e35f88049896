"""Runs a fuzz target: kept cases first, then drawn ones, each with a time limit.

`make test` runs about a hundred derandomised trials per target. `make fuzz` (FUZZ_SECONDS=N) runs for N seconds in all with
other trials each time, and prints their number.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from data_prep.shards import DataError
from pipeline.errors import UserError

Trial = Callable[[int, int], object]
SECONDS_PER_TRIAL = 20
LONGEST_PARAGRAPH = 6000
QUICK_TRIALS = 100
NUM_TARGETS = 17  # they share FUZZ_SECONDS
BATCH = 100
ALL_CHECKS = list(HealthCheck)


class Hangs(BaseException):
    """A trial took longer than its limit. Not an `Exception`, so that no handler hides it."""


def rejected_or_done(action: Callable[[], object]) -> None:
    """Run `action`: it must work, or explain in one paragraph why not. Any other exception fails the test."""
    paragraph = "done"
    previous = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_TRIAL)
    try:
        action()
    except (UserError, DataError) as error:
        paragraph = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert 0 < len(paragraph) < LONGEST_PARAGRAPH, paragraph[:500]
    assert "\n" not in paragraph, paragraph


def _too_long(number: int, frame: Any) -> None:
    raise Hangs(f"longer than {SECONDS_PER_TRIAL} s")


def fuzz(name: str, trial: Trial, kept: Iterable[tuple[int, int]] = (), quick_trials: int = QUICK_TRIALS) -> None:
    """Run `trial(seed, number of changes)` on the `kept` cases and on drawn ones."""
    for case in kept:
        trial(*case)
    seconds = float(os.environ.get("FUZZ_SECONDS", "0")) / NUM_TARGETS
    if not seconds:
        settings(_settings(quick_trials), derandomize=True)(_drawn(trial))()
        return
    count, end, start = 0, time.monotonic() + seconds, time.time_ns()
    while time.monotonic() < end:
        seed(start + count)(settings(_settings(BATCH))(_drawn(trial)))()
        count += BATCH
    print(f"\nfuzz {name}: {count} trials in {seconds:.0f} s, none ended in a traceback or hung", flush=True)


def _settings(trials: int) -> settings:
    return settings(max_examples=trials, deadline=None, database=None, suppress_health_check=ALL_CHECKS)


def _drawn(trial: Trial) -> Callable[[], None]:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 4))
    def run(number: int, times: int) -> None:
        trial(number, times)

    return run
