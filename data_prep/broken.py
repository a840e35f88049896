"""Counting lines that are not UTF-8 while a language is read. A few are normal in web text; many mean another encoding.

In: encoded blocks in order. Out: an `OtherEncoding` error, or a warning at the end of the language. A file is judged at its end,
or sooner if it is large and clearly in another encoding. The shards made of a rejected file are removed, so that the same
command works with the converted file.
"""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.other_encodings import SAMPLE_LINES, broken_lines
from data_prep.shards import DataError
from data_prep.sources import Source

MIN_BROKEN = 3  # one broken line in a file of ten is no other encoding
ENOUGH_LINES, CLEARLY_BROKEN = 20_000, 0.5  # lines after which more than half broken is enough to stop


class OtherEncoding(DataError):
    """A source in another encoding than UTF-8. Sources before `source_index` keep their shards."""

    def __init__(self, message: str, source_index: int) -> None:
        super().__init__(message)
        self.source_index = source_index


class BrokenLines:
    """The lines of one language that are not UTF-8. `policy` is `CleanOptions.broken_text`."""

    def __init__(self, sources: list[Source], policy: str) -> None:
        self._sources, self._policy = sources, policy
        self._index = -1
        self._first: tuple[int, int] | None = None  # source and line number of the first broken line in this run
        self._sample: list[bytes] = []  # broken lines of the source that is being read
        self._start_source(0)

    def _start_source(self, index: int) -> None:
        self._index, self._read, self._broken, self._first_here = index, 0, 0, 0
        self._sample = []

    @property
    def lines(self) -> dict[str, int]:
        """The lines of the source that is being read: how many were read, and how many of them are broken."""
        return {"read": self._read, "broken": self._broken}

    def resume(self, index: int, lines: Mapping[str, int]) -> None:
        """Continue in source `index`, of which an earlier run read `lines`."""
        self._start_source(index)
        self._read, self._broken = lines["read"], lines["broken"]

    def add(self, index: int, text: bytes, first_line: int, counts: Mapping[str, int], is_end: bool) -> None:
        """Count one encoded block of source `index`, which starts in line `first_line` (from 0) of its text.

        Raises:
            OtherEncoding: too many lines of the source are not UTF-8.
        """
        if index != self._index:
            self._start_source(index)
        self._read += counts.get("lines_read", 0)
        self._broken += counts.get("lines_broken", 0)
        if counts.get("lines_broken") and len(self._sample) < SAMPLE_LINES:
            for number, line in broken_lines(text):
                if not self._sample:
                    self._first_here = first_line + number + 1
                    self._first = self._first or (index, self._first_here)
                self._sample.append(line)
                if len(self._sample) == SAMPLE_LINES:
                    break
        share = self._broken / max(1, self._read)
        limit = self._sources[index].options.max_broken_lines
        is_clear = self._read >= ENOUGH_LINES and share > max(limit, CLEARLY_BROKEN)
        if self._broken >= _least(limit) and share > limit and (is_end or is_clear):
            raise OtherEncoding(self._too_many(share, limit), index)

    def _too_many(self, share: float, limit: float) -> str:
        source = self._sources[self._index]
        if not self._sample:
            return (
                f"{source.title}: {self._broken} of {self._read} lines ({share:.0%}) are not UTF-8, all in the part that an "
                "earlier run read; nothing of this file was kept. Run the same command again: it reads the file from its start "
                f"and names such a line. (To accept more than {limit:.0%} of broken lines: --max-broken-lines 1.)"
            )
        return (
            f"{source.title}: {self._broken} of {self._read} lines ({share:.0%}) are not UTF-8, the first is line "
            f"{self._first_here}: {self._sample[0].decode('utf-8', 'backslashreplace')[:60]!r}. "
            f"{source.how_to_convert(self._sample)}. Then {source.how_to_continue}; nothing of this file was kept. (To "
            f"accept more than {limit:.0%} of broken lines: --max-broken-lines 1.)"
        )

    def warning(self, counts: Mapping[str, int]) -> str | None:
        """The warning about a finished language, from all its counts; None if all lines are UTF-8.

        Raises:
            OtherEncoding: too many lines of the language are not UTF-8, in files too small to be judged one by one.
        """
        broken, read = counts.get("lines_broken", 0), counts.get("lines_read", 0)
        if not broken:
            return None
        share, limit = broken / max(1, read, broken), self._sources[0].options.max_broken_lines
        what = "left out" if self._policy == "skip" else "kept, with U+FFFD for the invalid bytes"
        where = f", the first in line {self._first[1]} of {self._sources[self._first[0]].title}" if self._first else ""
        if broken >= _least(limit) and share > limit:
            raise OtherEncoding(
                f"{broken} of {read} lines ({share:.0%}) are not UTF-8{where}. Convert those files (iconv -f ENCODING -t UTF-8) "
                "and run the same command again, or accept the lines as they are with --max-broken-lines 1.",
                self._first[0] if self._first else 0,
            )
        return f"{broken} of {read} lines ({share:.2%}) are not UTF-8{where}; they were {what}"


def _least(limit: float) -> int:
    """How many broken lines reject a file whose share of them is over the limit. A limit of 0 accepts none."""
    return MIN_BROKEN if limit else 1
