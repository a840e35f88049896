"""A vocabulary made by `python -m data_prep trim-vocab`, and models whose word embedding is cut to it.

In: the directory with `vocabulary.json` (the old id of every new id, hashes of both tokenizers). Out: a checked
`Vocabulary`; `cut_embedding` keeps its rows of a loaded teacher's embedding and maps the special ids of the config, before
the student is built from it.

Shape suffixes: V ids of the vocabulary, D channels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from data_prep.command_line import module_command
from data_prep.tokenizer_ids import FAST_TOKENIZER_NAME, POSITIONS_FROM_PADDING, SENTENCEPIECE_NAMES
from pipeline.errors import UserError

MAP_FILE = "vocabulary.json"
MODEL_FILE = SENTENCEPIECE_NAMES[0]  # of a map that names no file
FORMAT = ("minilmv2-vocabulary", 1)
# Models whose ids are those of `MODEL_FILE` plus one: XLM-R (also BGE-M3, e5-base, e5-large), and BERT encoders with its tokenizer
# (e5-small, Multilingual-MiniLM). Other models have a file of the same name with another numbering: CamemBERT adds 4.
MODEL_TYPES = ("xlm-roberta", "xlm-roberta-xl", "bert")
MOST_IDS = 1 << 31
LEADING_SPECIALS = [0, 1, 2, 3]  # <s> <pad> </s> <unk>; the last id is <mask>


def how_to_make(output: str | Path, tokenizer: str = "TEACHER") -> str:
    """The command that makes a vocabulary: in `output`, or beside it if something else is there, which is not replaced."""
    directory, then = Path(output), ""
    if directory.exists() and (not (directory / MAP_FILE).is_file() or (directory / "config.json").is_file()):
        output = f"{directory}-vocabulary"
        then = f"   (then --set {shlex.quote(f'vocabulary={output}')})"
    options = ["--tokenizer", tokenizer, "--shards", "SHARDS", "--languages", "xx,yy", "--output", output]
    return module_command("data_prep", "trim-vocab", *options) + then


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer that a smaller one keeps. The position in `old_ids_V` is the new id."""

    directory: Path
    old_ids_V: torch.Tensor
    source_vocab_size: int
    source_sha256: str  # of the file of the tokenizer that it was cut from
    tokenizer_file: str  # the file of the smaller tokenizer that determines ids
    about: dict[str, Any]  # languages, min_count, coverage, loss per language

    def __len__(self) -> int:
        return len(self.old_ids_V)

    def new_id(self, old: int, name: str) -> int:
        """The new id of `old`. An id that names no piece of the source stays. `UserError`: its piece is not kept."""
        if not 0 <= old < self.source_vocab_size:
            return old
        position = int(torch.searchsorted(self.old_ids_V, old))
        if position < len(self) and self.old_ids_V[position] == old:
            return position
        raise UserError(
            f"{name} is id {old}, whose piece the vocabulary {self.directory} does not keep. Name it in the config.json next to "
            f"the tokenizer, and make the vocabulary again: {how_to_make(self.directory)}"
        )

    def check_source(self, sha256: str, name: str) -> None:
        """Raise a `UserError` unless `sha256` is that of the tokenizer from which this vocabulary was cut."""
        if sha256 != self.source_sha256:
            raise UserError(
                f"the vocabulary {self.directory} was cut from another tokenizer (sha256 {self.source_sha256[:12]}) than "
                f"that of {name} (sha256 {sha256[:12]}), so its old ids are other pieces there. Make one from {name}: "
                f"{how_to_make('DIR', name)}"
            )


