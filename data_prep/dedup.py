"""Dropping exact repetitions of documents or lines within a language, in the order of the text, with bounded memory.

In: blocks. Out: the same blocks without repetitions. The memory is a table of 64-bit hashes in which a newer hash replaces an
older one. So no new text is dropped (unless two hashes of 64 bits collide), and repetitions far apart may stay. The table
depends on the text only: a run that resumes feeds it the text that it skips.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import xxhash

from data_prep.clean import CleanOptions
from data_prep.lines import text_lines
from data_prep.shards import DataError


class Deduplicator:
    """The units of one language that were seen so far. Blocks must come in the order of the text."""

    def __init__(self, options: CleanOptions) -> None:
        self._unit = options.dedup
        self._table: np.ndarray | None = None
        if self.is_active:
            try:
                self._table = np.zeros(max(1, options.dedup_memory_mb * 2**20 // 8), np.uint64)
            except MemoryError:
                raise DataError(
                    f"This machine has no {options.dedup_memory_mb} MB for --dedup-memory-mb. Give less."
                ) from None

    @property
    def is_active(self) -> bool:
        return self._unit != "none"

    def filter(self, text: bytes) -> tuple[bytes, Counter[str], bool]:
        """The text without units that were seen before, the number of those, and whether its first document is still there."""
        counts: Counter[str] = Counter()
        if not self.is_active:
            return text, counts, True
        lines = text_lines(text)
        if self._unit == "lines":
            numbers = [number for number, line in enumerate(lines) if line]
            repeated = self._seen_before([lines[number] for number in numbers])
            dropped = {number for number, again in zip(numbers, repeated, strict=True) if again}
            counts["lines_repeated"] += len(dropped)
            of_first = {number for place, number in enumerate(numbers) if number == numbers[0] + place}
            kept_lines = (line for number, line in enumerate(lines) if number not in dropped)
            return b"\n".join(kept_lines) + b"\n", counts, not of_first <= dropped
        documents = [part for part in b"\n".join(lines).split(b"\n\n") if part.strip()]
        documents = [b"\n".join(line for line in part.split(b"\n") if line) for part in documents]
        repeated = self._seen_before(documents)
        counts["documents_repeated"] += int(repeated.sum())
        kept = [part for part, again in zip(documents, repeated, strict=True) if not again]
        return b"\n\n".join(kept) + b"\n\n", counts, not repeated[:1].any()

    def _seen_before(self, units: list[bytes]) -> np.ndarray:
        """Whether each unit is in the table or earlier in `units`: bool [units]. Adds all of them to the table."""
        assert self._table is not None
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, units), np.uint64, len(units))
        hashes = np.maximum(hashes, 1)  # 0 marks a free entry
        _, first = np.unique(hashes, return_index=True)
        again = np.ones(len(units), bool)
        again[first] = False
        places = hashes % np.uint64(len(self._table))
        again |= self._table[places] == hashes
        self._table[places] = hashes
        return again
