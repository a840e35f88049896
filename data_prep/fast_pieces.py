"""The pieces of a `tokenizer.json` (BPE, WordPiece, Unigram), and the files of a tokenizer with some of them.

In: the path of a `tokenizer.json` and the old ids to keep. Out: the same file with fewer pieces, and the files of its
directory that hold ids, each with the new ids.

Kept in any case: added tokens, the unknown token, single bytes (the alphabet of byte-level BPE, `<0x00>` to `<0xFF>` of byte
fallback), the ids that the rows, the padding and the model's config.json name, and of Unigram the piece of lowest score, from
which the score of an unknown character follows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.fast_tokenizer import opened
from data_prep.merge_table import MergeTable
from data_prep.sentencepiece_pieces import read_json_of_tokenizer, with_characters
from data_prep.shards import DataError
from data_prep.tokenizer_ids import CONFIG_NAME, FAST_TOKENIZER_NAME, POSITIONS_FROM_PADDING, TOKENIZER_CONFIG_NAME
from data_prep.word_boundaries import MARKER, kind_of, parts_of, steps_before_model

MOST_IDS = 1 << 24
KINDS = ("BPE", "WordPiece", "Unigram")
SPECIAL_MAP, ADDED_MAP = "special_tokens_map.json", "added_tokens.json"
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
LIST_ID, PAIR_ID = ("TemplateProcessing",), ("BertProcessing", "RobertaProcessing")  # how post-processors hold ids
PROCESSORS_WITHOUT_IDS = ("ByteLevel",)


class FastPieces:
    """The pieces of a tokenizer.json. `vocabulary.Pieces` describes the interface.

    Raises:
        DataError: the file is of another kind, gives an id twice, or its merges cannot be cut.
    """

    file = FAST_TOKENIZER_NAME

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tree = read_json_of_tokenizer(path)
        self._model: dict[str, Any] = self._tree.get("model", {})
        if not isinstance(self._model, dict) or not self._model:
            raise DataError(
                f"{path} has no `model`: it is not a tokenizer.json. Copy it again from the origin of the model."
            )
        self.kind = _checked_kind(self._model, path)
        ids = _ids_of(self._model.get("vocab"), path)
        fixed = [str(self._model.get("unk_token")), *(BYTE_PIECES if self._model.get("byte_fallback") else ())]
        # before the library reads the file: it ends the process with a trace for some wrong merges
        self._merges = MergeTable(self._model, fixed, str(path)) if self.kind == "BPE" else None
        self._library = opened(path.read_bytes(), path)
        self._added_tokens: list[dict[str, Any]] = self._tree.get("added_tokens") or []
        self._ids: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        self._added = {token.content: number for number, token in self._library.get_added_tokens_decoder().items()}
        self._check_ids({**ids, **{str(token["content"]): token["id"] for token in self._added_tokens}})
        self.texts = [""] * (max(self._ids.values()) + 1)
        for text, number in self._ids.items():
            self.texts[number] = text
        self.unknown_id = self._unknown_id()
        # A word that is unknown to WordPiece can be known to fewer pieces, as a shorter first piece may leave a known rest.
        self.unknown_may_change = self.kind == "WordPiece"
        special = self._special_ids()
        self._always = np.array(sorted(special | self._score_and_byte_ids()), dtype=np.int64)
        self.facts = {"kind": self.kind, "tokenizer_file": self.file, "special_ids": sorted(special)}

    def _check_ids(self, listed: dict[str, Any]) -> None:
        for text, number in listed.items():
            if self._ids.get(text) != number:
                raise DataError(
                    f"{self.path} gives {text!r} the id {number}; the tokenizers library gives it {self._ids.get(text)}, because "
                    "ids have a gap or an added token is also a piece. Such a file cannot be cut; use the full vocabulary."
                )

    def _unknown_id(self) -> int | None:
        if self.kind == "Unigram":
            return self._model.get("unk_id")
        return self._ids.get(self._model.get("unk_token") or "")

    def _special_ids(self) -> set[int]:
        """The ids of added tokens, and those that rows, padding, unknown text or the model's config name."""
        named = {*self._added.values(), *_ids_of_processors(self._tree.get("post_processor"), self.path)}
        if self.unknown_id is not None:
            named.add(self.unknown_id)
        if padding := self._tree.get("padding"):
            named.add(padding["pad_id"])
        # a model's config may name ids that its tokenizer does not have
        return {
            number for number in named | self._ids_of_config() if 0 <= number < len(self.texts) and self.texts[number]
        }

    def _score_and_byte_ids(self) -> set[int]:
        """The ids of the piece that sets the score of unknown characters, and of single bytes."""
        found = set()
        if self.kind == "Unigram":
            vocab = self._model["vocab"]
            found.add(min(range(len(vocab)), key=lambda number: vocab[number][1]))
        if self._model.get("byte_fallback"):
            found.update(self._ids[piece] for piece in BYTE_PIECES & self._ids.keys())
        if any(step.get("type") == "ByteLevel" for step in steps_before_model(self._tree)):  # text becomes bytes
            from tokenizers import pre_tokenizers

            found.update(self._ids[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in self._ids)
        return found

    def _ids_of_config(self) -> set[int]:
        config = read_json_of_tokenizer(self.path.with_name(CONFIG_NAME))
        settings = read_json_of_tokenizer(self.path.with_name(TOKENIZER_CONFIG_NAME))
        both = [*config.items(), *settings.items()]
        named = {number for key, value in both if _names_id(key) for number in _numbers(value)}
        padding = config.get("pad_token_id")
        if config.get("model_type") in POSITIONS_FROM_PADDING and type(padding) is int:
            named.update(
                range(min(padding, len(self.texts)))
            )  # so that padding keeps its id, from which such a model counts positions
        return named

    def with_parts(self, used: np.ndarray) -> np.ndarray:
        """`used`, the ids that are kept in any case, what these are made from, and the characters of `used`: bool."""
        kept = used.copy()
        if self._merges is None:
            marker = MARKER if self.kind == "Unigram" else self._model.get("continuing_subword_prefix", "##")
            kept = with_characters(self.texts, used, marker)
        kept[self._always] = True
        if self._merges is not None:
            texts = (self.texts[number] for number in np.flatnonzero(kept))
            made_by_merges = [text for text in texts if text in self._model["vocab"]]  # others are added to the model
            kept[[self._ids[text] for text in self._merges.parts(made_by_merges)]] = True
        return kept

    def lines(self, streams: list[list[int]]) -> list[str]:
        """The text of each list of ids."""
        return self._library.decode_batch(streams, skip_special_tokens=True)

    def write(self, kept: np.ndarray, directory: Path) -> None:
        """Write the kept part of `tokenizer.json` and of the files next to it that hold ids."""
        new = {self.texts[old]: number for number, old in enumerate(kept.tolist())}
        _write(directory / FAST_TOKENIZER_NAME, self._cut(kept, new))
        _write(directory / TOKENIZER_CONFIG_NAME, self._settings(new))
        if names := read_json_of_tokenizer(self.path.with_name(SPECIAL_MAP)):
            _write(directory / SPECIAL_MAP, names)
        if added := read_json_of_tokenizer(self.path.with_name(ADDED_MAP)):
            _write(directory / ADDED_MAP, {text: new[text] for text in added if text in new})
        cut = opened((directory / FAST_TOKENIZER_NAME).read_bytes(), directory / FAST_TOKENIZER_NAME)
        if cut.get_vocab(with_added_tokens=True) != new:
            raise DataError(
                f"{self.path}: the tokenizers library gives other ids to the kept pieces than in the order of the old ids, "
                "because an added token has a smaller id than a piece. Such a file cannot be cut; use the full vocabulary."
            )

    def _settings(self, new: dict[str, int]) -> dict[str, Any]:
        """The content of tokenizer_config.json with new ids."""
        path = self.path.with_name(TOKENIZER_CONFIG_NAME)
        settings = read_json_of_tokenizer(path)
        try:
            tokens = [(token["content"], token) for token in settings.get("added_tokens_decoder", {}).values()]
            by_id = {str(new[text]): token for text, token in tokens if text in new}
        except (AttributeError, KeyError, TypeError):
            raise DataError(
                f"{path}: `added_tokens_decoder` is not a table of tokens. Copy the file again from the origin of the model."
            ) from None
        if by_id:
            settings["added_tokens_decoder"] = by_id
        for key, value in settings.items():
            if _names_id(key) and type(value) is int and 0 <= value < len(self.texts) and self.texts[value]:
                settings[key] = new[self.texts[value]]
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        return settings

    def _cut(self, kept: np.ndarray, new: dict[str, int]) -> dict[str, Any]:
        model = dict(self._model)
        if isinstance(model["vocab"], list):
            model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
            if self.unknown_id is not None:
                model["unk_id"] = new[self.texts[self.unknown_id]]
        else:
            model["vocab"] = {text: number for text, number in new.items() if text in model["vocab"]}
        if self._merges is not None:
            model["merges"] = self._merges.among(model["vocab"].keys())
        tree = {**self._tree, "model": model}
        tree["added_tokens"] = [{**token, "id": new[token["content"]]} for token in self._added_tokens]
        tree["post_processor"] = _with_new_ids(tree.get("post_processor"), lambda old: new[self.texts[old]])
        if padding := tree.get("padding"):
            tree["padding"] = {**padding, "pad_id": new[self.texts[padding["pad_id"]]]}
        return tree


def _checked_kind(model: dict[str, Any], path: Path) -> str:
    """The type of the model. Raises `DataError` if its pieces cannot be dropped."""
    kind = kind_of(model)
    if kind not in KINDS:
        raise DataError(
            f"{path} is a tokenizer of kind {str(kind)[:40]}. Pieces can be dropped from {', '.join(KINDS)} only; use the full "
            "vocabulary of this model."
        )
    if kind == "BPE" and model.get("dropout"):
        raise DataError(
            f"{path} splits at random (`dropout` {model['dropout']}), so no text is split as before. Set it to null there."
        )
    return kind


def _ids_of(vocab: Any, path: Path) -> dict[str, int]:
    """The id of each piece of the model. Raises `DataError` for a vocabulary that is none."""
    try:
        ids = {piece: number for number, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        if not all(type(number) is int and 0 <= number < MOST_IDS for number in ids.values()):
            raise ValueError(f"an id is not a number from 0 to {MOST_IDS - 1}")
        if len(ids) < len(vocab):
            raise ValueError("it lists a piece twice")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path} has no valid vocabulary ({error}). Copy it again from the origin of the model."
        ) from None
    owners: dict[int, str] = {}
    for piece, number in ids.items():
        if number in owners:
            raise DataError(
                f"{path} gives the id {number} to {owners[number]!r} and to {piece!r}, so ids do not say which piece was meant. "
                "Copy it again from the origin of the model."
            )
        owners[number] = piece
    return ids


