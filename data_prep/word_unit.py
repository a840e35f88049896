"""A SentencePiece model whose unit is the word: the words of a line are encoded one by one.

In: lines of UTF-8. Out: ids, with the end token after every line. The best split of a line is that of its words, so the ids
are those of the unit `line`, except where two splits have scores that differ by rounding only. Each different word of a block is
encoded once. Blocks with too many different words for that to be faster are encoded line by line, by a rule that depends on
their text only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.awkward import LINES
from data_prep.sentencepiece_tokenizer import SentencePieceTokenizer
from data_prep.shards import DataError
from data_prep.word_boundaries import why_not_sentencepiece
from data_prep.words import WordEncoder, have_short_words, words_of


class WordUnitTokenizer(SentencePieceTokenizer):
    """Raises `DataError` if the best split of a line need not be that of its words."""

    unit = "word"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._words = WordEncoder(super().encode_lines)
        reason = why_not_sentencepiece(self.path.read_bytes()) or self._differing_line()
        if reason is not None:
            raise DataError(f"--unit word cannot be used with {self.path}: {reason}. Use --unit line, the default.")

    def encode_lines(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if have_short_words(lines) and (words := words_of(lines)).are_worth_it:
            return self._words.encode(words)
        return super().encode_lines(lines)

    def encode_by_words(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids by way of the words, even if that is slower."""
        return self._words.encode(words_of(lines))

    def _differing_line(self) -> str | None:
        """The proof, tried on lines that are difficult."""
        lines = [line.encode() for line in LINES]
        by_words, by_line = self.encode_by_words(lines), super().encode_lines(lines)
        parts = [np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (by_words, by_line)]
        for line, ours, theirs in zip(LINES, *parts, strict=True):
            one, other = ours[:-1].tolist(), theirs[:-1].tolist()
            if one != other and not self.are_near_tie(one, other):
                return f"the words of {line!r} have other ids than the line"
        return None
