"""A smaller vocabulary: which SentencePiece pieces a set of shards uses, and the tokenizer that has only those.

In: shards, an XLM-R style tokenizer directory. Out: old ids that are kept, in order (a new id is a position in that
list), and the tokenizer files of the smaller vocabulary. Used by trim.py.

Why ids map one to one: a unigram tokenizer takes the best-scoring split of a text into pieces. Removing pieces that the
best split does not use leaves it the best one, so text whose pieces are all kept is split as before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2
from transformers import XLMRobertaTokenizer

from data_prep.shards import ShardSet
from pipeline.errors import UserError

protobuf: Any = sentencepiece_model_pb2  # generated code without types
MODEL_FILE = "sentencepiece.bpe.model"
NUM_LEADING_SPECIALS = 4  # <s> <pad> </s> <unk>; the last id is <mask>
NUM_MODEL_SPECIALS = 3  # SentencePiece's own <unk> <s> </s>; a piece's id here is its id there plus one
WORD_START = "▁"


def count_ids(shards: ShardSet, languages: list[str]) -> dict[str, np.ndarray]:
    """How often each id occurs, per language."""
    counts = {}
    for language in languages:
        total = np.zeros(shards.vocab_size, dtype=np.int64)
        for shard in shards.shards(language):
            for start in range(0, len(shard.tokens), 1 << 24):
                total += np.bincount(shard.tokens[start : start + (1 << 24)], minlength=len(total))
        counts[language] = total
    return counts


def kept_ids(counts: dict[str, np.ndarray], languages: list[str], min_count: int, pieces: list[str]) -> np.ndarray:
    """Old ids to keep, ascending: the specials, every piece that `languages` use at least `min_count` times, and the
    single characters of these pieces, so that no text in known characters becomes unknown."""
    used = np.sum([counts[language] for language in languages], axis=0) >= min_count
    used[:NUM_LEADING_SPECIALS] = used[-1] = True
    characters = {character for piece, is_used in zip(pieces, used, strict=True) if is_used for character in piece}
    single = np.array([len(piece.lstrip(WORD_START)) <= 1 for piece in pieces])
    known = np.array([set(piece) <= characters for piece in pieces])
    return np.flatnonzero(used | (single & known))


def read_model(directory: Path) -> Any:
    """The SentencePiece model of a tokenizer directory."""
    path = directory / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{directory} has no {MODEL_FILE}; only XLM-R's kind of vocabulary can be trimmed here.")
    model = protobuf.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


def pieces_by_id(model: Any) -> list[str]:
    """The text of every id, `<s>` to `<mask>`; specials have none."""
    pieces = [piece.piece for piece in model.pieces[NUM_MODEL_SPECIALS:]]
    return [""] * NUM_LEADING_SPECIALS + pieces + [""]


def write_trimmed_tokenizer(source: Path, kept: np.ndarray, directory: Path) -> None:
    """SentencePiece model, fast tokenizer and settings with the kept ids alone."""
    model = read_model(source)
    inner = kept[(kept >= NUM_LEADING_SPECIALS) & (kept <= len(model.pieces))] - 1
    pieces = [model.pieces[i] for i in [*range(NUM_MODEL_SPECIALS), *inner.tolist()]]
    trimmed = protobuf.ModelProto()
    trimmed.CopyFrom(model)
    del trimmed.pieces[:]
    trimmed.pieces.extend(pieces)
    trimmed.trainer_spec.vocab_size = len(pieces)
    (directory / MODEL_FILE).write_bytes(trimmed.SerializeToString(deterministic=True))
    settings_file = source / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    length = settings.get("model_max_length", 512)
    XLMRobertaTokenizer.from_pretrained(directory, model_max_length=length).save_pretrained(directory)
    short = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": length}
    (directory / "tokenizer_config.json").write_text(json.dumps(short, indent=2) + "\n", encoding="utf-8")


def coverage(counts: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, float]:
    """Share of each language's tokens whose piece is kept."""
    return {language: float(total[kept].sum() / max(total.sum(), 1)) for language, total in counts.items()}
