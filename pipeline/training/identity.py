"""Hashes of a run's teacher, tokenizer and vocabulary: another path or date is no change, other content is.

In: a model's directory or hub name. Out: a flat dictionary of hashes for state.json, run.json and lineage.json, and the
differences between two of them. Weights are hashed tensor by tensor under their names in the encoder, so that heads, the
split into files and metadata make no difference.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from data_prep.file_hashes import sha256_of_file
from data_prep.tokenizer_ids import FAST_TOKENIZER_NAME, SENTENCEPIECE_NAMES
from pipeline.data.tokenizer_hash import deciding_file
from pipeline.distillation.models.model_files import ModelFiles, Tensor, read_model
from pipeline.distillation.models.vocabulary import MAP_FILE, read_vocabulary
from pipeline.errors import UserError
from pipeline.provenance import START_CONFIG, START_WEIGHTS

Identity = dict[str, str]
WEIGHTS, CONFIG, TOKENIZER, VOCABULARY = "teacher weights", "teacher config", "tokenizer", "vocabulary"
IDS_IN = (*SENTENCEPIECE_NAMES, FAST_TOKENIZER_NAME, "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")
BLOCK_BYTES = 4 << 20
# Keys of a config.json about its origin, storage precision and head: they do not change what the encoder computes.
NOT_COMPUTED = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
)


def identity_of(teacher: str, vocabulary: str | None = None) -> Identity:
    """Hashes of everything that must stay the same over all attempts of a run."""
    files = read_model(teacher)
    identity = {WEIGHTS: weights_hash(files), CONFIG: config_hash(files.config)}
    if vocabulary is not None:
        identity[VOCABULARY] = sha256_of_file(read_vocabulary(vocabulary).directory / MAP_FILE)
    return {**identity, **tokenizer_identity(vocabulary or teacher)}


def start_identity(files: ModelFiles) -> Identity:
    """Hashes of the encoder that a student starts from. Each student of a run has its own."""
    return {START_WEIGHTS: weights_hash(files), START_CONFIG: config_hash(files.config)}


def tokenizer_identity(name: str) -> Identity:
    """Hashes of the files that decide a tokenizer's ids."""
    decides = deciding_file(name)
    names = {decides.name, *IDS_IN} if Path(name).expanduser().is_dir() else {decides.name}
    present = sorted(file for file in names if (decides.parent / file).is_file())
    return {f"{TOKENIZER} {file}": sha256_of_file(decides.parent / file) for file in present}


def weights_hash(files: ModelFiles) -> str:
    """xxh3-128 over the encoder's tensors in the order of their names: name, dtype, shape, bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(files.encoder_tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        _add_bytes(digest, tensor)
    return digest.hexdigest()


def _add_bytes(digest: Any, tensor: Tensor) -> None:
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            digest.update(block)
            left -= len(block)


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of the keys of a config.json that change what the model computes."""
    content = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The entries of `then` that are different or missing in `now`. Entries that are only in `now` are no change."""
    return [
        f"{name}: {hash_then[:12]} -> {now[name][:12] if name in now else 'missing'}"
        for name, hash_then in sorted(then.items())
        if now.get(name) != hash_then
    ]


def warn_of_other_teacher(then: Mapping[str, str], teacher: str) -> None:
    """Print a warning if `teacher` now holds another model. The student does not depend on it any more."""
    if WEIGHTS not in then:
        return
    try:
        files = read_model(teacher, is_cached=True)
    except UserError:  # moved or deleted, which is allowed
        return
    now = {WEIGHTS: weights_hash(files), CONFIG: config_hash(files.config)}
    if changed := changes({name: then[name] for name in (WEIGHTS, CONFIG) if name in then}, now):
        print(
            f"warning: {teacher} is no longer the teacher that this student was distilled from ({'; '.join(changed)}); "
            "the lineage names the original one",
            file=sys.stderr,
            flush=True,
        )


def check_same_tokenizer_files(then: Mapping[str, str], name: str, run_dir: Path) -> None:
    """Raise a `UserError` if `name` no longer holds the tokenizer that a finished run was trained with."""
    known = {key: value for key, value in then.items() if key.startswith(TOKENIZER)}
    if not known:
        return
    if changed := changes(known, tokenizer_identity(name)):
        raise UserError(
            f"the tokenizer in {name} is no longer the one that {run_dir} was trained with ({'; '.join(changed)}): its ids "
            "would mean other pieces to this student. Put the files back, or set `teacher` (with a vocabulary: "
            f"`vocabulary`) in {run_dir / 'run.json'} to a directory that has them"
        )
