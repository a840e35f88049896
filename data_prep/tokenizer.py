"""The two kinds of tokenizer for shards: a SentencePiece model in XLM-R's layout, and a tokenizer.json.

In: lines of UTF-8. Out: token ids, with the end token after every line. XLM-R's ids are SentencePiece piece + 1, except `<s>` 0,
`<pad>` 1, `</s>` 2, `<unk>` 3, and `<mask>` as the last id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from data_prep.shard_layout import TOKEN_DTYPE
from data_prep.shards import BOS_ID, EOS_ID, UNK_ID, DataError
from data_prep.tokenizer_ids import SPM_CONTROL_PIECES, tokenizer_file

KNOWN_SENTENCEPIECE = "0.2.3"
SPM_UNK, SPM_BOS, SPM_EOS = 0, 1, 2
NEAR_TIE = 1e-3  # difference of log probabilities; the largest in 26 000 real lines was 3.5e-5


class Tokenizer(Protocol):
    """The interface of both kinds."""

    path: Path
    sha256: str  # of the file
    num_pieces: int
    vocab_size: int
    library: Mapping[str, str]  # name and version of the encoding library: another version may split differently
    special_ids: Mapping[str, int]  # `bos`, `eos` and `unk`, if they are not XLM-R's
    unk_id: int | None

    def encode_lines(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all lines, each with its end token: uint32 [total]; and the number of ids of each line: int64 [lines]."""


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file or a Hugging Face directory. Raises `DataError` if there is none or it is not valid."""
    file = tokenizer_file(Path(path))
    return FastTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


def ids_of(tokenizer: Tokenizer, lines: list[str]) -> list[np.ndarray]:
    """The ids of each line without its end token: uint32."""
    ids, lengths = tokenizer.encode_lines([line.encode("utf-8", "replace") for line in lines])
    return [part[:-1] for part in np.split(ids, np.cumsum(lengths)[:-1])] if lines else []


class SentencePieceTokenizer:
    """A SentencePiece model in XLM-R's layout."""

    library: Mapping[str, str] = {"sentencepiece": sentencepiece.__version__}
    special_ids: Mapping[str, int] = {}
    unk_id: int | None = UNK_ID

    def __init__(self, path: str | Path) -> None:
        self.path = tokenizer_file(Path(path))
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            # from its bytes: the library accepts no path that is not UTF-8
            self.processor = sentencepiece.SentencePieceProcessor()
            self.processor.LoadFromSerializedProto(content)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path} is not a SentencePiece model ({error}). Give the .model file.") from error
        special = (self.processor.unk_id(), self.processor.bos_id(), self.processor.eos_id())
        if special != (SPM_UNK, SPM_BOS, SPM_EOS):
            raise DataError(
                f"{self.path} numbers <unk>, <s>, </s> as {special}; models like XLM-R have (0, 1, 2). "
                "Use the tokenizer of the teacher (its tokenizer.json, if it has another architecture)."
            )
        self.num_pieces: int = self.processor.get_piece_size()
        self.vocab_size = self.num_pieces + 2
        self._ids = np.arange(1, self.num_pieces + 1, dtype=TOKEN_DTYPE)
        self._ids[:SPM_CONTROL_PIECES] = UNK_ID, BOS_ID, EOS_ID

    def encode_lines(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        # joined buffers are faster than lists of integers; </s> ends every line and is never inside one
        pieces = np.frombuffer(b"".join(self._id_buffers(lines)), np.int32)
        return self._ids.take(pieces), np.diff(np.flatnonzero(pieces == SPM_EOS), prepend=-1)

    def are_near_tie(self, ids: list[int], other: list[int]) -> bool:
        """Whether these are two splits of one text whose scores differ only by rounding, so that either may be the best."""
        texts, scores = [], []
        for one in (ids, other):
            if any(not SPM_EOS < number - 1 < self.num_pieces and number != UNK_ID for number in one):
                return False
            pieces = [SPM_UNK if number == UNK_ID else number - 1 for number in one]
            texts.append("".join(map(self.processor.id_to_piece, pieces)))
            scores.append(sum(map(self.processor.get_score, pieces)))
        same_unknown = ids.count(UNK_ID) == other.count(UNK_ID)
        return texts[0] == texts[1] and same_unknown and abs(scores[0] - scores[1]) < NEAR_TIE

    def _id_buffers(self, lines: list[bytes]) -> Sequence[Any]:
        """The int32 ids of every line with its `</s>`, as buffers.

        The private call is what the library makes for return_type="numpy", without one array object per line, which on short
        lines saves a fifth of the time. It is used only in the version in which it was read.
        """
        if sentencepiece.__version__ == KNOWN_SENTENCEPIECE:
            inner: Any = self.processor
            return inner._processor._EncodeAsBufferBatch(lines, 1, None, False, -1, 0.1, False, True, False)
        return self.processor.encode(lines, return_type="numpy", add_eos=True, num_threads=1)


class FastTokenizer:
    """A `tokenizer.json` (WordPiece, byte-level BPE, ...) whose rows are one begin token, text, one end token."""

    def __init__(self, path: str | Path) -> None:
        # Each tokenising process has one thread. The library is imported here because only this kind needs it.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import tokenizers

        self.path = Path(path)
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.library: Mapping[str, str] = {"tokenizers": tokenizers.__version__}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception for files that it cannot read
            raise DataError(
                f"{self.path} is not a valid tokenizer.json ({error}). Copy it again from the origin of the model."
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        begin, self._end = self._row_ends()
        self.special_ids: Mapping[str, int] = {"bos": begin, "eos": self._end}
        # A literal "</s>" in web text is text. Some models also have it as a piece: its id is left out.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.num_pieces = self._tokenizer.get_vocab_size(with_added_tokens=False)
        # Ids may have gaps, so the largest id decides.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._is_text = np.ones(self.vocab_size, dtype=bool)
        self._is_text[[number for number, token in added.items() if token.special]] = False
        self.unk_id: int | None = self._unknown_id(content)
        if self.unk_id is not None and not self._is_text[self.unk_id]:
            # An unknown word is part of the text, like XLM-R's <unk>. The manifest names the id, because earlier versions left
            # it out: such shards are not continued.
            self._is_text[self.unk_id] = True
            self.special_ids = {**self.special_ids, "unk": self.unk_id}

    def _row_ends(self) -> tuple[int, int]:
        """The ids of the tokens before and after a text."""
        around_nothing = self._tokenizer.encode("").ids
        if len(around_nothing) != 2:
            raise DataError(
                f"{self.path} puts {len(around_nothing)} special tokens around a text; an encoder's puts two, one at "
                "each end ([CLS] and [SEP], or <s> and </s>). Give the tokenizer of an encoder."
            )
        begin, end = around_nothing
        around_text = self._tokenizer.encode("x").ids
        if (around_text[0], around_text[-1]) != (begin, end) or len(around_text) < 3:
            raise DataError(
                f"{self.path} does not put one special token at each end of a text ({around_text} is its row for 'x'; "
                "mBART and XLNet put both at the end). Give the tokenizer of an encoder ([CLS] and [SEP], or <s> and </s>)."
            )
        return begin, end

    def _unknown_id(self, content: bytes) -> int | None:
        """The id of unknown words. WordPiece and BPE name the token, Unigram gives the id; None if there is none."""
        model = json.loads(content)["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return self._tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None

    def encode_lines(self, lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        texts = [line.decode("utf-8", "replace") for line in lines]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        per_line = [np.array(encoding.ids, dtype=TOKEN_DTYPE) for encoding in encodings]
        flat = np.concatenate([np.empty(0, TOKEN_DTYPE), *per_line])
        line_of = np.repeat(np.arange(len(per_line)), [len(ids) for ids in per_line])
        spelled = self._is_text[flat]
        counts = np.bincount(line_of[spelled], minlength=len(per_line))
        return np.insert(flat[spelled], np.cumsum(counts), self._end).astype(TOKEN_DTYPE), counts + 1
