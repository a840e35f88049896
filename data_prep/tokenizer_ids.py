"""Whether a SentencePiece model, read in XLM-R's layout, and a tokenizer.json give the same pieces the same ids.

In: the two files of one directory. Out: a verdict. Used by `tokenizer_file` in shards.py where a directory holds both and
does not say whose they are: CamemBERT's files are called as XLM-R's are, and its pieces stand three ids further on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

SPM_CONTROL_PIECES = 3  # <unk>, <s>, </s> come first in the model; every piece after them is its place + 1


def numbered_alike(model: Path, fast: Path, special_ids: Mapping[str, int]) -> bool:
    """Every piece of `model`, and each of XLM-R's special ones, has the id in `fast` that XLM-R would give it. Not
    where either cannot be read."""
    import sentencepiece  # training reads shards, and opens no tokenizer

    try:
        ids = fast_ids(fast)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return False
    if any(ids.get(piece) != number for piece, number in special_ids.items()):
        return False
    numbers = range(SPM_CONTROL_PIECES, pieces.get_piece_size())
    return all(ids.get(pieces.id_to_piece(number)) == number + 1 for number in numbers)


def adds_words(fast: Path) -> bool:
    """Whether a tokenizer.json has words of its own beside the model's pieces (a model fine-tuned with added tokens)."""
    try:
        status = fast.stat()
        return _adds_words(fast, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@lru_cache(maxsize=8)
def _adds_words(fast: Path, mtime_ns: int, size: int) -> bool:
    """Remembered, as a run asks several times and XLM-R's file of 17 MB takes .3 s to parse."""
    return any(not token["special"] for token in json.loads(fast.read_bytes())["added_tokens"])


def fast_ids(fast: Path) -> dict[str, int]:
    """Piece to id, as a tokenizer.json has it: a list in order (unigram) or a table (WordPiece, BPE)."""
    content = json.loads(fast.read_bytes())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content["added_tokens"]}}
