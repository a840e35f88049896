"""Fuzz: the tokenizer.json that `trim-vocab` cuts, the files next to it, and the map that a run reads."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.fast_pieces import FastPieces
from data_prep.vocabulary import TrimOptions, kept_ids
from pipeline.distillation.models.vocabulary import read_vocabulary
from tests.fuzz.mutations import mutated_bytes, mutated_json
from tests.fuzz.trials import fuzz, rejected_or_done
from tests.unit.data_prep.tiny_tokenizers import byte_bpe, word_piece

UNIGRAM = {
    "version": "1.0",
    "truncation": None,
    "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    "added_tokens": [
        {"id": n, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for n, text in enumerate(["<pad>", "<s>", "</s>", "<unk>"])
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {text: {"id": text, "ids": [n], "tokens": [text]} for n, text in ((1, "<s>"), (2, "</s>"))},
    },
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "model": {"type": "Unigram", "unk_id": 3, "byte_fallback": False, "vocab": [
        ["<pad>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *([text, -float(n)] for n, text in enumerate("▁ a b ab ▁ab c abc".split()))]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
def test_tokenizers(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "tokenizer"
    if kind == "Unigram":
        directory.mkdir()
        (directory / "tokenizer.json").write_text(json.dumps(UNIGRAM))
    else:
        (byte_bpe if kind == "BPE" else word_piece)(directory)
    files = {
        "tokenizer.json": json.loads((directory / "tokenizer.json").read_text()),
        "tokenizer_config.json": {"unk_id": 3, "pad_token_id": 0, "added_tokens_decoder": {"0": {"content": "<pad>"}}},
        "added_tokens.json": {"<pad>": 0},
        "config.json": {"model_type": "roberta", "pad_token_id": 1, "eos_token_id": [2, 3]},
    }
    if kind == "BPE":  # few enough pieces that merges and special tokens are changed too
        files["tokenizer.json"]["model"]["merges"] = files["tokenizer.json"]["model"]["merges"][:12]

    def trial(seed: int, times: int) -> None:
        changed = random.Random(seed).choice([*files, "tokenizer.json", "tokenizer.json", "tokenizer.json"])
        for name, content in files.items():
            text = json.dumps(content).encode()
            (directory / name).write_bytes(mutated_json(content, seed, times) if name == changed else text)

        def cut() -> None:
            pieces = FastPieces(directory / "tokenizer.json")
            counts = np.arange(len(pieces.texts)) % 3
            kept = kept_ids({"xx": counts}, TrimOptions(["xx"]), pieces)
            shutil.rmtree(tmp_path / "small", ignore_errors=True)
            (tmp_path / "small").mkdir()
            pieces.write(kept, tmp_path / "small")
            pieces.lines([kept.tolist()])

        rejected_or_done(cut)

    fuzz(f"tokenizer.json of {kind}", trial)


def test_map(vocabulary: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(vocabulary, tmp_path / "copy")
    path = copy / "vocabulary.json"
    content = {**json.loads(path.read_text()), "special_ids": [0, 1, 2], "tokenizer_file": "sentencepiece.bpe.model"}

    def trial(seed: int, times: int) -> None:
        changed = mutated_json(content, seed, times)
        path.write_bytes(mutated_bytes(json.dumps(content).encode(), seed, times) if seed % 2 else changed)
        rejected_or_done(lambda: read_vocabulary(copy))

    fuzz("vocabulary.json", trial)
