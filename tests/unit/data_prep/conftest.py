"""Fixtures of the tests that compare ids."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.data_prep.id_checks import TEXT, write


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory with English text."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.txt").write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    return tmp_path / "text"


@pytest.fixture
def model_alone(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory with the tiny SentencePiece model and JSON files, given by name and content."""

    def make(name: str = "sentencepiece.bpe.model", **files: dict) -> Path:
        directory = tmp_path / "tokenizer"
        directory.mkdir()
        shutil.copy(tiny_tokenizer / "sentencepiece.bpe.model", directory / name)
        for file, content in files.items():
            write(directory / f"{file}.json", content)
        return directory

    return make
