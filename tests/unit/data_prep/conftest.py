"""Fixtures of the tests that compare ids, and of those that read data sets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import parquet
from tests.unit.data_prep.id_checks import TEXT, write
from tests.unit.data_prep.small_data_set import write_data_set


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


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two row groups."""
    monkeypatch.setattr(parquet, "PART_BYTES", 2000)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data-set") / "texts")
