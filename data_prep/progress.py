"""Progress of a long operation: a bar on a terminal; elsewhere (a file, Slurm, CI) one line about every 30 s.

In: how many units are done, of how many. Out: text on standard error, such as
`encoding with NAME: batch 120 of 500, 2.1 min left`. An operation that ends within 30 s prints no line.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from time import monotonic
from typing import Self, TextIO, TypeVar

from tqdm import tqdm

LINE_EVERY_S = 30.0
REDRAW_EVERY_S = 0.5
BYTES = "B"  # a unit that is shown in multiples
Item = TypeVar("Item")


class Pace:
    """Chooses points in time at which a line is printed: the last one before `every_s` have passed since the line before."""

    def __init__(self, every_s: float = LINE_EVERY_S, begins_with_line: bool = False) -> None:
        self._every_s, self._point = every_s, monotonic()
        self._line = float("-inf") if begins_with_line else self._point

    def is_due(self) -> bool:
        """Whether to print a line now. Every point in time asks; the next one is assumed to be as far away as the last."""
        now = monotonic()
        distance, self._point = now - self._point, now
        # Where points are more than `every_s` apart, another line may have been printed at this very point.
        if now + distance - self._line <= self._every_s or now - self._line < distance / 2:
            return False
        self._line = now
        return True

    def printed(self) -> None:
        """A line was printed elsewhere."""
        self._line = monotonic()


class Progress:
    """Progress of one operation. A context manager."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        initial: int = 0,
        is_shown: bool = True,
        every_s: float = LINE_EVERY_S,
    ) -> None:
        """
        Args:
            what: the operation
            total: number of units
            unit: in singular; `BYTES` for bytes
            initial: units that were done before
            is_shown: False prints nothing
            every_s: seconds between lines, where there is no terminal
        """
        is_terminal = sys.stderr.isatty()
        self._what, self._total, self._unit, self._initial = what, total, unit, initial
        self._prints_lines = is_shown and not is_terminal
        self._done, self._note, self._began, self._pace = initial, "", monotonic(), Pace(every_s)
        self._bar = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            unit_scale=unit == BYTES,
            desc=what,
            file=sys.stderr,
            mininterval=REDRAW_EVERY_S,
            disable=not (is_shown and is_terminal),
            leave=False,
        )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return monotonic() - self._began

    def update(self, count: int = 1) -> None:
        """`count` more units are done."""
        self._done += count
        self._bar.update(count)
        if self._prints_lines and self._pace.is_due() and self._done < self._total:
            print(self._line(), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something to show behind the figures from now on."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def printed(self) -> None:
        """Another line about this operation was printed: the next one of its own is not due before `every_s` have passed."""
        self._pace.printed()

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line(self) -> str:
        counts = f"{self._unit} {self._done:,} of {self._total:,}"
        if self._unit == BYTES:
            counts = f"{self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB"
        parts = [counts, time_left(self.seconds, self._done - self._initial, self._total - self._done), self._note]
        return f"{self._what}: {', '.join(filter(None, parts))}"


def progress(items: Collection[Item], what: str, unit: str, is_shown: bool = True) -> Iterator[Item]:
    """Iterate over `items` and show how many of them are done."""
    with Progress(what, len(items), unit, is_shown=is_shown) as shown:
        for item in items:
            yield item
            shown.update()


def say(line: str, file: TextIO) -> None:
    """Print a line, above the bars that a terminal shows."""
    tqdm.write(line, file=file)
    file.flush()


def time_left(seconds: float, done: int, left: int) -> str:
    """`2.1 min left`, if `done` units took `seconds` and `left` units are left; nothing if that cannot be known."""
    return f"{duration(seconds / done * left)} left" if done > 0 and left >= 0 else ""


def duration(seconds: float) -> str:
    """Seconds in the unit that is readable."""
    for limit, size, unit in ((100, 1, "s"), (100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
