"""Line ends, blank lines and byte order marks as other programs write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.clean import CleanOptions, split_documents
from data_prep.dedup import Deduplicator
from data_prep.lines import oddities
from data_prep.shards import ShardSet
from data_prep.sources import START_BYTES, Source

LINES = [f"Document {number // 3}, line {number}." + ("\n" if number % 3 == 2 else "") for number in range(90)]
TEXT = "".join(line + "\n" for line in LINES).encode()  # 30 documents of three lines


def read(path: Path, text: bytes) -> bytes:
    path.write_bytes(text)
    return b"".join(Source("en", path, path.name).chunks())


def documents(text: bytes) -> list[list[bytes]]:
    lines, numbers = split_documents(text)
    return [[line for line, of in zip(lines, numbers, strict=True) if of == number] for number in sorted(set(numbers))]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r", b"\r\r\n"])
def test_line_ends_do_not_change_documents_and_lines(tmp_path: Path, line_end: bytes) -> None:
    got = documents(read(tmp_path / "en.txt", TEXT.replace(b"\n", line_end)))
    expected = documents(TEXT)
    if line_end == b"\r\r\n":  # CR LF converted twice gives the same lines without blank ones between them
        assert [line for document in got for line in document] == [line for document in expected for line in document]
    else:
        assert got == expected


def test_a_final_line_feed_in_a_text_with_cr_changes_nothing(tmp_path: Path) -> None:
    assert documents(read(tmp_path / "en.txt", TEXT.replace(b"\n", b"\r") + b"\n")) == documents(TEXT)


def test_cr_ends_lines_in_a_long_file_that_ends_with_other_line_ends(tmp_path: Path) -> None:
    old = TEXT.replace(b"\n", b"\r") * (START_BYTES // len(TEXT) + 2)
    got = read(tmp_path / "en.txt", old + TEXT.replace(b"\n", b"\r\n"))
    assert got == TEXT * (START_BYTES // len(TEXT) + 3)


def test_cr_inside_lines_is_kept_and_many_give_a_warning(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for text, has_warning in ((TEXT + b"a\rb\n", False), (TEXT.replace(b", ", b",\r"), True)):
        assert read(tmp_path / "in" / "en.txt", text) == text
        output = tmp_path / f"out-{has_warning}"
        arguments = ["prepare", "--input", str(tmp_path / "in"), "--tokenizer", str(tiny_tokenizer), "--workers", "1"]
        assert main([*arguments, "--output", str(output)]) == 0
        assert ("times CR is inside one of its 90 lines" in capsys.readouterr().err) == has_warning
        counts = ShardSet(output).manifest["languages"]["en"]["counts"]
        assert counts["carriage_returns_in_lines"] == (90 if has_warning else 1)


def test_a_file_with_cr_as_line_end_gives_a_warning(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "en.txt").write_bytes(TEXT.replace(b"\n", b"\r"))
    arguments = ["prepare", "--input", str(tmp_path / "en.txt"), "--tokenizer", str(tiny_tokenizer), "--workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "warning: en: 1 files have CR alone as line end" in capsys.readouterr().err
    assert ShardSet(tmp_path / "out").num_documents("en") == 30


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_unicode_line_separators_end_no_line_and_give_a_warning(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], separator: str
) -> None:
    (tmp_path / "en.txt").write_bytes(TEXT.replace(b"\n", separator.encode()))
    arguments = ["prepare", "--input", str(tmp_path / "en.txt"), "--tokenizer", str(tiny_tokenizer), "--workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "120 times U+2028, U+2029 or U+0085 is inside one of its 1 lines" in capsys.readouterr().err


BLANKS = ["", " ", "\t", "\u00a0", "\u3000", "\u200b", "\u2003 \u00a0", "\ufeff", "\u2028", "\v", "\f", " \u00a0\t\r"]


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_a_line_of_any_white_space_ends_a_document(blank: str) -> None:
    text = f"a\nb\n{blank}\n\u00a0c\n{blank}".encode()
    assert [[line.decode() for line in document] for document in documents(text)] == [["a", "b"], ["\u00a0c"]]
    kept, counts, _ = Deduplicator(CleanOptions(dedup="documents")).filter(f"a\nb\n{blank}\na\nb\n".encode())
    assert documents(kept) == [[b"a", b"b"]]
    assert counts["documents_repeated"] == 1


def test_a_line_that_only_starts_with_white_space_is_text() -> None:
    assert documents("\u3000\u3000段落\n\u00a0x\n".encode()) == [["\u3000\u3000段落".encode(), "\u00a0x".encode()]]


def test_byte_order_marks_of_joined_files_are_removed(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert documents(
        read(tmp_path / "en.txt", mark + b"a\n" + mark + b"b\n\n" + mark + mark + b"\n" + mark + b"c")
    ) == [[b"a", b"b"], [b"c"]]
    assert documents(b"in a \xef\xbb\xbf line\n") == [[b"in a \xef\xbb\xbf line"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"a\rb\r\nc\r\r\n", 1), (b"a\r\nb\r\n", 0), (b"a\r\rb", 2), (b"a\r", 0), (b"a\n\r", 0), (b"", 0)],
)
def test_carriage_returns_inside_lines_are_counted(text: bytes, expected: int) -> None:
    assert oddities(text)["carriage_returns_in_lines"] == expected


def test_a_long_run_of_carriage_returns_is_read_once() -> None:
    """With the square of its length it takes minutes."""
    run = 1 << 20
    for end, expected in ((b"x", run), (b"\n", 0)):
        assert oddities(b"a\n" * 100 + b"\r" * run + end)["carriage_returns_in_lines"] == expected
