"""One block of text to token ids: documents are split into lines, cleaned, and encoded.

In: the bytes of a block. Out: ids, lengths of documents, and counts. `workers.py` calls this in many processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_prep.clean import CleanOptions, clean, split_documents
from data_prep.lines import oddities
from data_prep.tokenizer import Tokenizer


@dataclass
class Encoded:
    """The result for one block."""

    tokens: bytes  # little-endian uint32 ids
    document_lengths: np.ndarray  # tokens of each document: uint64
    counts: Mapping[str, int]


def encode_block(
    tokenizer: Tokenizer, text: bytes, language: str, options: CleanOptions, is_cut: bool = False
) -> Encoded:
    """Ids of every line, each followed by the end token. Lines and documents without a single piece are left out.

    `is_cut`: the first document of the block is a part of a document that is too long for one block.
    """
    lines, document_of_line = split_documents(text)
    num_read = len(lines)
    lines, document_of_line, counts = clean(lines, document_of_line, language, options, is_cut)
    counts.update(oddities(text))
    counts["lines_read"] += num_read
    ids, lengths = tokenizer.encode_lines(lines)
    assert len(lengths) == len(lines)
    if tokenizer.unk_id is not None:
        counts["unknown_tokens"] += int(np.count_nonzero(ids == tokenizer.unk_id))
    with_pieces = lengths > 1
    counts["lines"] += int(with_pieces.sum())
    if not with_pieces.all():
        counts["lines_without_pieces"] += int((~with_pieces).sum())
        ids = ids[np.repeat(with_pieces, lengths)]
        lengths, document_of_line = lengths[with_pieces], document_of_line[with_pieces]
    if not len(lengths):
        return Encoded(b"", np.empty(0, np.uint64), counts)
    starts = np.flatnonzero(np.diff(document_of_line, prepend=-1))
    return Encoded(ids.tobytes(), np.add.reduceat(lengths, starts).astype(np.uint64), counts)
