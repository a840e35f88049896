"""Encoding text by its different words: each is encoded once, and its ids are copied to every place where the word occurs.

In: lines, and a function that encodes texts. Out: the ids of all lines. A word starts at a space (U+0020) or at the start of a
line and holds that space, so a line is exactly the concatenation of its words. Whether its ids are those of its words depends
on the tokenizer: `word_unit.py` and `fast_tokenizer.py` check that. pyarrow finds the different words; a Python dict of them
costs more time than it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LINE_END_TEXT = b"\n"
SPACE, LINE_END = b" "[0], LINE_END_TEXT[0]
# The rule of when words are encoded instead of lines, measured with SentencePiece on 0.4 and 1 MB of 35 languages. A different
# word costs as much as its bytes and 10 more, finding the words as much as 0.15 of all bytes.
BYTES_PER_WORD = 10
MOST_REMEMBERED = 1 << 17  # words; 14 MB in a process
MOST_REMEMBERED_IDS = 1 << 20  # 3 times the ids of so many words: an undivided line has hundreds
LARGEST_COST = 0.8  # of all bytes: the saving must be worth the search
LARGEST_MEAN_WORD = 25  # bytes; Chinese, Japanese and Thai text has 27 to 79, so the search itself is left out

# texts -> ids of all texts, each with one end token: uint32 [total], and the number of ids of each: int64 [texts]
Encode = Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Words:
    """The words of some lines, and the end of each line as a word of its own."""

    distinct: pa.Array  # the different words: binary
    index: np.ndarray  # for each word in order, its number in `distinct`: int32
    line_end: int  # the number of the line end in `distinct`
    num_bytes: int  # of the lines, with one byte per line end

    @property
    def are_worth_it(self) -> bool:
        """Whether encoding the words costs less than encoding the lines. Depends on the lines only."""
        distinct_bytes = pc.sum(pc.binary_length(self.distinct)).as_py()
        return distinct_bytes + BYTES_PER_WORD * len(self.distinct) <= LARGEST_COST * self.num_bytes


def words_of(lines: list[bytes], undivided: np.ndarray | None = None) -> Words:
    """The words of at least one line, none of which holds a line end.

    Args:
        undivided: whether each line is one word, spaces included: bool [lines].
    """
    text = np.frombuffer(b"\n".join(lines) + b"\n", np.uint8)
    is_end = text == LINE_END
    starts = text == SPACE
    if undivided is not None and undivided.any():
        starts &= ~np.repeat(undivided, np.diff(np.flatnonzero(is_end), prepend=-1))
    starts |= is_end
    starts[1:] |= is_end[:-1]
    starts[0] = True
    offsets = np.append(np.flatnonzero(starts), len(text))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    words = pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers).dictionary_encode()
    index = words.indices.to_numpy()
    return Words(words.dictionary, index, int(index[np.argmax(is_end[offsets[:-1]])]), len(text))


def have_short_words(lines: list[bytes]) -> bool:
    """Whether the lines have so many spaces that it is worth while to look at their words."""
    num_bytes = sum(map(len, lines)) + len(lines)
    return num_bytes <= LARGEST_MEAN_WORD * (sum(line.count(b" ") for line in lines) + len(lines)) and bool(lines)


class WordEncoder:
    """Encodes lines by their words, and remembers the ids of up to about `MOST_REMEMBERED` words, `MOST_REMEMBERED_IDS` in all.

    Args:
        encode: the encoder of one word, whose ids depend on nothing else.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._forget()

    def _forget(self) -> None:
        self._number_of: dict[bytes, int] = {}
        self._ids, self._starts, self._counts = np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64)

    def encode(self, words: Words) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the lines, each with one end token; the number of ids of each line: int64 [lines]."""
        texts = words.distinct.to_pylist()
        if len(self._number_of) > MOST_REMEMBERED or len(self._ids) > MOST_REMEMBERED_IDS:
            self._forget()
        if new := [text for text in texts if text not in self._number_of]:
            self._remember(new)
        numbers = np.fromiter(map(self._number_of.__getitem__, texts), np.int64, len(texts))[words.index]
        counts = self._counts[numbers]
        ends = np.cumsum(counts)
        positions = np.repeat(self._starts[numbers] - ends + counts, counts) + np.arange(ends[-1])
        return self._ids[positions], np.diff(ends[words.index == words.line_end], prepend=0)

    def _remember(self, texts: list[bytes]) -> None:
        ids, lengths = self._encode(texts)
        starts = np.cumsum(lengths) - lengths + len(self._ids)
        counts = lengths - 1  # without the end token
        if LINE_END_TEXT in texts:  # is its end token only
            number = texts.index(LINE_END_TEXT)
            starts[number] += counts[number]
            counts[number] = 1
        self._number_of |= zip(texts, range(len(self._counts), len(self._counts) + len(texts)), strict=True)
        self._ids = np.concatenate([self._ids, ids])
        self._starts, self._counts = np.append(self._starts, starts), np.append(self._counts, counts)
