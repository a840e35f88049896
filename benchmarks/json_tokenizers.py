"""Real tokenizer.json files of three kinds, trained on given lines, for tests and benchmarks that prepare text.

`bpe` has the layout of Gemma's and mmBERT's (spaces become markers, no pre-tokenizer, byte fallback), `byte_bpe` that of
ModernBERT's and RoBERTa's, `wordpiece` that of uncased BERT's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

KINDS = ("bpe", "byte_bpe", "wordpiece")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_tokenizer_json(kind: str, directory: Path, lines: Sequence[str], num_pieces: int) -> Path:
    """Train a tokenizer of a kind of `KINDS` and write it as a Hugging Face directory. Returns the directory."""
    special = (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if kind == "wordpiece" else ["<pad>", "<eos>", "<bos>", "<unk>"]
    )
    begin, end = ("[CLS]", "[SEP]") if kind == "wordpiece" else ("<bos>", "<eos>")
    tokenizer, trainer = _untrained(kind, special, num_pieces)
    tokenizer.train_from_iterator(lines, trainer)
    content = json.loads(tokenizer.to_str())
    if kind == "bpe":
        content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        content["pre_tokenizer"] = None
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTES]
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    row = [_special(begin), {"Sequence": {"id": "A", "type_id": 0}}, _special(end)]
    tokens = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (begin, end)}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": row, "special_tokens": tokens,
        "pair": [*row, {"Sequence": {"id": "B", "type_id": 0}}, _special(end)],
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def _untrained(kind: str, special: list[str], num_pieces: int) -> tuple[Tokenizer, Any]:
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer, trainers.WordPieceTrainer(
            vocab_size=num_pieces, special_tokens=special, show_progress=False, limit_alphabet=num_pieces // 3
        )
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return tokenizer, trainers.BpeTrainer(
            vocab_size=num_pieces, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # while it learns merges
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, trainers.BpeTrainer(
        vocab_size=num_pieces, special_tokens=[*special, *BYTES], show_progress=False, limit_alphabet=num_pieces // 3
    )


def _special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}
