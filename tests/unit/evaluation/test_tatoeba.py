"""Retrieval from the Tatoeba layout: names, alignment by line, and every kind of bad file, named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.retrieval import RetrievalConfig, evaluate_retrieval, read_pairs


def write(directory: Path, code: str, other: str, english: str) -> None:
    (directory / f"tatoeba.{code}-eng.{code}").write_text(other, encoding="utf-8")
    (directory / f"tatoeba.{code}-eng.eng").write_text(english, encoding="utf-8")


def config(directory: Path, **settings: object) -> RetrievalConfig:
    return RetrievalConfig(pairs=str(directory), **settings)


def test_line_n_is_the_translation_of_line_n(tmp_path: Path) -> None:
    write(tmp_path, "deu", "Hallo\nJa \u2028 doch\nNein\n", "Hello\nYes\nNo\n")
    write(tmp_path, "xyz", "\ufeffa\nb\n", "c\nd")  # a byte-order mark is not text
    pairs = read_pairs(config(tmp_path))
    assert pairs == {
        "de": [("Hello", "Hallo"), ("Yes", "Ja \u2028 doch"), ("No", "Nein")],
        "xyz": [("c", "a"), ("d", "b")],
    }
    assert read_pairs(config(tmp_path, max_pairs=2))["de"] == pairs["de"][:2]


def test_languages_have_either_code_also_with_tsv_files(tmp_path: Path) -> None:
    write(tmp_path, "swh", "a\nb\n", "c\nd\n")
    (tmp_path / "en-el.tsv").write_text("e\tf\ng\th\n")
    for languages in (["swh", "el"], ["sw", "el"]):
        assert list(read_pairs(config(tmp_path, languages=languages))) == ["sw", "el"]
    with pytest.raises(UserError, match="no pairs for fr; it has el, sw"):
        read_pairs(config(tmp_path, languages=["fra"]))


def test_the_same_sentences_find_each_other(tiny_teacher: Path, tmp_path: Path) -> None:
    text = "Hello world!\nEin Haus\n你好\n"
    write(tmp_path, "cmn", text, text)
    result = evaluate_retrieval(load_encoder(str(tiny_teacher)), config(tmp_path, max_length=60))
    assert result["per_pair"]["zh-Hans"]["output"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("other", "english", "message"),
    [
        ("a\nb\nc\n", "d\ne\n", r"eng\.eng has 2 lines, .*eng\.deu has 3: line 3 has no partner"),
        ("a\n\nc\n", "d\ne\nf\n", r"eng\.deu, line 2, is empty"),
        ("a\nb\nc\n", "d\ne\n  \n", r"eng\.eng, line 3, is empty"),
        ("a\n", "b\n", "at least 2"),
        ("", "", "at least 2"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, other: str, english: str, message: str) -> None:
    write(tmp_path, "deu", other, english)
    with pytest.raises(UserError, match=message):
        read_pairs(config(tmp_path))


def test_a_file_without_its_english(tmp_path: Path) -> None:
    write(tmp_path, "deu", "a\nb\n", "c\nd\n")
    (tmp_path / "tatoeba.deu-eng.eng").unlink()
    with pytest.raises(UserError, match=r"tatoeba\.deu-eng\.eng is missing"):
        read_pairs(config(tmp_path))


def test_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, "fra", "a\nb\n", "c\nd\n")
    (tmp_path / "tatoeba.fra-eng.fra").write_bytes("aç\nb\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"eng\.fra is not UTF-8 \(byte 1\)"):
        read_pairs(config(tmp_path))


def test_sorted_files_are_rejected(tmp_path: Path) -> None:
    for name in ("de-en.de", "de-en.en"):
        (tmp_path / name).write_text("a\nb\n")
    with pytest.raises(UserError, match="no longer the translation"):
        read_pairs(config(tmp_path))
