"""The one file that decides over a model's token ids, and its hash, by which shards and smaller vocabularies know it.

In: a model's directory or hub name. Used before a run (assembly.py) and by the held-out evaluation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import cached_file

from data_prep.shards import ShardSet, tokenizer_file
from pipeline.errors import UserError

FETCHED = (  # from the hub: what decides over ids, and what AutoTokenizer reads beside it
    "tokenizer_config.json",
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def deciding_file(model: str | Path) -> Path:
    """`tokenizer_file` of a directory, or of what the hub has (fetched once, then cached)."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        try:
            found = [
                cached_file(
                    str(model),
                    name,
                    _raise_exceptions_for_missing_entries=False,
                    _raise_exceptions_for_connection_errors=False,  # offline, a file that the hub lacks looks like one not cached
                    trust_remote_code=False,
                )
                for name in FETCHED
            ]
        except Exception as error:  # whatever network, cache and hub come up with
            raise UserError(
                f"the tokenizer of {str(model)!r} cannot be loaded: {' '.join(str(error).split())[:300]} It is no directory "
                "here, and a hub name needs the network once (or `HF_HOME` with a filled cache)"
            ) from None
        if not any(found):
            raise UserError(
                f"the tokenizer of {str(model)!r} cannot be loaded: it is no directory here, and neither the hub nor the cache "
                "has it; a hub name needs the network once (or `HF_HOME` with a filled cache)"
            )
        directory = Path(next((str(file) for file in found if file), str(model))).parent
    return tokenizer_file(directory)


def compare_ids(model: str | Path, shards: ShardSet) -> tuple[str, list[str]]:
    """That the model's own tokenizer, as its users load it, gives the ids of the shards: what was looked at, and warnings."""
    return shards.compare_ids(deciding_file(model).parent)


def tokenizer_sha256(model: str | Path) -> str:
    """sha256 of the file that decides over the model's ids."""
    return hashlib.sha256(deciding_file(model).read_bytes()).hexdigest()
