"""The pieces of a SentencePiece model in XLM-R's layout, and the files of a tokenizer with some of them.

In: a `SentencePieceTokenizer` and the old ids to keep. Out: the SentencePiece model and what `AutoTokenizer` loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from data_prep.json_files import read_json_object
from data_prep.shards import DataError, UnreadableError
from data_prep.tokenizer import SentencePieceTokenizer
from data_prep.tokenizer_ids import (
    FAST_TOKENIZER_NAME,
    SENTENCEPIECE_NAMES,
    SPM_CONTROL_PIECES,
    TOKENIZER_CONFIG_NAME,
    save_command,
)
from data_prep.word_boundaries import MARKER

protobuf: Any = sentencepiece_model_pb2  # generated code without types
MODEL_FILE = SENTENCEPIECE_NAMES[0]
NUM_LEADING_SPECIALS = 4  # <s> <pad> </s> <unk>; the last id is <mask>
DEFAULT_MAX_LENGTH = 512


class SentencePiecePieces:
    """The pieces of a SentencePiece model. `vocabulary.Pieces` describes the interface."""

    file = MODEL_FILE
    unknown_may_change = False

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self.tokenizer = tokenizer
        self.facts: dict[str, Any] = {}  # none: earlier versions read such a vocabulary
        self._model = protobuf.ModelProto()
        self._model.ParseFromString(tokenizer.path.read_bytes())
        if self._model.trainer_spec.model_type != protobuf.TrainerSpec.UNIGRAM:
            raise DataError(
                f"{tokenizer.path} is not a unigram model. Other kinds are cut by their tokenizer.json. Make one, once: "
                f"{save_command(tokenizer.path.parent, tokenizer.path.name)} and run the same command again."
            )
        inner = [piece.piece for piece in self._model.pieces[SPM_CONTROL_PIECES:]]
        self.texts = [""] * NUM_LEADING_SPECIALS + inner + [""]
        # `<unk>` scores 10 below the lowest piece, and pieces of the user depend on the highest: both scores must stay.
        normal = sorted((piece.score, n) for n, piece in enumerate(self._model.pieces) if piece.type == piece.NORMAL)
        named = [n for n, piece in enumerate(self._model.pieces) if piece.type == piece.USER_DEFINED]
        ends = [n + 1 for n in [*named, *(n for _, n in normal[:1] + normal[-1:])]]
        self._always = np.array([*range(NUM_LEADING_SPECIALS), *ends, len(self.texts) - 1])

    def with_parts(self, used: np.ndarray) -> np.ndarray:
        """`used`, its single characters, and the ids that are kept in any case: bool."""
        kept = with_characters(self.texts, used, MARKER)
        kept[self._always] = True
        return kept

    def lines(self, streams: list[list[int]]) -> list[str]:
        """The text of each list of ids."""
        processor = self.tokenizer.processor
        return processor.decode([[number - 1 for number in ids if number >= NUM_LEADING_SPECIALS] for ids in streams])

    def write(self, kept: np.ndarray, directory: Path) -> None:
        """Write the SentencePiece model, its config, and a `tokenizer.json` if the source has one, with the kept ids only."""
        inner = kept[(kept >= NUM_LEADING_SPECIALS) & (kept <= len(self._model.pieces))] - 1
        kept_pieces = [self._model.pieces[i] for i in [*range(SPM_CONTROL_PIECES), *inner.tolist()]]
        trimmed = protobuf.ModelProto()
        trimmed.CopyFrom(self._model)
        del trimmed.pieces[:]
        trimmed.pieces.extend(kept_pieces)
        trimmed.trainer_spec.vocab_size = len(kept_pieces)
        (directory / MODEL_FILE).write_bytes(trimmed.SerializeToString(deterministic=True))
        settings = read_json_of_tokenizer(self.tokenizer.path.with_name(TOKENIZER_CONFIG_NAME))
        short = {
            "tokenizer_class": "XLMRobertaTokenizer",
            "model_max_length": settings.get("model_max_length", DEFAULT_MAX_LENGTH),
        }
        (directory / TOKENIZER_CONFIG_NAME).write_text(json.dumps(short, indent=2) + "\n", encoding="utf-8")
        fast = self.tokenizer.path.with_name(FAST_TOKENIZER_NAME)
        if tree := read_json_of_tokenizer(fast):
            cut = cut_fast_tokenizer(tree, self.texts, kept, fast)
            (directory / fast.name).write_text(json.dumps(cut, ensure_ascii=False), encoding="utf-8")


def with_characters(texts: list[str], used: np.ndarray, marker: str) -> np.ndarray:
    """`used`, and the pieces of one character, with or without the marker before it, that the used pieces consist of: bool."""
    characters = {character for text, is_used in zip(texts, used, strict=True) if is_used for character in text}
    single = np.array([len(text) > 0 and len(text.removeprefix(marker)) <= 1 for text in texts])
    known = np.array([set(text) <= characters for text in texts])
    return used | (single & known)


def cut_fast_tokenizer(tree: dict[str, Any], texts: list[str], kept: np.ndarray, path: Path) -> dict[str, Any]:
    """The content of a `tokenizer.json` with the kept ids only. Raises `DataError` if it is not the model's vocabulary."""
    try:
        vocab, added = tree["model"]["vocab"], tree["added_tokens"]
        inner = slice(NUM_LEADING_SPECIALS, len(texts) - 1)
        same = [piece for piece, _ in vocab][inner] == texts[inner] and len(vocab) == len(texts)
    except (KeyError, TypeError, ValueError):
        same = False
    if not same or any(token["id"] >= len(texts) for token in added):
        raise DataError(
            f"{path} does not have the vocabulary of the SentencePiece model in its directory. Move it out of the directory "
            "(transformers makes it again from the model) and run the same command."
        )
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    return {
        **tree,
        "model": {**tree["model"], "vocab": [vocab[i] for i in kept]},
        "added_tokens": [{**token, "id": new_id[token["id"]]} for token in added if token["id"] in new_id],
    }


def read_json_of_tokenizer(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the tokenizer; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except UnreadableError:
        raise
    except ValueError as error:
        raise DataError(
            f"{path} is not a JSON object ({error}). Copy it again from the origin of the tokenizer."
        ) from error