def _ids_of_processors(processor: Any, path: Path) -> Iterator[int]:
    """The ids that a post-processor puts around a text."""
    for part in parts_of(processor, "processors"):
        if part.get("type") in LIST_ID:
            for token in part["special_tokens"].values():
                yield from token["ids"]
        elif part.get("type") in PAIR_ID:
            yield from (part["sep"][1], part["cls"][1])
        elif part.get("type") not in PROCESSORS_WITHOUT_IDS:
            raise DataError(
                f"{path} has a post-processor of type {str(part.get('type'))[:40]}, whose ids cannot be mapped. Use the full vocabulary."
            )


def _with_new_ids(processor: Any, new: Any) -> Any:
    """A post-processor with every id mapped by `new`."""
    if not processor:
        return processor
    if processor.get("type") == "Sequence":
        return {**processor, "processors": [_with_new_ids(part, new) for part in processor["processors"]]}
    if processor.get("type") in LIST_ID:
        tokens = {
            key: {**token, "ids": [new(i) for i in token["ids"]]} for key, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    if processor.get("type") in PAIR_ID:
        return {**processor, **{key: [processor[key][0], new(processor[key][1])] for key in ("sep", "cls")}}
    return processor


def _names_id(key: str) -> bool:
    return key == "unk_id" or key.endswith("_token_id")


def _numbers(value: Any) -> list[int]:
    return [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        text = json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only hold as an escape
        text = json.dumps(content).encode()
    path.write_bytes(text + b"\n")
