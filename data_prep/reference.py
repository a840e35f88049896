"""The tokenizer that a model's users get, `AutoTokenizer.from_pretrained(DIRECTORY)`: what ids in shards are compared with.

In: a tokenizer's file or directory. Out: ids of lines, and a fingerprint of the files that decide over them. The only module
of data_prep that imports transformers, and that only when a `Reference` is made: it takes seconds and brings torch.
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

from data_prep.shards import SENTENCEPIECE_NAMES, DataError
from data_prep.tokenizer_files import (
    CONFIG_NAME,
    FAST_TOKENIZER_NAME,
    OTHER_VOCABULARY_NAMES,
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
    """What the reference makes of one line."""

    begin: list[int]
    ids: list[int]
    end: list[int]


class Reference:
    """AutoTokenizer of one directory."""

    def __init__(self, directory: Path, name: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: a run may fork later
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # of lines longer than the model; shards are cut to rows later
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(directory), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # whatever a tokenizer's class raises over its files
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
        """Ids of every line, and what is put before and after it."""
        rows = []
        for ids, bare in zip(self._encode(lines), self._encode(lines, add_special_tokens=False), strict=True):
            before = len(ids) - len(bare)
            begin = next((n for n in range(before + 1) if ids[n : n + len(bare)] == bare), before)
            rows.append(RowOfIds(ids[:begin], bare, ids[begin + len(bare) :]))
        return rows

    def pieces(self, ids: list[int]) -> list[str]:
        return [str(piece) for piece in self._tokenizer.convert_ids_to_tokens(ids)]

    def _encode(self, lines: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        if not lines:
            return []
        return self._tokenizer(lines, add_special_tokens=add_special_tokens, padding=False, truncation=False)[
            "input_ids"
        ]


@contextmanager
def reference_of(given: Path, file: Path) -> Iterator[Reference]:
    """The reference of `--tokenizer given`, of which `file` is what prepare reads.

    A file that stands alone, or a directory that says nothing of its tokenizer's class, has no AutoTokenizer. A SentencePiece
    model is then taken to be XLM-R's, and compared with XLM-R's class; a tokenizer.json states all itself.
    """
    directory = directory_of(given, file)
    if directory is not None:
        yield Reference(directory, given)
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as alone:
        _lay_out(file, Path(alone))
        yield Reference(Path(alone), given)


def _lay_out(file: Path, directory: Path) -> None:
    """A directory of the file alone, under the names that tokenizers' classes look for, and of what says its class."""
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
    """Where AutoTokenizer finds `file` and its class; None where nothing names one."""
    directory = given if given.is_dir() else given.parent
    says_enough = named_architecture(directory) is not None or (directory / FAST_TOKENIZER_NAME).is_file()
    return directory if file.name in DECIDING_FILES and says_enough else None


def assumption(given: Path, file: Path) -> str | None:
    """What has to be taken for granted where nothing names the class of a SentencePiece model."""
    if file.suffix == ".json" or named_architecture(file.parent) is not None or directory_of(given, file) is not None:
        return None
    return (
        f"note: nothing beside {file} says whose tokenizer it is (no tokenizer_config.json or config.json): taken to be numbered "
        "as XLM-R's. A run compares it with its teacher's tokenizer."
    )


def describe_reference(given: Path, file: Path) -> dict[str, str]:
    """What ids were compared with, for the manifest: the same again means that the comparison need not be repeated."""
    libraries = {name: version(name) for name in ("transformers", "tokenizers")}
    return {**libraries, "sha256": fingerprint(directory_of(given, file), file)}


def fingerprint(directory: Path | None, file: Path) -> str:
    """sha256 over every file that AutoTokenizer may read, and over what it reads of the model's config."""
    digest = hashlib.sha256()
    files = [file] if directory is None else [directory / name for name in DECIDING_FILES]
    for path in files:
        if path.is_file():
            name = path.name if directory is not None else path.suffix
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    if directory is not None:
        digest.update(json.dumps(model_config(directory), sort_keys=True).encode())
    return digest.hexdigest()


def model_config(directory: Path) -> dict[str, Any]:
    """The keys of `config.json` that matter here; none where it cannot be read."""
    try:
        config = json.loads((directory / CONFIG_NAME).read_bytes())
        return {key: config[key] for key in DECIDING_CONFIG_KEYS if key in config}
    except (OSError, ValueError, TypeError):
        return {}


def _cannot_load(name: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    directory = name if name.is_dir() else name.parent
    return (
        f"{name}: AutoTokenizer.from_pretrained cannot load this tokenizer ({type(error).__name__}: {reason}), so nothing says "
        f"that ids in shards would be the model's. A file of the tokenizer is missing in {directory}, or "
        f"{TOKENIZER_CONFIG_NAME} or {CONFIG_NAME} names a class whose files are not there. Copy all files but the weights from "
        "where the model came from (from the Hub: hf download MODEL --include '*.json' '*.model' '*.txt' --local-dir DIR)."
    )
