"""A small corpus in three languages, and functions that prepare it in this process."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

from data_prep.__main__ import main
from data_prep.discovery import LanguageRules, survey
from data_prep.prepare import PrepareConfig, prepare
from data_prep.sources import ReadOptions, Source
from tests.conftest import SAMPLES

SHARD_TOKENS = 6000


def write_corpus(directory: Path) -> Path:
    """Six copies of the Turkish sample as .xz, Hindi as text, Swahili in two files of a folder."""
    (directory / "sw").mkdir(parents=True)
    texts = {name: lzma.open(SAMPLES / "cc100" / f"{name}.txt.xz").read() for name in ("tr", "hi", "sw")}
    (directory / "tr.txt.xz").write_bytes(lzma.compress(b"\n\n".join([texts["tr"]] * 6)))
    (directory / "hi.txt").write_bytes(texts["hi"])
    half = texts["sw"].index(b"\n", len(texts["sw"]) // 2) + 1
    (directory / "sw" / "part-1.txt").write_bytes(texts["sw"][:half])
    (directory / "sw" / "part-2.txt").write_bytes(texts["sw"][half:])
    return directory


def run(corpus: Path, tokenizer: Path, output: Path, language: str | None = None, **options: Any) -> list[str]:
    """`prepare` with small shards. Returns the languages that are not finished."""
    settings = {"num_workers": 1, "shard_tokens": SHARD_TOKENS, "block_bytes": 30_000, "quiet": True} | options
    inputs = [str(corpus)] if isinstance(corpus, Path) else corpus
    return prepare(PrepareConfig(inputs, tokenizer, output, rules=LanguageRules(language), **settings))


def run_command(given: Path, tokenizer: Path, output: Path, *more: str) -> int:
    """Run `python -m data_prep prepare` with one worker in this process. Returns its exit code."""
    words = ["--input", given, "--tokenizer", tokenizer, "--output", output, "--workers", "1"]
    return main(["prepare", *map(str, words), *more])


def discover(inputs: list[str], rules: LanguageRules, text_field: str = "text") -> dict[str, list[Source]]:
    """The sources of the input by language."""
    return survey(inputs, rules, ReadOptions(text_field)).sources


def content(directory: Path) -> dict[str, bytes]:
    """Name and content of every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
