"""The reference for ids in shards: `AutoTokenizer.from_pretrained(DIRECTORY)`, the tokenizer that users of the model load.

In: the file or directory of a tokenizer. Out: ids of lines, and a fingerprint of the files that decide over ids. This is the
only module of data_prep that imports transformers, and it does so only to make a `Reference`: the import costs seconds and
loads torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.file_hashes import sha256_of_file
from data_prep.json_files import read_optional_json_object
from data_prep.names import one_line
from data_prep.shards import DataError
from data_prep.tokenizer_ids import (
    CONFIG_NAME,
    FAST_TOKENIZER_NAME,
    OTHER_VOCABULARY_NAMES,
    SENTENCEPIECE_NAMES,
    TOKENIZER_CONFIG_NAME,
    named_architecture,
)

DECIDING_CONFIG_KEYS = ("model_type", "tokenizer_class", "pad_token_id")  # of the model's config.json
DECIDING_FILES = (
    FAST_TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    *SENTENCEPIECE_NAMES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    *OTHER_VOCABULARY_NAMES,
)
XLMR_CONFIG = {"tokenizer_class": "XLMRobertaTokenizer"}


@dataclass(frozen=True)
class RowOfIds:
    """The ids that the reference gives for one line, and the special tokens at both ends."""

    begin: list[int]
    ids: list[int]
    end: list[int]


class Reference:
    """AutoTokenizer of one directory.

    Args:
        directory: the directory that is loaded.
        name: what the user gave, for messages.

    Raises:
        DataError: AutoTokenizer cannot load it.
    """

    def __init__(self, directory: Path, name: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: a run may fork later
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # no warnings about lines longer than the model: rows are cut later
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(directory), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # whatever the class of a tokenizer raises
            raise DataError(_cannot_load(name, error)) from error
        self.class_name = type(self._tokenizer).__name__
        self.pad_id: int | None = self._tokenizer.pad_token_id
        added = self._tokenizer.added_tokens_decoder.values()
        self.special = {token.content for token in added if token.special} | set(self._tokenizer.all_special_tokens)
        self.added = {token.content for token in added} - self.special
        to_id: Any = self._tokenizer.convert_tokens_to_ids
        self.special_ids = {to_id(text) for text in self.special} - {self._tokenizer.unk_token_id}
        self.num_ids = len(self._tokenizer)

    def rows(self, lines: list[str]) -> list[RowOfIds]:
        """Ids of every line, and the ids that the tokenizer puts before and after them."""
        rows = []
        for ids, bare in zip(self._encode(lines), self._encode(lines, add_special_tokens=False), strict=True):
            before = len(ids) - len(bare)
            begin = next((n for n in range(before + 1) if ids[n : n + len(bare)] == bare), before)
            rows.append(RowOfIds(ids[:begin], bare, ids[begin + len(bare) :]))
        return rows

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each id."""
        return [str(piece) for piece in self._tokenizer.convert_ids_to_tokens(ids)]

    def _encode(self, lines: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        if not lines:
            return []
        return self._tokenizer(lines, add_special_tokens=add_special_tokens, padding=False, truncation=False)[
            "input_ids"
        ]


@contextmanager
def reference_of(given: Path, file: Path) -> Iterator[Reference]:
    """The reference for a tokenizer.

    A single file, or a directory that does not name the class of its tokenizer, has no AutoTokenizer. Then a SentencePiece model
    is assumed to be XLM-R's and compared with XLM-R's class. A tokenizer.json needs no class.

    Args:
        given: the value of `--tokenizer`.
        file: the file of it that prepare reads.
    """
    directory = directory_of(given, file)
    if directory is not None:
        yield Reference(directory, given)
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as alone:
        _link_into(file, Path(alone))
        yield Reference(Path(alone), given)


def _link_into(file: Path, directory: Path) -> None:
    """Link `file` into `directory` under the names that the classes of tokenizers look for, and link or write its configs."""
    names = [FAST_TOKENIZER_NAME] if file.suffix == ".json" else [*SENTENCEPIECE_NAMES, "spm.model"]
    for name in names:
        (directory / name).symlink_to(file.absolute())
    if named_architecture(file.parent) is not None:
        for name in (TOKENIZER_CONFIG_NAME, CONFIG_NAME):
            if (file.parent / name).is_file():
                (directory / name).symlink_to((file.parent / name).absolute())
    elif file.suffix != ".json":
        (directory / TOKENIZER_CONFIG_NAME).write_text(json.dumps(XLMR_CONFIG))


def directory_of(given: Path, file: Path) -> Path | None:
    """The directory from which AutoTokenizer can load `file`; None if nothing there names the class."""
    directory = given if given.is_dir() else given.parent
    says_enough = named_architecture(directory) is not None or (directory / FAST_TOKENIZER_NAME).is_file()
    return directory if file.name in DECIDING_FILES and says_enough else None


def assumption(given: Path, file: Path) -> str | None:
    """A note about the assumption that a SentencePiece model is XLM-R's; None if its directory names the class."""
    if file.suffix == ".json" or named_architecture(file.parent) is not None or directory_of(given, file) is not None:
        return None
    return (
        f"note: the directory of {file} does not name its class (no tokenizer_config.json or config.json). Its ids are assumed "
        "to be XLM-R's. A run compares it with its teacher's tokenizer."
    )


def describe_reference(given: Path, file: Path) -> dict[str, str]:
    """What the ids are compared with, for the manifest. While it stays equal, the comparison need not be repeated."""
    libraries = {name: version(name) for name in ("transformers", "tokenizers")}
    return {**libraries, "sha256": fingerprint(directory_of(given, file), file)}


def fingerprint(directory: Path | None, file: Path) -> str:
    """SHA-256 over every file that AutoTokenizer may read, and over the keys that it reads of the model's config."""
    digest = hashlib.sha256()
    files = [file] if directory is None else [directory / name for name in DECIDING_FILES]
    for path in files:
        if path.is_file():
            name = path.name if directory is not None else path.suffix
            digest.update(f"{name} {sha256_of_file(path)}\n".encode())
    if directory is not None:
        digest.update(json.dumps(model_config(directory), sort_keys=True).encode())
    return digest.hexdigest()


def model_config(directory: Path) -> dict[str, Any]:
    """The keys of `config.json` that decide over ids; none if it cannot be read."""
    config = read_optional_json_object(directory / CONFIG_NAME)
    return {key: config[key] for key in DECIDING_CONFIG_KEYS if key in config}


def _cannot_load(name: Path, error: Exception) -> str:
    reason, directory = one_line(error)[:200], name if name.is_dir() else name.parent
    return (
        f"{name}: AutoTokenizer.from_pretrained cannot load this tokenizer ({type(error).__name__}: {reason}), so the ids in "
        f"shards cannot be compared with the model's. A file of the tokenizer is missing in {directory}, or "
        f"{TOKENIZER_CONFIG_NAME} or {CONFIG_NAME} names a class whose files are missing. Copy all files except the weights from "
        "the origin of the model (from the Hub: hf download MODEL --include '*.json' '*.model' '*.txt' --local-dir DIR)."
    )
