"""Text in another encoding is rejected by its share of broken lines, with a command that converts it; a few give a warning."""

from __future__ import annotations

import lzma
import os
import subprocess
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.journal import Journal
from data_prep.shards import ShardSet
from data_prep.sources import Source
from tests.conftest import SAMPLES
from tests.unit.data_prep.corpus import content, run_command
from tests.unit.data_prep.small_data_set import stop_after


def prepare(tokenizer: Path, root: Path, *more: str) -> int:
    return run_command(root / "in", tokenizer, root / "out", *more)


def sample(language: str) -> str:
    return lzma.open(SAMPLES / "cc100" / f"{language}.txt.xz").read().decode()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


ENCODINGS = [
    ("de", "ISO-8859-1"), ("en", "WINDOWS-1252"), ("ru", "CP1251"), ("ru", "KOI8-R"), ("ja", "CP932"), ("ja", "EUC-JP"),
    ("ko", "CP949"), ("zh-Hans", "GB18030"), ("zh-Hans", "UTF-16LE"), ("de", "UTF-16"), ("ar", "UTF-32"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("language", "encoding", "packing"),
    [*((*one, "") for one in ENCODINGS), ("de", "ISO-8859-1", ".xz"), ("de", "UTF-16", ".xz")],
)
def test_the_printed_command_converts_the_file_and_the_rerun_succeeds(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], language: str, encoding: str, packing: str
) -> None:
    text = sample(language).encode(encoding, "ignore")
    path = tmp_path / "in" / f"{language}.it's one.txt{packing}"
    path.parent.mkdir()
    path.write_bytes(lzma.compress(text, preset=0) if packing else text)
    assert prepare(tiny_tokenizer, tmp_path, "--shard-tokens", "3000") == 2
    error = error_of(capsys)
    assert f"iconv -f {encoding} -t UTF-8" in error
    assert set(content(tmp_path / "out")) <= {"prepare.json", f"{language}/journal.jsonl"}
    start = "(set -o pipefail; xz -dc < " if packing else "iconv -f "
    command = start + error.split(start, 1)[1].split(". Then run")[0]
    subprocess.run(["bash", "-c", command], check=True)
    assert prepare(tiny_tokenizer, tmp_path, "--shard-tokens", "3000") == 0
    assert "lines_broken" not in ShardSet(tmp_path / "out").manifest["languages"][language]["counts"]


def mostly_ascii(num_lines: int, num_broken: int) -> bytes:
    """English with evenly spread broken lines, so that the start of the file is not conspicuous."""
    every = num_lines // max(1, num_broken)
    lines = [b"\xe9t\xe9 number %d" % n if n % every == every - 1 else b"line number %d" % n for n in range(num_lines)]
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    ("num_lines", "num_broken", "is_rejected"),
    [(1000, 100, True), (1000, 40, False), (10, 1, False), (20, 2, False), (20, 4, True)],
)
def test_the_share_of_broken_lines_decides(
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_lines: int,
    num_broken: int,
    is_rejected: bool,
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "en.txt").write_bytes(mostly_ascii(num_lines, num_broken))
    assert prepare(tiny_tokenizer, tmp_path) == (2 if is_rejected else 0)
    said = capsys.readouterr().err
    assert f"{num_broken} of {num_lines} lines" in said
    assert f"line {num_lines // num_broken}" in said
    assert ("iconv -f ISO-8859-1 -t UTF-8" in said) == is_rejected
    assert ("warning: en: " in said) != is_rejected
    assert prepare(tiny_tokenizer, tmp_path, "--max-broken-lines", "0.5") == 0


def test_a_file_in_another_encoding_is_rejected_and_the_files_before_it_are_kept(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "en"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"part-{number}.txt").write_bytes(mostly_ascii(3000, 0).replace(b"line", b"part %d" % number))
    in_documents = mostly_ascii(6000, 600).replace(b"9\n", b"9\n\n")  # shards are made before all of it is read
    (folder / "part-2.txt").write_bytes(in_documents)
    sizes = ("--shard-tokens", "3000", "--block-bytes", "20000")
    assert prepare(tiny_tokenizer, tmp_path, *sizes) == 2
    assert (
        "en/part-2.txt: 600 of 6000 lines (10%) are not UTF-8, the first is line 10: '\\\\xe9t\\\\xe9 number 9'"
        in error_of(capsys)
    )
    kept = {name: data for name, data in content(tmp_path / "out").items() if name.endswith(".tok")}
    assert kept
    (folder / "part-2.txt").write_bytes(in_documents.decode("latin-1").encode())
    assert prepare(tiny_tokenizer, tmp_path, *sizes) == 0
    finished = content(tmp_path / "out")
    assert {name: finished[name] for name in kept} == kept
    ShardSet(tmp_path / "out")


def test_a_share_of_0_accepts_no_broken_line(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "en.txt").write_bytes(mostly_ascii(100, 1))
    assert prepare(tiny_tokenizer, tmp_path, "--max-broken-lines", "0") == 2
    assert prepare(tiny_tokenizer, tmp_path, "--max-broken-lines", "0.001") == 0


