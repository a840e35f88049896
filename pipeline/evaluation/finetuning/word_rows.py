"""Tokenizes sentences of words for a model that predicts one tag per word: at the word's first piece.

In: words. Out: rows of token ids and, for each word, where its first piece is. The words are joined by blanks and
tokenized as one text, so that the pieces are those of running text with every kind of tokenizer; where
`is_split_into_words` puts a blank before every word (XLM-R, BERT), it gives the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.finetuning.batches import TEXTS_PER_CALL, TokenRows

NO_TARGET = -100  # of a token that is not the first piece of a word
MARKERS = ("▁", "Ġ")  # of a blank before a word, where they are pieces alone: of SentencePiece and byte-level BPE


@dataclass
class WordRows:
    """Sentences as rows. A sentence that is too long is cut between words into several rows.

    Attributes:
        rows: for the model; targets are the tags' numbers at first pieces and `NO_TARGET` elsewhere, padded to the longest row
        places: per sentence, the row and the token of each word's first piece, `[words, 2]`; -1 for a word without one
    """

    rows: TokenRows
    places: list[np.ndarray]

    @property
    def words_without_piece(self) -> int:
        return sum(int((places[:, 0] < 0).sum()) for places in self.places)


def word_rows(
    encoder: Encoder,
    sentences: Sequence[list[str]],
    targets: Sequence[list[int]],
    max_length: int,
    after_markers: bool = False,
) -> WordRows:
    """Tokenize the sentences.

    Args:
        targets: number of each word's tag
        max_length: tokens per row, special tokens included
        after_markers: where a word begins with a marker of its blank alone, the piece after it counts as its first one

    Raises:
        UserError: the tokenizer does not say which characters a piece is of
    """
    if not encoder.tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {encoder.name} does not give the characters of a token; tagging needs a fast tokenizer (a "
            "tokenizer.json)"
        )
    markers = [encoder.tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS] if after_markers else []
    unknown = encoder.tokenizer.unk_token_id
    markers = [marker for marker in markers if marker not in (None, unknown)]
    ids: list[np.ndarray] = []
    row_targets: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for start in range(0, len(sentences), TEXTS_PER_CALL):
        some = sentences[start : start + TEXTS_PER_CALL]
        encoded = encoder.tokenizer(
            [" ".join(words) for words in some],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,  # texts longer than the model are cut below
        )
        for number, (words, of_words) in enumerate(zip(some, targets[start : start + TEXTS_PER_CALL], strict=True)):
            of_piece, around = _pieces(words, encoded, number)
            pieces = np.array(encoded["input_ids"][number], dtype=np.int32)
            places.append(np.full((len(words), 2), -1))
            for chunk in _chunks(of_piece, max_length - around[0] - around[1]):
                before, after = pieces[: around[0]], pieces[len(pieces) - around[1] :]
                inside = pieces[around[0] :][chunk]
                row = np.full(around[0] + len(inside) + around[1], NO_TARGET)
                for word, piece in _first_pieces(of_piece[chunk], np.isin(inside, markers)):
                    places[-1][word] = len(ids), around[0] + piece
                    row[around[0] + piece] = of_words[word]
                ids.append(np.concatenate([before, inside, after]))
                row_targets.append(row)
    longest = max(map(len, ids))
    padded = np.full((len(ids), longest), NO_TARGET)
    for row_number, row in enumerate(row_targets):
        padded[row_number, : len(row)] = row
    return WordRows(TokenRows(ids, [], torch.from_numpy(padded)), places)


def _pieces(words: list[str], encoded: Any, number: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The word of every piece of one sentence; and how many special tokens are before and after the pieces.

    A piece is of the word in which its first character is; blanks between words are of the word after them.
    """
    special = encoded["special_tokens_mask"][number]
    before = next((place for place, is_special in enumerate(special) if not is_special), len(special))
    after = next((place for place, is_special in enumerate(reversed(special[before:])) if not is_special), 0)
    lengths = [len(word) + 1 for word in words]  # with the blank behind the word
    of_character = np.repeat(np.arange(len(words)), lengths)
    for blank in (np.cumsum(lengths)[:-1] - 1)[
        ::-1
    ]:  # from the end: the blank behind an empty word is of the next word too
        of_character[blank] = of_character[blank + 1]
    starts = [start for start, _ in encoded["offset_mapping"][number][before : len(special) - after]]
    return np.maximum.accumulate(of_character[np.array(starts, dtype=np.int64)]), (before, after)


def _chunks(of_piece: np.ndarray, space: int) -> list[slice]:
    """The pieces in parts of at most `space` that end between words; of a longer word the rest is left out."""
    chunks = []
    start = 0
    while start < len(of_piece):
        stop = start + space
        if stop < len(of_piece):
            within = np.flatnonzero(np.diff(of_piece[start : stop + 1]))
            if len(within) == 0:  # one word fills the row
                chunks.append(slice(start, stop))
                start += int(np.searchsorted(of_piece[start:], of_piece[start], side="right"))
                continue
            stop = start + int(within[-1]) + 1
        chunks.append(slice(start, min(stop, len(of_piece))))
        start = stop
    return chunks or [slice(0, 0)]


def _first_pieces(of_piece: np.ndarray, is_marker: np.ndarray) -> list[tuple[int, int]]:
    """(word, its first piece) of every word that has one. A marker counts only if no piece of its word is after it."""
    words, first = np.unique(of_piece, return_index=True)
    following = np.minimum(first + 1, len(of_piece) - 1)
    first = np.where(is_marker[first] & (of_piece[following] == words), following, first)
    return list(zip(words.tolist(), first.tolist(), strict=True))
