"""Every kind of input gives the same text, and every kind of corruption is named with file and offset."""

from __future__ import annotations

import gzip
import json
import lzma
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.blocks import cut_blocks
from data_prep.clean import CleanOptions, clean, split_documents
from data_prep.discovery import LanguageRules
from data_prep.shards import DataError
from data_prep.sources import CorruptSource, ReadOptions, Source
from tests.unit.data_prep.corpus import discover

TEXT = "Erste Zeile\nzweite Zeile\n\nNächstes Dokument\n\n" * 3000
RECORDS = [document for document in TEXT.split("\n\n") if document]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def read(path: Path, text_field: str = "text") -> bytes:
    return b"".join(Source("de", path, path.name, ReadOptions(text_field)).chunks())


PACKERS = {"": bytes, ".xz": partial(lzma.compress, preset=0), ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("parts", [1, 2])  # two: concatenated streams, as `cat a.xz b.xz` makes them
def test_text_and_json_lines_packed_in_any_way_read_the_same(tmp_path: Path, packing: str, parts: int) -> None:
    json_lines = "".join(json.dumps({"text": record, "id": 1}, ensure_ascii=False) + "\n" for record in RECORDS)
    for suffix, content in ((".txt", TEXT), (".jsonl", json_lines)):
        raw = content.encode()
        cut = raw.index(b"\n", len(raw) // 2) + 1 if parts == 2 else len(raw)
        path = tmp_path / f"de{suffix}{packing}"
        path.write_bytes(b"".join(PACKERS[packing](part) for part in (raw[:cut], raw[cut:]) if part))
        assert read(path) == TEXT.encode()


def test_parquet_reads_the_same_and_other_fields_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "de.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": RECORDS, "n": range(len(RECORDS))}), path)
    assert read(path, "content") == TEXT.encode()
    with pytest.raises(CorruptSource, match="no column 'text'; its columns are content, n"):
        read(path)


def test_a_hub_dataset_directory_streams(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": RECORDS}), directory / "train.parquet")
    source = discover([f"hf:{directory}"], LanguageRules(language="de"))["de"][0]
    assert b"".join(source.chunks()) == TEXT.encode()
    with pytest.raises(DataError, match="--language xx"):
        discover([f"hf:{directory}"], LanguageRules())
    with pytest.raises(DataError, match=r"there is no directory .*nothing"):
        discover([f"hf:{tmp_path / 'nothing'}"], LanguageRules(language="de"))


def test_blank_lines_inside_a_record_do_not_end_its_document(tmp_path: Path) -> None:
    path = tmp_path / "de.jsonl"
    path.write_text('{"text": "a\\n\\n  \\nb"}\n\n{"text": ""}\n{"text": "c"}')
    assert read(path) == b"a\nb\n\nc\n\n"


def test_invalid_characters_in_json_lines_are_left_to_the_cleaning_options(tmp_path: Path) -> None:
    """A byte that is not UTF-8 and a lone surrogate: both give invalid UTF-8, so `--broken-text` decides."""
    path = tmp_path / "de.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "gut"}\n{"text": "ein \xff Byte"}\n{"text": "halb \\ud800"}\n')
    lines, documents = split_documents(read(path))
    assert lines[0] == b"gut"
    replaced, _, counts = clean(lines, documents, "de", CleanOptions())
    assert counts["lines_broken"] == 2
    assert [line.decode().replace("\ufffd", "") for line in replaced] == ["gut", "ein  Byte", "halb "]
    assert clean(lines, documents, "de", CleanOptions(broken_text="skip"))[0] == [b"gut"]


@pytest.mark.parametrize("packing", [".xz", ".gz", ".zst"])
def test_a_truncated_file_gives_its_complete_blocks_and_the_offset(tmp_path: Path, packing: str) -> None:
    lines = "".join(f"Zeile {number} {number * 7919 % 10007}\n\n" for number in range(120_000))
    packed = PACKERS[packing](lines.encode())
    path = tmp_path / f"de.txt{packing}"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    got: list[bytes] = []
    blocks = (block.text for block in cut_blocks(Source("de", path, path.name).chunks()))
    with pytest.raises(CorruptSource, match=rf"stopped at byte {path.stat().st_size} of {path.stat().st_size} "):
        got.extend(blocks)
    assert len(b"".join(got)) > 1_000_000
    assert lines.encode().startswith(b"".join(got))


@pytest.mark.parametrize("packing", [".xz", ".gz", ".zst"])
def test_a_corrupt_file_is_named_with_the_offset(tmp_path: Path, packing: str) -> None:
    packed = bytearray(PACKERS[packing](TEXT.encode() * 5))
    packed[len(packed) // 2] ^= 0x55
    path = tmp_path / f"de.txt{packing}"
    path.write_bytes(packed)
    with pytest.raises(CorruptSource, match=r"de\.txt.* is corrupt or truncated: reading stopped at byte \d+"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "complete"}\n{"text": "cut', "line 2 is not JSON"),
        (
            '{"body": "other field", "id": 1}\n',
            "1 of its first 1 records have no field 'text'; they have body, id.*--text-field",
        ),
        ("[1, 2]\n", "line 1 is a JSON array; each line must hold one record"),
        ('{"text": 5}\n', "field 'text' is int in 1 of its first 1 records, not text"),
        ('{"text": "deep", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1 nests its values too deeply"),
    ],
)
def test_invalid_json_lines_are_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "de.jsonl"
    path.write_text(line)
    with pytest.raises(CorruptSource, match=message):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 200,
        TEXT.encode("utf-16"),
        "你好，世界。\n".encode("gb18030") * 500,
        b"\x7fELF" + bytes(5000),
    ],
    ids=["random", "utf-16", "gb18030", "program"],
)
def test_files_that_are_not_utf8_text_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "zh-Hans.txt"
    path.write_bytes(content)
    with pytest.raises(CorruptSource, match=r"not text in UTF-8.*iconv"):
        read(path)