def read_vocabulary(directory: str | Path) -> Vocabulary:
    """Read the output of `trim-vocab`. Raises `UserError`: a file is missing or corrupt, or the two do not belong together."""
    directory = Path(directory).expanduser()
    path = directory / MAP_FILE
    _check_exists(path)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if (about["format"], about["version"]) != FORMAT:
            raise KeyError(f"format {about['format']!r} version {about['version']!r} is not {FORMAT}")
        old_ids = about.pop("old_ids")
        source_size, size = int(about["source_vocab_size"]), int(about["vocab_size"])
        name = about.pop("tokenizer_file", MODEL_FILE)
        if name not in (MODEL_FILE, FAST_TOKENIZER_NAME):
            raise KeyError(f"tokenizer_file {str(name)[:40]!r} is not {MODEL_FILE} or {FAST_TOKENIZER_NAME}")
        special = [*LEADING_SPECIALS, source_size - 1] if name == MODEL_FILE else about["special_ids"]
        problem = _problem_of(old_ids, source_size, size) or _dropped(special, old_ids)
        sha256, source_sha256 = str(about["tokenizer_sha256"]), str(about["source_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is corrupt ({error}). Make it again: {how_to_make(directory)}") from None
    if problem:
        raise UserError(f"{path} {problem}: it was edited or is corrupt. Make it again: {how_to_make(directory)}")
    model = directory / name
    _check_exists(model)
    if hashlib.sha256(model.read_bytes()).hexdigest() != sha256:
        raise UserError(
            f"{model} is not the tokenizer that {path.name} belongs to. Make both again: {how_to_make(directory)}"
        )
    return Vocabulary(directory, torch.tensor(old_ids), source_size, source_sha256, name, about)


def _problem_of(old_ids: list[int], source_size: int, size: int) -> str | None:
    """The problem of a map of ids, as the end of a sentence about its file; None: it is valid."""
    if len(old_ids) != size or not all(type(number) is int for number in old_ids):
        return f"should map {size} ids and maps {len(old_ids)}"
    if any(after <= before for before, after in itertools.pairwise(old_ids)):
        return "is not in ascending order of ids"
    if not old_ids or not 0 <= old_ids[0] <= old_ids[-1] < min(source_size, MOST_IDS):
        return f"holds ids outside of 0 to {source_size - 1}"
    return None


def _dropped(special: list[int], old_ids: list[int]) -> str | None:
    """As `_problem_of`, of special ids that are not kept."""
    missing = sorted(set(special).difference(old_ids))
    return f"drops special ids ({', '.join(map(str, missing[:8]))})" if missing else None


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise UserError(
            f"{file.parent} is not a vocabulary: {file.name} is missing. Make one: {how_to_make(file.parent)}"
        )


def cut_embedding(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Replace the model's word embedding by its kept rows, in place. `UserError`: the model's ids are other ones."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    if embedding.num_embeddings < vocabulary.source_vocab_size:
        raise UserError(
            f"the vocabulary {vocabulary.directory} was cut from {vocabulary.source_vocab_size} ids, the model has only "
            f"{embedding.num_embeddings} embeddings: it is another model's vocabulary"
        )
    cut_config(model.config, vocabulary)
    padding = embedding.padding_idx
    cut = nn.Embedding.from_pretrained(
        embedding.weight.detach()[vocabulary.old_ids_V.to(embedding.weight.device)],
        freeze=not embedding.weight.requires_grad,
        padding_idx=None if padding is None else vocabulary.new_id(padding, "the padding of the word embedding"),
    )
    model.set_input_embeddings(cut)


def cut_config(config: PretrainedConfig, vocabulary: Vocabulary) -> None:
    """Set the size and the special ids of a config to those of the vocabulary, in place. `UserError`: as `cut_embedding`."""
    if vocabulary.tokenizer_file == MODEL_FILE and config.model_type not in MODEL_TYPES:
        raise UserError(
            f"a {config.model_type} model does not number its pieces as XLM-R does, so {vocabulary.directory} does not fit "
            f"it. With {MODEL_FILE} a vocabulary can be cut for {', '.join(MODEL_TYPES)}"
        )
    new_ids = {}
    for key, old in config.to_dict().items():
        if not key.endswith("_token_id") or old is None:
            continue
        name = f"`{key}` of the model's config"
        new = (
            [vocabulary.new_id(number, name) for number in old]
            if isinstance(old, list)
            else vocabulary.new_id(old, name)
        )
        if key == "pad_token_id" and new != old and config.model_type in POSITIONS_FROM_PADDING:
            raise UserError(
                f"a {config.model_type} model counts positions from its padding id, which is {old} in the model and {new} in "
                f"{vocabulary.directory}. Make the vocabulary with the tokenizer in the model's own directory, whose config.json "
                f"names the id: {how_to_make(vocabulary.directory)}"
            )
        new_ids[key] = new
    config.update(new_ids)
    config.vocab_size = len(vocabulary)
