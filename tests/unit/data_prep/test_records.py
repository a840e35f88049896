"""Records without text are counted and left out, or are an error; a wrong field name is reported and not recorded."""

from __future__ import annotations

import gzip
import json
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.__main__ import main
from data_prep.discovery import LanguageRules
from data_prep.shards import DataError, Explained, ShardSet
from data_prep.sources import CorruptSource, ReadOptions, Source, WrongTextField
from pipeline.evaluation.library_data import load_table
from tests.unit.data_prep.corpus import discover, run_command

GOOD = [{"text": f"Mening nummer {number}.", "id": number} for number in range(300)]
WITHOUT_TEXT: list[dict[str, Any]] = [
    {"text": None},
    {"text": ""},
    {"text": " \n\u3000"},
    {"id": 1},
    {"text": 5},
    {"text": ["a"]},
]
COUNTS = {"records_null": 1, "records_empty": 2, "records_without_field": 1, "records_not_text": 2}


def write(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path, **options: Any) -> bytes:
    return b"".join(Source("sv", path, path.name, ReadOptions(**options)).chunks())


def prepare(tokenizer: Path, root: Path, *more: str) -> int:
    return run_command(root / "in", tokenizer, root / "out", *more)


def test_records_without_text_are_counted_and_left_out(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in" / "sv.jsonl", [*GOOD[:150], *WITHOUT_TEXT, *GOOD[150:]])
    sizes = ("--shard-tokens", "600", "--block-bytes", "500")
    assert prepare(tiny_tokenizer, tmp_path, *sizes) == 0
    told = "6 records have no text and were left out (1 without the field, 1 null, 2 empty, 2 not text)"
    assert f"warning: sv: {told}" in capsys.readouterr().err
    entry = ShardSet(tmp_path / "out").manifest["languages"]["sv"]
    assert entry["documents"] == 300
    assert {name: entry["counts"][name] for name in COUNTS} == COUNTS
    assert entry["sources"][0]["counts"] == COUNTS
    journal = tmp_path / "out" / "sv" / "journal.jsonl"  # interrupted after the second shard: nothing is counted twice
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    assert prepare(tiny_tokenizer, tmp_path, *sizes) == 0
    assert ShardSet(tmp_path / "out").manifest["languages"]["sv"] == entry
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_record_without_text_may_be_an_error(tmp_path: Path) -> None:
    for record, problem in zip(
        WITHOUT_TEXT, ("null", "empty", "empty", "missing", "int, not text", "list, not text"), strict=True
    ):
        path = write(tmp_path / "sv.jsonl", [*GOOD[:3], record, *GOOD[3:]])
        with pytest.raises(CorruptSource, match=f"field 'text' of line 4 is {problem}.*--bad-records skip") as failure:
            read(path, bad_records="fail")
        assert "corrupt" not in str(failure.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_wrong_field_is_reported_before_any_work_and_not_recorded(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "en.txt").write_text("A line of English.\n")
    records = [{"content": record["text"], "id": record["id"]} for record in GOOD]
    if kind == "jsonl":
        write(tmp_path / "in" / "sv.jsonl", records)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in" / "sv.parquet")
    assert prepare(tiny_tokenizer, tmp_path) == 2
    said = capsys.readouterr().err
    assert "'text'" in said
    assert "content, id" in said
    assert "--text-field" in said
    assert "corrupt" not in said
    assert not (tmp_path / "out").exists()
    assert prepare(tiny_tokenizer, tmp_path, "--text-field", "content") == 0
    assert ShardSet(tmp_path / "out").num_documents("sv") == 300


def test_options_of_an_output_without_shards_may_change(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """The first file has the field and the second does not, so the output has been begun and holds no shard."""
    write(tmp_path / "in" / "sv" / "1.jsonl", GOOD[:5])
    write(tmp_path / "in" / "sv" / "2.jsonl", [{"content": "Hej."}] * 5)
    assert prepare(tiny_tokenizer, tmp_path) == 2
    write(tmp_path / "in" / "sv" / "1.jsonl", [{"content": "Hej igen."}] * 5)
    assert prepare(tiny_tokenizer, tmp_path, "--text-field", "content") == 0
    assert prepare(tiny_tokenizer, tmp_path) == 2  # now it holds a language


def test_text_in_a_field_of_another_type_is_a_wrong_field(tmp_path: Path) -> None:
    path = write(tmp_path / "sv.jsonl", [{"text": {"sv": "Hej."}}] * 3)
    with pytest.raises(
        WrongTextField, match=r"field 'text' is dict in 3 of its first 3 records, not text.*--text-field"
    ):
        read(path)


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_printed_command_converts_a_json_array(tmp_path: Path, packing: str, indent: int | None) -> None:
    path = tmp_path / f"sv 1.jsonl{packing}"
    text = json.dumps(GOOD, indent=indent).encode()
    path.write_bytes(gzip.compress(text) if packing else text)
    with pytest.raises(
        CorruptSource, match=r"line 1 (is a JSON array|begins a JSON text).*each line must hold one record"
    ) as failure:
        read(path)
    command = str(failure.value).split("Convert it: ")[1].split(". Then run")[0]
    subprocess.run(["bash", "-c", command], check=True)
    assert read(path).count(b"\n\n") == len(GOOD)


def test_json_with_marks_duplicate_keys_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "sv.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a", "score": NaN}\r\n\r\n\xef\xbb\xbf{"text": "b", "text": "c"}\r{"text": "d\\re"}'
    )
    assert read(path) == b"a\n\nc\n\nd\ne\n\n"
    path.write_bytes(json.dumps({"text": "a"}).encode("utf-16"))
    with pytest.raises(CorruptSource, match="iconv -f UTF-16"):
        read(path)


COLUMNS = {
    "string": pyarrow.string(),
    "large string": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "binary": pyarrow.binary(),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_parquet_columns_of_text_are_read_without_their_nulls(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sv.parquet"
    texts = pyarrow.array(["Hej.", None, "", "Hej då.", "Hej."]).cast(COLUMNS[kind])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    source = Source("sv", path, path.name)
    assert b"".join(source.chunks()).decode() == "Hej.\n\nHej då.\n\nHej.\n\n"
    assert source.counts == {"records_null": 1, "records_empty": 1}


def test_parquet_columns_without_text_are_rejected_with_their_type(tmp_path: Path) -> None:
    path = tmp_path / "sv.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a", "b"]], "n": [1]}), path)
    with pytest.raises(WrongTextField, match=r"column 'text' is of type list<.*n \(int64\).*--text-field"):
        read(path)


