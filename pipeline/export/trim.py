"""Cut the vocabulary of a model to what some languages use; most of a small multilingual model is its embedding.

    python -m pipeline trim runs/quickstart/student --shards artifacts/shards --languages de,en,ru --output student_small

In: an XLM-R style Hugging Face directory and shards made with its tokenizer. Out: the same model with fewer embedding
rows and its own smaller tokenizer. Checked before it gets its name: text is split as before, hidden states are equal.
A trimmed teacher works too: prepare shards with its tokenizer, and training is smaller as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from data_prep.shards import ShardSet
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.export.hf import LINEAGE_FILE, export_student
from pipeline.export.vocabulary import (
    MODEL_FILE,
    count_ids,
    coverage,
    kept_ids,
    pieces_by_id,
    read_model,
    write_trimmed_tokenizer,
)

CHECKED_ROWS = 8  # of each language
CHECKED_TOKENS = 62  # of each row: it must fit into the smallest model
LITTLE_COVERAGE = 0.98  # below this a language is better not used with the trimmed model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory with sentencepiece.bpe.model")
    parser.add_argument("--shards", type=Path, required=True, help="shards made with this model's tokenizer")
    parser.add_argument("--languages", help="comma-separated; default: every language of the shards")
    parser.add_argument("--min-count", type=int, default=1, help="keep pieces that occur at least so often")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")


def run(arguments: argparse.Namespace) -> None:
    if arguments.min_count < 1:
        raise UserError(f"--min-count is {arguments.min_count}; it must be at least 1")
    shards = ShardSet(arguments.shards)
    languages = arguments.languages.split(",") if arguments.languages else shards.languages
    missing = [language for language in languages if language not in shards.languages]
    if missing:
        raise UserError(f"{arguments.shards} has no {', '.join(missing)}; it has {', '.join(shards.languages)}.")
    report = trim(arguments.model, shards, languages, arguments.min_count, arguments.output)
    print(trimming_table(report))
    print(f"trimmed: {arguments.output}")


def trim(source: Path, shards: ShardSet, languages: list[str], min_count: int, output: Path) -> dict[str, Any]:
    """Write the trimmed model to `output` and return what its `trimming.json` holds."""
    model_file = source / MODEL_FILE
    pieces = pieces_by_id(read_model(source))
    if hashlib.sha256(model_file.read_bytes()).hexdigest() != shards.tokenizer_sha256:
        raise UserError(
            f"the shards were not made with the tokenizer in {source}, so their ids say nothing about it. "
            f"Prepare some text with it: python -m data_prep prepare --input TEXT --tokenizer {source} --output SHARDS"
        )
    counts = count_ids(shards, shards.languages)
    kept = kept_ids(counts, languages, min_count, pieces)
    encoder = load_encoder(str(source))
    before = encoder.model.num_parameters()
    report: dict[str, Any] = {
        "languages": languages,
        "min_count": min_count,
        "pieces": [len(pieces), len(kept)],
        "coverage": coverage(counts, kept),
    }

    def check_and_record(directory: Path) -> None:
        trimmed = load_encoder(str(directory))
        report["parameters"] = [before, trimmed.model.num_parameters()]
        report["checked_rows"] = check_equal(encoder, trimmed, shards, languages, kept)
        (directory / "trimming.json").write_text(json.dumps({**report, "old_ids": kept.tolist()}) + "\n")

    lineage_file = source / LINEAGE_FILE
    lineage = json.loads(lineage_file.read_text(encoding="utf-8")) if lineage_file.is_file() else {}
    lineage["trimmed"] = {"from": str(source), **{key: report[key] for key in ("languages", "min_count", "pieces")}}
    with tempfile.TemporaryDirectory() as tokenizer:
        write_trimmed_tokenizer(source, kept, Path(tokenizer))
        weights, config = trimmed_weights(encoder.model, kept)
        export_student(weights, config, tokenizer, output, lineage, [check_and_record])
    return report


def trimmed_weights(model: Any, kept: np.ndarray) -> tuple[dict[str, torch.Tensor], Any]:
    """All weights, the word embedding cut to the kept rows, and the config that says so."""
    weights = dict(model.state_dict())
    name = next(name for name, tensor in model.named_parameters() if tensor is model.get_input_embeddings().weight)
    weights[name] = weights[name][torch.from_numpy(kept)]
    config = type(model.config).from_dict(model.config.to_dict())
    config.vocab_size = len(kept)
    return weights, config


@torch.inference_mode()
def check_equal(
    whole: Encoder, trimmed: Encoder, shards: ShardSet, languages: list[str], kept: np.ndarray
) -> dict[str, int]:
    """Rows of the kept languages: same split into pieces, hidden states equal to the last bit. Returns how many."""
    old = sentencepiece.SentencePieceProcessor(model_file=f"{whole.name}/{MODEL_FILE}")
    new = sentencepiece.SentencePieceProcessor(model_file=f"{trimmed.name}/{MODEL_FILE}")
    new_id = np.full(shards.vocab_size, -1, dtype=np.int64)
    new_id[kept] = np.arange(len(kept))
    num_rows = 0
    for language in tqdm(languages, desc="checking", unit="language", disable=None):
        stream = shards.stream(language, 0, min(CHECKED_ROWS * CHECKED_TOKENS, shards.num_tokens(language)))
        for start in range(0, len(stream), CHECKED_TOKENS):
            old_row = stream[start : start + CHECKED_TOKENS].astype(np.int64)
            text = old.decode([int(i) - 1 for i in old_row if i >= 4])
            old_split = np.array(old.encode(text), dtype=np.int64) + 1
            if not np.isin(old_split, kept).all() or not np.isin(old_row, kept).all():
                continue
            new_split = np.array(new.encode(text), dtype=np.int64) + 1
            if not np.array_equal(new_id[old_split], new_split):
                raise UserError(f"{language}: {text[:60]!r} is split otherwise after trimming; nothing was written.")
            states = [
                encoder.model(input_ids=torch.from_numpy(row)[None].to(encoder.device)).last_hidden_state.cpu()
                for encoder, row in ((whole, old_row), (trimmed, new_id[old_row]))
            ]
            if not torch.equal(*states):
                raise UserError(f"{language}: hidden states changed by trimming; nothing was written.")
            num_rows += 1
    return {"rows": num_rows, "languages": len(languages)}


def trimming_table(report: dict[str, Any]) -> str:
    """Sizes before and after, and what share of every language's tokens the smaller vocabulary has."""
    (pieces_before, pieces_after), (before, after) = report["pieces"], report["parameters"]
    lines = [
        f"pieces      {pieces_before:>11,} -> {pieces_after:>11,}",
        f"parameters  {before:>11,} -> {after:>11,}  ({after / before:.2f}x)",
        f"checked: {report['checked_rows']['rows']} rows split as before, hidden states equal to the last bit",
        "share of tokens whose piece is kept:",
    ]
    for language, share in sorted(report["coverage"].items(), key=lambda item: -item[1]):
        mark = "asked for" if language in report["languages"] else "too little" if share < LITTLE_COVERAGE else ""
        lines.append(f"  {language:<8} {share:8.4f}  {mark}".rstrip())
    return "\n".join(lines)
