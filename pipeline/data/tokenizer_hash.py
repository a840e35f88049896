"""The one file that decides over a model's token ids, and its hash, by which shards and smaller vocabularies know it.

In: a model's directory or hub name. Used before a run (assembly.py) and by the held-out evaluation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from data_prep.shards import ShardSet
from data_prep.tokenizer_ids import SENTENCEPIECE_NAMES, tokenizer_file
from pipeline.errors import UserError

# Of a hub name: what decides over ids, and what AutoTokenizer reads beside it. The first one says which commit it is.
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
    """A directory itself; of a hub name one commit's files in the cache, fetched once. Raises `UserError`."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    more: dict[str, Any] = {"trust_remote_code": False, "_raise_exceptions_for_missing_entries": False}
    # Offline, a file that the hub lacks looks like one that is not cached.
    more["_raise_exceptions_for_connection_errors"] = False
    found = []
    try:
        for name in FETCHED:
            if file := cached_file(str(model), name, **more):
                found.append(Path(file).parent)
                if found[0].parent.name == "snapshots":
                    more["revision"] = found[0].name
    except Exception as error:  # whatever network, cache and hub come up with
        raise _no_tokenizer(model, " ".join(str(error).split())[:300]) from None
    if not found:
        raise _no_tokenizer(model, "neither the hub nor the cache has it.")
    return found[0]


def _no_tokenizer(model: str | Path, cause: str) -> UserError:
    return UserError(
        f"the tokenizer of {str(model)!r} cannot be loaded: {cause} It is no directory here, and a hub name needs the network "
        "once (or `HF_HOME` with a filled cache)"
    )


def compare_ids(model: str | Path, shards: ShardSet) -> tuple[str, list[str]]:
    """That the model's own tokenizer, as its users load it, gives the ids of the shards: what was looked at, and warnings."""
    return shards.compare_ids(deciding_file(model).parent)


def tokenizer_sha256(model: str | Path) -> str:
    """sha256 of the file that decides over the model's ids."""
    return hashlib.sha256(deciding_file(model).read_bytes()).hexdigest()