def test_a_byte_order_mark_is_removed_and_an_empty_xz_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert read(tmp_path / "en.txt") == b"hello\n"
    (tmp_path / "en.txt.xz").write_bytes(b"")
    with pytest.raises(CorruptSource, match="byte 0 of 0"):
        read(tmp_path / "en.txt.xz")


def test_languages_come_from_names_folders_and_mapping(tmp_path: Path) -> None:
    for name in ("zh-Hans.txt.xz", "my_zaw.txt", "sw/part-1.jsonl", "sw/part-2.jsonl.gz", "corpus-fr.txt", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    mapping = tmp_path / "languages.map"
    mapping.write_text("# pattern language\ncorpus-*.txt fr\nnotes.txt -\n")
    found = discover([str(tmp_path)], LanguageRules.read(mapping, None))
    assert {language: [source.name for source in sources] for language, sources in found.items()} == {
        "fr": ["corpus-fr.txt"],
        "my_zaw": ["my_zaw.txt"],
        "sw": ["sw/part-1.jsonl", "sw/part-2.jsonl.gz"],
        "zh-Hans": ["zh-Hans.txt.xz"],
    }
    with pytest.raises(DataError, match=r"corpus-fr\.txt: cannot tell its language.*--language-map"):
        discover([str(tmp_path)], LanguageRules())
    with pytest.raises(DataError, match=r"No text of language de .*It holds: fr, my_zaw, sw, zh-Hans"):
        discover([str(tmp_path)], LanguageRules.read(mapping, "de"))
    assert list(discover([str(tmp_path / "notes.txt")], LanguageRules(language="xyz"))) == ["xyz"]


@pytest.mark.parametrize(
    ("inputs", "language", "message"),
    [
        (["missing.txt"], None, "does not exist"),
        (["table.csv"], None, r"unknown kind of file; known are \*\.txt"),
        (["empty"], None, r"No text in .*Looked for \*\.txt"),
        (["notes.txt"], "../up", "not a language name"),
        (["en.txt", "folder/en.txt"], None, "two input files are named en.txt"),
    ],
)
def test_invalid_input_is_named(tmp_path: Path, inputs: list[str], language: str | None, message: str) -> None:
    for name in ("table.csv", "notes.txt", "en.txt", "folder/en.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        discover([str(tmp_path / name) for name in inputs], LanguageRules.read(None, language))


@pytest.mark.parametrize("line", ["one two three", "only-pattern", "x.txt ../up"])
def test_an_invalid_mapping_line_is_named_by_number(tmp_path: Path, line: str) -> None:
    mapping = tmp_path / "languages.map"
    mapping.write_text("a.txt en\n" + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        LanguageRules.read(mapping, None)