@pytest.mark.parametrize("is_rejected", [True, False])
def test_a_resumed_run_judges_the_complete_file(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_rejected: bool
) -> None:
    """Rejected: 100 of 1000 lines, all before the point of resumption. Not rejected: 100 of 2100, all behind it."""
    folder, sizes = tmp_path / "in" / "en", ("--shard-tokens", "1500", "--block-bytes", "2000")
    folder.mkdir(parents=True)
    good = [b"line number %d\n" % number for number in range(2000)]
    parts = [mostly_ascii(500, 100), *good[:500]] if is_rejected else [*good, mostly_ascii(100, 100)]
    (folder / "part-0.txt").write_bytes(b"\n".join(good))
    (folder / "part-1.txt").write_bytes(b"".join(parts).replace(b"\n", b"\n\n"))
    assert prepare(tiny_tokenizer, tmp_path, *sizes, "--max-broken-lines", "1") == 0
    expected, entries = content(tmp_path / "out"), Journal.read(tmp_path / "out" / "en").entries
    stop_after(tmp_path / "out", "en", max(n for n, one in enumerate(entries, 1) if one.source == 1 and one.lines))
    capsys.readouterr()
    assert prepare(tiny_tokenizer, tmp_path, *sizes) == (2 if is_rejected else 0)
    if is_rejected:
        assert "100 of 1000 lines (10%) are not UTF-8, all in the part that an earlier run read" in error_of(capsys)
        assert prepare(tiny_tokenizer, tmp_path, *sizes) == 2
        assert "100 of 1000 lines (10%) are not UTF-8, the first is line" in error_of(capsys)
        assert prepare(tiny_tokenizer, tmp_path, *sizes, "--max-broken-lines", "1") == 0
    assert content(tmp_path / "out") == expected


def test_the_printed_command_works_for_a_name_that_is_not_utf8(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "en"
    folder.mkdir(parents=True)
    name = os.fsdecode(b"it's \xe9.txt")
    (folder / name).write_bytes(mostly_ascii(100, 50))
    assert prepare(tiny_tokenizer, tmp_path) == 2
    command = "iconv -f " + error_of(capsys).split("iconv -f ", 1)[1].split(". Then run")[0]
    subprocess.run(["bash", "-c", command], check=True)
    assert (folder / name).read_bytes() == mostly_ascii(100, 50).decode("latin-1").encode()
    assert prepare(tiny_tokenizer, tmp_path) == 0


def test_many_small_files_are_judged_together(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "en"
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number:02d}.txt").write_bytes(b"\xe9t\xe9 %d\n" % number)
    assert prepare(tiny_tokenizer, tmp_path) == 2
    assert "20 of 20 lines (100%) are not UTF-8, the first in line 1 of" in error_of(capsys)
    assert set(content(tmp_path / "out")) == {"prepare.json", "en/journal.jsonl"}


@pytest.mark.parametrize(("language", "encoding"), [("zh-Hans", "GB18030"), ("ja", "EUC-JP"), ("ru", "KOI8-R")])
def test_few_records_in_another_encoding_are_rejected_with_the_command_for_it(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], language: str, encoding: str
) -> None:
    """So few that the start of the file is not rejected."""
    lines = [line for line in sample(language).splitlines() if len(line) > 20 and not {*line} & {*'\\"'}][:9]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"{language}.jsonl"
    path.write_bytes("".join(f'{{"text": "{line}"}}\n' for line in lines).encode(encoding, "ignore"))
    assert prepare(tiny_tokenizer, tmp_path) == 2
    error = error_of(capsys)
    assert f"They look like {encoding}; " in error
    subprocess.run(["bash", "-c", "iconv" + error.split("iconv", 1)[1].split(". Then run")[0]], check=True)
    assert prepare(tiny_tokenizer, tmp_path) == 0


def test_broken_bytes_of_records_are_those_of_the_file(tmp_path: Path) -> None:
    broken, halves = b"no\xebl \xe2\x82 noir", b"\\ud83d and \\ude00"
    (tmp_path / "en.jsonl").write_bytes(b"".join(b'{"text": "%s"}\n' % line for line in (broken, halves)))
    text = b"".join(Source("en", tmp_path / "en.jsonl", "en.jsonl").chunks())
    assert text == broken + b"\n\n" + b"\xed\xa0\xbd and \xed\xb8\x80\n\n"


def test_a_packed_file_named_txt_is_rejected(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "de.txt").write_bytes(lzma.compress(sample("de").encode()))
    assert prepare(tiny_tokenizer, tmp_path) == 2
    assert "It starts like a .xz file: rename it with that ending." in error_of(capsys)


def test_broken_text_fail_names_the_file(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "en.txt").write_bytes(b"good\nbad \xff\n")
    assert prepare(tiny_tokenizer, tmp_path, "--broken-text", "fail") == 2
    assert f"en: {tmp_path}/in/en.txt, in the text after line 0: 1 lines of a block are not UTF-8" in error_of(capsys)


def test_utf8_encoded_twice_gives_a_warning(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "de.txt").write_text(sample("de").encode().decode("latin-1"))
    assert prepare(tiny_tokenizer, tmp_path) == 0
    assert "characters look as if UTF-8 had been read in another encoding" in capsys.readouterr().err
    assert main(["stats", str(tmp_path / "out")]) == 0
    assert "encoded twice |" in capsys.readouterr().out
