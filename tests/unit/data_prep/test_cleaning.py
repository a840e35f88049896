"""The cleaning options. By default nothing is changed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data_prep.clean import CleanOptions, clean, split_documents
from data_prep.dedup import Deduplicator
from data_prep.languages import CC100
from data_prep.scripts import scripts_of, shares_in_script
from data_prep.shards import DataError, ShardSet
from tests.unit.data_prep.corpus import run


def cleaned(text: bytes, language: str = "en", **options: object) -> tuple[list[bytes], list[int], dict[str, int]]:
    lines, document = split_documents(text)
    kept, document, counts = clean(lines, document, language, CleanOptions(**options))  # type: ignore[arg-type]
    numbers = np.unique(document, return_inverse=True)[1].tolist() if len(document) else []
    return kept, numbers, {name: count for name, count in counts.items() if count}


def test_by_default_lines_are_not_changed() -> None:
    text = "one\n two \x07\n\n\n  \nthree </s> <mask>\0\nя".encode()
    assert cleaned(text) == ([b"one", b"two \x07", b"three </s> <mask>\0", "я".encode()], [0, 0, 1, 1], {})


def test_windows_line_ends_and_blank_lines_of_spaces_end_documents() -> None:
    assert cleaned(b"a\r\nb\r\n\r\nc\r\n \t\r\nd")[:2] == ([b"a", b"b", b"c", b"d"], [0, 0, 1, 2])


def test_broken_text_is_replaced_skipped_or_rejected() -> None:
    text = b"good\nbad \xff\xfe line\ngood too"
    replaced = [b"good", "bad \ufffd\ufffd line".encode(), b"good too"]
    assert cleaned(text) == (replaced, [0, 0, 0], {"lines_broken": 1})
    assert cleaned(text, broken_text="skip") == ([b"good", b"good too"], [0, 0], {"lines_broken": 1})
    with pytest.raises(DataError, match=r"1 lines of a block are not UTF-8.*--broken-text"):
        cleaned(text, broken_text="fail")


def test_control_characters_and_lines_of_them_are_removed() -> None:
    assert cleaned(b"a\x07b\tc\n\x01\x02\nd", control_characters="remove") == (
        [b"ab\tc", b"d"],
        [0, 0],
        {"lines_with_control_characters": 2},
    )


def test_documents_outside_the_length_limits_are_left_out() -> None:
    text = "ab\n\nэто длиннее\n\n".encode() + b"x" * 50
    assert cleaned(text, min_document_chars=5, max_document_chars=20) == (
        ["это длиннее".encode()],
        [0],
        {"documents_too_short": 1, "documents_too_long": 1},
    )


def test_lines_in_another_script_are_left_out() -> None:
    lines = ["Это русский текст", "This is English text", "12345 !!", "слово word слово"]
    kept, _, counts = cleaned("\n".join(lines).encode(), "ru", script_check=True)
    assert [line.decode() for line in kept] == [lines[0], lines[2], lines[3]]
    assert counts == {"lines_in_other_script": 1}
    assert shares_in_script([line.encode() for line in lines], "ru").tolist() == pytest.approx([1, 0, 1, 10 / 14])
    assert shares_in_script(["日本語です".encode(), "한국어".encode()], "ja").tolist() == [1, 0]


def test_every_language_of_cc100_has_its_script() -> None:
    assert len(CC100) == 116
    assert all(scripts_of(language) for language in CC100)
    assert scripts_of("zh-Hant") == ["Han"]
    assert scripts_of("hi_rom") == ["Latin"]
    assert scripts_of("sr") == ["Cyrillic", "Latin"]


def run_dedup(options: CleanOptions, text: bytes) -> tuple[list[bytes], dict[str, int]]:
    kept, counts, _ = Deduplicator(options).filter(text)
    return split_documents(kept)[0], {name: count for name, count in counts.items() if count}


def test_repeated_documents_and_lines_are_found_across_blocks() -> None:
    text = b"a\nb\n\na\nc\n\na\nb\n\nd"
    assert run_dedup(CleanOptions(dedup="documents"), text) == (
        [b"a", b"b", b"a", b"c", b"d"],
        {"documents_repeated": 1},
    )
    assert run_dedup(CleanOptions(dedup="lines"), text) == ([b"a", b"b", b"c", b"d"], {"lines_repeated": 3})
    assert run_dedup(CleanOptions(), text)[1] == {}
    one = Deduplicator(CleanOptions(dedup="lines"))
    assert one.filter(b"a\nb\n")[0].split() == [b"a", b"b"]
    assert one.filter(b"b\nc\n")[0].split() == [b"c"]


@pytest.mark.parametrize(
    ("unit", "seen", "text", "has_first"),
    [
        ("documents", b"a\nb\n", b"a\nb\n\nc\n", False),
        ("documents", b"c\n", b"a\nb\n\nc\n", True),
        ("lines", b"a\nb\n", b"\na\nb\n\nc\n", False),
        ("lines", b"b\nc\n", b"a\nb\n\nc\n", True),
        ("none", b"a\n", b"a\n", True),
    ],
)
def test_whether_the_first_document_is_still_there(unit: str, seen: bytes, text: bytes, has_first: bool) -> None:
    one = Deduplicator(CleanOptions(dedup=unit))
    one.filter(seen)
    assert one.filter(text)[2] == has_first


def test_with_little_memory_nothing_new_is_dropped() -> None:
    rng = random.Random(0)
    lines = [b"line %d" % rng.randrange(60_000) for _ in range(100_000)]
    small, exact = Deduplicator(CleanOptions(dedup="lines", dedup_memory_mb=1)), set(lines)
    small._table = small._table[:5000]  # type: ignore[index]
    kept = small.filter(b"\n".join(lines))[0].split(b"\n")[:-1]
    assert set(kept) == exact
    assert len(kept) < len(lines)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("option", "kept"), [({"max_document_chars": 50_000}, 2), ({"min_document_chars": 60_000}, 2), ({}, 4)]
)
def test_all_parts_of_a_cut_document_are_treated_alike(
    tiny_tokenizer: Path, tmp_path: Path, num_workers: int, option: dict[str, int], kept: int
) -> None:
    """Its last part has 20 kB. The other two documents are short."""
    long = b"word and word\n" * ((2 << 20) // 14) + b"last part\n" * 2000
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "en.txt").write_bytes(b"a short document\n\n" + long + b"\nanother short one\n")
    run(tmp_path / "in", tiny_tokenizer, tmp_path / "out", clean=CleanOptions(**option), num_workers=num_workers)
    shards = ShardSet(tmp_path / "out")
    assert shards.num_documents("en") == kept
    assert (shards.num_tokens("en") < 100) == ("max_document_chars" in option)
