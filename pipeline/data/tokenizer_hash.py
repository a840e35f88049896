"""The file that determines a model's token ids, and its hash, which shards and smaller vocabularies record.

In: a model's directory or hub name. Out: the file, its sha256, or a comparison of the model's ids with those of shards.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from data_prep.shards import ShardSet
from data_prep.tokenizer_ids import SENTENCEPIECE_NAMES, tokenizer_file
from pipeline.errors import UserError

# Of a hub name: the files that AutoTokenizer reads. The first one that exists determines the commit.
FETCHED = (
    "config.json",
    "tokenizer_config.json",
    *SENTENCEPIECE_NAMES,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def deciding_file(model: str | Path) -> Path:
    """`tokenizer_file` of a model's directory."""
    return tokenizer_file(tokenizer_directory(model))


def tokenizer_directory(model: str | Path) -> Path:
    """The directory, or one commit of a hub name in the cache, fetched once. Raises `UserError` if it is not found."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    more: dict[str, Any] = {"trust_remote_code": False, "_raise_exceptions_for_missing_entries": False}
    # Offline, a file that the hub does not have looks like one that is not cached.
    more["_raise_exceptions_for_connection_errors"] = False
    found = []
    try:
        for name in FETCHED:
            if file := cached_file(str(model), name, **more):
                found.append(Path(file).parent)
                if found[0].parent.name == "snapshots":
                    more["revision"] = found[0].name
    except Exception as error:  # network, cache and hub raise many kinds
        raise _no_tokenizer(model, " ".join(str(error).split())[:300]) from None
    if not found:
        raise _no_tokenizer(model, "neither the hub nor the cache has it.")
    return found[0]


def _no_tokenizer(model: str | Path, cause: str) -> UserError:
    return UserError(
        f"the tokenizer of {str(model)!r} cannot be loaded: {cause} There is no such directory, and a hub name needs the network "
        "once (or `HF_HOME` with a filled cache)"
    )


def compare_ids(model: str | Path, shards: ShardSet) -> tuple[str, list[str]]:
    """Compare the ids of the model's tokenizer, as its users load it, with those of the shards.

    Returns what was compared, and warnings. Raises `DataError` if the ids differ.
    """
    return shards.compare_ids(deciding_file(model).parent)


def tokenizer_sha256(model: str | Path) -> str:
    """sha256 of the file that determines the model's ids."""
    return hashlib.sha256(deciding_file(model).read_bytes()).hexdigest()
