"""A real but tiny SentencePiece model in XLM-R's layout, for tests and benchmarks that prepare text."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import sentencepiece

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
TINY_PIECES = 2000


def make_tiny_tokenizer(directory: Path) -> Path:
    """Train a 2000-piece SentencePiece model on the sample corpus and lay it out like XLM-R's tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for language in ("en", "de", "ru", "zh-Hans", "ar", "hi"):
        with lzma.open(SAMPLES / "cc100" / f"{language}.txt.xz", "rt", encoding="utf-8") as text:
            lines += [line.strip() for _, line in zip(range(400), text, strict=False) if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "sentencepiece.bpe"),
        vocab_size=TINY_PIECES,
        character_coverage=0.98,
        model_type="unigram",
        minloglevel=2,
    )
    (directory / "sentencepiece.bpe.vocab").unlink()
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 128})
    )
    return directory
