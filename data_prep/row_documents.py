"""Which documents a row is of: the lengths of their parts, for the rows of a batch of several languages.

In: the shards of some languages, and rows as `ShardSet.gather` counts them. Out: int64 [n, S]. The document offsets are searched
where they are mapped: nothing of a shard's size is read or copied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from operator import sub
from typing import Protocol

import numpy as np


class DocumentOffsets(Protocol):
    """A shard: a part of its language's stream of tokens."""

    num_tokens: int

    @property
    def document_offsets(self) -> np.ndarray: ...


class RowDocuments:
    """The documents of the rows of some languages.

    Args:
        shards_of_languages: the shards of each language, in order.
    """

    def __init__(self, shards_of_languages: Sequence[Sequence[DocumentOffsets]]) -> None:
        self._shards = [shard for shards in shards_of_languages for shard in shards]
        # All streams one after the other. On this axis a position is one token of one shard.
        self._sizes = [shard.num_tokens for shard in self._shards]
        self._ends = np.cumsum(self._sizes, dtype=np.int64)
        self._begins = self._ends - self._sizes
        of_languages = [sum(shard.num_tokens for shard in shards) for shards in shards_of_languages]
        self._streams = np.cumsum([0, *of_languages], dtype=np.int64)
        self._document_starts = _DocumentStarts(self._shards)

    def lengths(self, language_index: np.ndarray, rows: np.ndarray, seq_len: int) -> np.ndarray:
        """Lengths of the parts of documents in row rows[i] of language language_index[i], for every i from 0 to n - 1.

        Returns:
            int64 [n, largest number of parts], padded with 0. Each row sums to `seq_len`: `<s>` belongs to the first part,
            `</s>` to the last.
        """
        firsts = self._streams[language_index] + rows * (seq_len - 2)
        shards = self._ends.searchsorted(firsts, "right")
        firsts -= self._begins[shards]
        # Plain Python, with bisect on the mapped offsets: numpy's calls cost more than a row has to search.
        lengths, sizes, inner = [], self._sizes, seq_len - 2
        for shard, first in zip(shards.tolist(), firsts.tolist(), strict=True):
            end = first + inner
            starts = self._document_starts[shard]
            # A document that starts at the row's first token ends no part.
            low = bisect_left(starts, first + 1)
            cuts = starts[low : bisect_left(starts, end, low)].tolist()
            if end > sizes[shard]:
                cuts += self._in_later_shards(shard, end)
            lengths.append(list(map(sub, [*cuts, end + 1], [first - 1, *cuts])))
        counts = np.fromiter(map(len, lengths), np.int64, len(lengths))
        out = np.zeros((len(lengths), counts.max(initial=0)), np.int64)
        out[np.arange(out.shape[1]) < counts[:, None]] = np.fromiter(
            chain.from_iterable(lengths), np.int64, counts.sum()
        )
        return out

    def _in_later_shards(self, shard: int, end: int) -> list[int]:
        """Where documents start behind `shard` and before `end`, both counted from the start of that shard."""
        cuts, size = [], self._sizes[shard]
        while size < end:
            shard += 1
            starts = self._document_starts[shard]
            cuts += [size + start for start in starts[: bisect_left(starts, end - size)].tolist()]
            size += self._sizes[shard]
        return cuts


class _DocumentStarts(dict[int, memoryview]):
    """The tokens of shard n at which a document starts, mapped when they are first read."""

    def __init__(self, shards: Sequence[DocumentOffsets]) -> None:
        self._shards = shards

    def __missing__(self, number: int) -> memoryview:
        starts = self[number] = self._shards[number].document_offsets[:-1].data
        return starts
