"""A vocabulary made by `python -m data_prep trim-vocab`, and models whose word embedding is cut to it.

In: the directory with `vocabulary.json` (the old id of every new id, hashes of both tokenizers). Out: a checked
`Vocabulary`; `cut_embedding` keeps its rows of a loaded teacher's embedding, before the student is built from it.

Shape suffixes: V ids of the vocabulary, D channels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import UserError

MAP_FILE = "vocabulary.json"
MODEL_FILE = "sentencepiece.bpe.model"
FORMAT = ("minilmv2-vocabulary", 1)
# Models whose ids are SentencePiece's plus one: XLM-R (also BGE-M3, e5-base, e5-large), and BERT encoders with its tokenizer
# (e5-small, Multilingual-MiniLM). Other models have a file of the same name with another numbering: CamemBERT adds 4.
MODEL_TYPES = ("xlm-roberta", "xlm-roberta-xl", "bert")
LEADING_SPECIALS = [0, 1, 2, 3]  # <s> <pad> </s> <unk>; the last id is <mask>
MAKE_IT = "python -m data_prep trim-vocab --tokenizer TEACHER --shards SHARDS --languages xx,yy --output"


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer that a smaller one keeps. The position in `old_ids_V` is the new id."""

    directory: Path
    old_ids_V: torch.Tensor
    source_vocab_size: int
    source_sha256: str  # of the SentencePiece model that it was cut from
    about: dict[str, Any]  # languages, min_count, coverage, loss per language

    def __len__(self) -> int:
        return len(self.old_ids_V)

    def check_source(self, sha256: str, name: str) -> None:
        """Raise a `UserError` unless `sha256` is that of the tokenizer from which this vocabulary was cut."""
        if sha256 != self.source_sha256:
            raise UserError(
                f"the vocabulary {self.directory} was cut from another tokenizer (sha256 {self.source_sha256[:12]}) than "
                f"that of {name} (sha256 {sha256[:12]}), so its old ids are other pieces there. Make one from {name}: "
                f"{MAKE_IT.replace('TEACHER', name)} DIR"
            )


def read_vocabulary(directory: str | Path) -> Vocabulary:
    """Read the output of `trim-vocab`. Raises `UserError`: a file is missing or corrupt, or the two do not belong together."""
    directory = Path(directory).expanduser()
    path, model = directory / MAP_FILE, directory / MODEL_FILE
    for file in (path, model):
        if not file.is_file():
            raise UserError(f"{directory} is not a vocabulary: {file.name} is missing. Make one: {MAKE_IT} {directory}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if (about["format"], about["version"]) != FORMAT:
            raise KeyError(f"format {about['format']!r} version {about['version']!r} is not {FORMAT}")
        old_ids = about.pop("old_ids")
        source_size, size = int(about["source_vocab_size"]), int(about["vocab_size"])
        problem = _problem_of(old_ids, source_size, size)
        found = Vocabulary(directory, torch.tensor(old_ids), source_size, str(about["source_sha256"]), about)
        sha256 = str(about["tokenizer_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is corrupt ({error}). Make it again: {MAKE_IT} {directory}") from None
    if problem:
        raise UserError(f"{path} {problem}: it was edited or is corrupt. Make it again: {MAKE_IT} {directory}")
    if hashlib.sha256(model.read_bytes()).hexdigest() != sha256:
        raise UserError(
            f"{model} is not the tokenizer that {path.name} belongs to. Make both again: {MAKE_IT} {directory}"
        )
    return found


def _problem_of(old_ids: list[int], source_size: int, size: int) -> str | None:
    """The problem of a map of ids, as the end of a sentence about its file; None: it is valid."""
    if len(old_ids) != size or not all(type(number) is int for number in old_ids):
        return f"should map {size} ids and maps {len(old_ids)}"
    if old_ids[: len(LEADING_SPECIALS)] != LEADING_SPECIALS or old_ids[-1] != source_size - 1:
        return "drops special ids (<s> 0, <pad> 1, </s> 2, <unk> 3 and <mask>, the last)"
    if any(after <= before for before, after in itertools.pairwise(old_ids)):
        return "is not in ascending order of ids"
    return None


def cut_embedding(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Replace the model's word embedding by its kept rows, in place. `UserError`: the model's ids are other ones."""
    if model.config.model_type not in MODEL_TYPES:
        raise UserError(
            f"a {model.config.model_type} model does not number its pieces as XLM-R does, so {vocabulary.directory} does not fit "
            f"it. A vocabulary can be cut for {', '.join(MODEL_TYPES)}"
        )
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    if embedding.num_embeddings < vocabulary.source_vocab_size:
        raise UserError(
            f"the vocabulary {vocabulary.directory} was cut from {vocabulary.source_vocab_size} ids, the model has only "
            f"{embedding.num_embeddings} embeddings: it is another model's vocabulary"
        )
    if embedding.padding_idx is not None and embedding.padding_idx not in LEADING_SPECIALS:
        raise UserError(f"padding of this model is id {embedding.padding_idx}; only XLM-R's layout (1) can be cut")
    rows_VD = embedding.weight.detach()[vocabulary.old_ids_V.to(embedding.weight.device)]
    cut = nn.Embedding.from_pretrained(
        rows_VD, freeze=not embedding.weight.requires_grad, padding_idx=embedding.padding_idx
    )
    model.set_input_embeddings(cut)
    model.config.vocab_size = len(vocabulary)
