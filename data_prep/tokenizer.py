"""The two kinds of tokenizer for shards: a SentencePiece model in XLM-R's layout, and a tokenizer.json.

In: the path of a tokenizer. Out: an object that turns lines of UTF-8 into token ids, with the end token after every line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.fast_tokenizer import FastTokenizer
from data_prep.sentencepiece_tokenizer import SentencePieceTokenizer
from data_prep.shards import DataError
from data_prep.tokenizer_ids import tokenizer_file


class Tokenizer(Protocol):
    """The interface of both kinds."""

    path: Path
    sha256: str  # of the file
    num_pieces: int
    vocab_size: int
    library: Mapping[str, str]  # name and version of the encoding library: another version may split differently
    special_ids: Mapping[str, int]  # `bos`, `eos` and `unk`, if they are not XLM-R's
    unk_id: int | None
    unit: str  # what is encoded at a time, of `UNITS`

    @property
    def engine(self) -> str:
        """Name and version of what makes the ids in place of the library, with the same ids; empty for the library."""

    def encode_lines(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all lines, each with its end token: uint32 [total]; and the number of ids of each line: int64 [lines]."""


def open_tokenizer(path: str | Path, unit: str = "line", engine: str | None = None) -> Tokenizer:
    """The tokenizer of a file or a Hugging Face directory.

    Args:
        path: the file or the directory.
        unit: what is encoded at a time, of `UNITS`. `word` is for SentencePiece models.
        engine: what encodes for a tokenizer.json, of `ENGINES`; None: `tokenizers`, and SentencePiece for its models.

    Raises:
        DataError: there is no tokenizer, it is not valid, or it cannot be used with this unit or engine.
    """
    file = tokenizer_file(Path(path))
    if file.suffix != ".json" and engine not in (None, "auto"):
        raise DataError(
            f"--engine {engine} is for a tokenizer.json, and SentencePiece encodes for {file}. Leave the option out."
        )
    if unit == "word":
        from data_prep.word_unit import WordUnitTokenizer  # imports pyarrow, which the unit `line` does not need

        if file.suffix == ".json":
            raise DataError(
                f"--unit word is for SentencePiece models, and {file} decides the ids of {path}. Leave the option out: the "
                "words of a tokenizer.json are encoded one by one where that gives the ids of the line."
            )
        return WordUnitTokenizer(file)
    return FastTokenizer(file, engine or "tokenizers") if file.suffix == ".json" else SentencePieceTokenizer(file)


def ids_of(tokenizer: Tokenizer, lines: list[str]) -> list[np.ndarray]:
    """The ids of each line without its end token: uint32."""
    ids, lengths = tokenizer.encode_lines([line.encode("utf-8", "replace") for line in lines])
    return [part[:-1] for part in np.split(ids, np.cumsum(lengths)[:-1])] if lines else []
