"""A SentencePiece model in XLM-R's layout.

In: lines of UTF-8. Out: token ids, with the end token after every line. The ids are SentencePiece piece + 1, except `<s>` 0,
`<pad>` 1, `</s>` 2, `<unk>` 3, and `<mask>` as the last id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_prep.shard_layout import TOKEN_DTYPE
from data_prep.shards import BOS_ID, EOS_ID, UNK_ID, DataError
from data_prep.tokenizer_ids import SPM_CONTROL_PIECES, tokenizer_file

KNOWN_SENTENCEPIECE = "0.2.3"
SPM_UNK, SPM_BOS, SPM_EOS = 0, 1, 2
NEAR_TIE = 1e-3  # difference of log probabilities; the largest in 26 000 real lines was 3.5e-5


class SentencePieceTokenizer:
    """A SentencePiece model in XLM-R's layout."""

    library: Mapping[str, str] = {"sentencepiece": sentencepiece.__version__}
    special_ids: Mapping[str, int] = {}
    unk_id: int | None = UNK_ID
    unit = "line"
    engine = ""

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