def test_invalid_utf8_in_parquet_is_left_to_the_cleaning_options(tmp_path: Path) -> None:
    path = tmp_path / "sv.parquet"
    raw = pyarrow.array([b"f\xf6rst"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    assert read(path) == b"f\xf6rst\n\n"


def test_records_of_a_dataset_follow_the_same_rules(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["Hej.", None, ""], "n": [1, 2, 3]}), directory / "train.parquet"
    )
    source = discover([f"hf:{directory}"], LanguageRules(language="sv"))["sv"][0]
    assert b"".join(source.chunks()) == b"Hej.\n\n"
    assert source.counts == {"records_null": 1, "records_empty": 1}
    source = discover([f"hf:{directory}"], LanguageRules(language="sv"), "body")["sv"][0]
    with pytest.raises(DataError, match=r"no column 'body'; its columns are text, n.*--text-field"):
        list(source.chunks())


def test_json_lines_in_a_txt_file_give_a_warning(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in" / "sv.txt", GOOD)
    assert prepare(tiny_tokenizer, tmp_path) == 0
    assert "1 files named .txt hold JSON records, which were read as text" in capsys.readouterr().err


def test_a_dataset_runs_no_script_and_no_reader_that_unpickles(tmp_path: Path) -> None:
    """A script in the directory of the data, and a tar archive, whose tensors the reader of the library would unpickle."""
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    archive = tmp_path / "archive"
    archive.mkdir()
    (tmp_path / "one.txt").write_text("Hej.")
    with tarfile.open(archive / "train.tar", "w") as file:
        file.add(tmp_path / "one.txt", "one.txt")
    for directory, message in (
        (script, "the data set is a script, and no script is run"),
        (archive, "is read by 'webdataset'"),
    ):
        with pytest.raises(DataError, match=message):
            discover([f"hf:{directory}"], LanguageRules(language="sv"))
        with pytest.raises(Explained, match="datasets library"):
            load_table(str(directory), None, "train")
    assert not (tmp_path / "ran").exists()
