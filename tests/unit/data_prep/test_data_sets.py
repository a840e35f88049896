"""Data sets of a directory in the hub's layout: languages by config, what is rejected, and the same shards after any stop."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import datasets  # here once, and not in every process that lists files
import pyarrow.parquet
import pytest

from data_prep.discovery import LanguageRules, survey
from data_prep.journal import JOURNAL_NAME
from data_prep.languages import CC100, OF_CODE, language_of_code
from data_prep.shards import DataError, ShardSet
from data_prep.sources import CorruptSource, ReadOptions, Source
from data_prep.where import Where
from tests.conftest import REPO
from tests.unit.data_prep.corpus import content, run_command
from tests.unit.data_prep.small_data_set import SMALL, sources, stop_after, write_data_set


def test_codes_of_languages() -> None:
    names = {"deu_Latn": "de", "cmn_Hani": "zh-Hans", "zho_Hant": "zh-Hant", "arb_Arab": "ar", "iw": "he", "20231101.sw": "sw",
             "hin_Latn": "hi_rom", "de": "de", "zh-Hans": "zh-Hans", "srp_Latn": None, "deu_Latn_removed": None,
             "default": None, "zh": None, "zho": None, "als": None, "swe": "sv", "hin": "hi"}  # fmt: skip
    assert {code: language_of_code(code) for code in names} == names
    assert set(OF_CODE.values()) == CC100 - {"my_zaw"}
    assert not set(OF_CODE) & CC100


def test_languages_come_from_configs_the_map_and_the_option(local: Path, tmp_path: Path) -> None:
    given = f"hf:{local}"
    german = [f"{given}/data/deu_Latn/train/000.parquet", f"{given}/data/deu_Latn/train/001.parquet"]
    assert sources(f"{given}:deu_Latn", LanguageRules()) == {"de": german}
    assert sources(f"{given}:deu_Latn:test", LanguageRules()) == {"de": german[:1]}
    mapping = tmp_path / "map"
    mapping.write_text("deu_Latn de\n*:swe_* sv\n*.txt -\n")
    rules = LanguageRules.read(mapping, None)
    surveyed = survey([given], rules, ReadOptions())
    assert {language: len(some) for language, some in surveyed.sources.items()} == {"de": 2, "sv": 2}
    assert [one.path for one in surveyed.not_taken] == [f"{given}:deu_Latn_removed", f"{given}:no"]
    assert surveyed.unmatched == ["*.txt"]
    assert sources(given, LanguageRules.read(mapping, "de")) == {"de": german, "sv": []}
    assert list(sources(f"{given}:deu_Latn_removed", LanguageRules(language="de"))) == ["de"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "",
            r"has 4 configs: deu_Latn, swe_Latn, deu_Latn_removed, no\. Name one .*:deu_Latn\), or several with --language-map",
        ),
        (":deu_latn", r"no config 'deu_latn' among its 4\. Some of them: deu_Latn"),
        (
            ":deu_Latn:validation",
            r"no split 'validation'; config 'deu_Latn' has train, test\. Name one: hf:.*:deu_Latn:train",
        ),
        (":deu_Latn_removed", r"cannot tell the language of config 'deu_Latn_removed'.*--language-map FILE"),
        (":a:b:c", r"write hf:NAME\[@REVISION\]"),
        ("::train", r"write hf:NAME\[@REVISION\]"),
    ],
)
def test_a_data_set_that_cannot_be_read_as_asked_is_named(local: Path, config: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        survey([f"hf:{local}{config}"], LanguageRules(), ReadOptions())


def test_a_copy_of_a_part_of_a_data_set_is_read(tmp_path: Path, local: Path) -> None:
    """README.md names more configs than were copied."""
    part = "data/swe_Latn/train"
    shutil.copytree(local / part, tmp_path / "copy" / part)
    shutil.copy(local / "README.md", tmp_path / "copy")
    assert list(sources(f"hf:{tmp_path / 'copy'}:swe_Latn", LanguageRules())) == ["sv"]
    with pytest.raises(DataError, match=r"'deu_Latn': there are no files data/deu_Latn/train/\* in .*copy"):
        sources(f"hf:{tmp_path / 'copy'}:deu_Latn", LanguageRules())


def test_files_of_another_kind_are_left_out_with_the_reason(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.csv", "LICENSE"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    surveyed = survey([f"hf:{tmp_path}"], LanguageRules(language="de"), ReadOptions())
    assert [source.path.name for source in surveyed.sources["de"]] == ["a.jsonl", "b.jsonl"]
    assert {Path(one.path).name: one.reason for one in surveyed.not_taken} == {
        "c.csv": "of another kind than most files of the data set",
        "LICENSE": "no text of a language (README, LICENSE, checksums)",
    }


@pytest.mark.parametrize("path", ["../outside.jsonl", "../outside.csv", "/{}/outside.jsonl"])
def test_files_outside_of_a_local_data_set_are_not_read(tmp_path: Path, path: str) -> None:
    """README.md of a copied data set may name any file of this machine."""
    for name in ("outside.jsonl", "outside.csv"):
        (tmp_path / name).write_text('{"text": "not meant for this"}\n')
    (tmp_path / "in").mkdir()
    path = path.format(str(tmp_path).strip("/"))
    (tmp_path / "in" / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files: {path}\n---\n")
    with pytest.raises(DataError, match=r"its README\.md names a file outside of the data set, .*outside"):
        sources(f"hf:{tmp_path / 'in'}:en", LanguageRules())


def test_files_that_are_links_are_read(tmp_path: Path) -> None:
    """The cache of huggingface_hub has a directory of links for each commit."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "abc").write_text('{"text": "a"}\n')
    (tmp_path / "snapshot" / "train.jsonl").symlink_to(Path("..") / "blobs" / "abc")
    given = f"hf:{tmp_path / 'snapshot'}"
    assert sources(given, LanguageRules(language="de")) == {"de": [f"{given}/train.jsonl"]}


def test_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "train.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}')
    with pytest.raises(DataError, match=r"\.zip archives, which are not read"):
        sources(f"hf:{tmp_path / 'zipped'}", LanguageRules(language="de"))


@pytest.mark.parametrize("name", ["train.jsonl.lz4", "train.parquet.gz"])
def test_a_config_without_a_file_that_is_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"packed")
    with pytest.raises(DataError, match=rf"config 'default': its data files are of kinds that are not read: .*/{name}"):
        sources(f"hf:{tmp_path / 'in'}", LanguageRules(mapping=[("default", "de")]))


def test_a_saved_data_set_that_the_map_leaves_out_is_not_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["Hej."]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "de.txt").write_text("Eine Zeile.\n")
    given = [f"hf:{tmp_path / 'saved'}", str(tmp_path / "de.txt")]
    surveyed = survey(given, LanguageRules(mapping=[("default", "-")]), ReadOptions())
    assert list(surveyed.sources) == ["de"]
    assert [one.path for one in surveyed.not_taken] == [f"{given[0]}:default"]


@pytest.mark.parametrize("kind", ["csv", "saved"])
def test_other_formats_are_read_by_the_library(tmp_path: Path, tiny_tokenizer: Path, kind: str) -> None:
    table = datasets.Dataset.from_dict({"text": ["Hej.", None, "Hej då."], "n": [1, 2, 3]})
    if kind == "csv":
        (tmp_path / "in").mkdir()
        table.to_csv(tmp_path / "in" / "train.csv")
    else:
        table.save_to_disk(tmp_path / "in")
    given = f"hf:{tmp_path / 'in'}"
    surveyed = survey([given], LanguageRules(language="sv"), ReadOptions(where=Where.parse(["n >= 2"])))
    (source,) = surveyed.sources["sv"]
    assert b"".join(source.chunks()) == "Hej då.\n\n".encode()
    assert source.counts == {"records_null": 1, "records_where_not_met": 1}
    assert run_command(Path(given), tiny_tokenizer, tmp_path / "out", "--language", "sv") == 0
    assert ShardSet(tmp_path / "out").num_documents("sv") == 2


@pytest.mark.parametrize("kind", ["csv", "saved"])
def test_a_local_data_set_that_changed_is_not_taken_for_the_one_in_the_output(
    tmp_path: Path, tiny_tokenizer: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*texts: str) -> None:
        table = datasets.Dataset.from_dict({"text": texts})
        (tmp_path / "in").mkdir(exist_ok=True)
        if kind == "csv":
            table.to_csv(tmp_path / "in" / "train.csv")
        else:
            table.save_to_disk(tmp_path / "in")

    def prepare() -> int:
        return run_command(Path(f"hf:{tmp_path / 'in'}"), tiny_tokenizer, tmp_path / "out", "--language", "sv")

    write("Hej.", "Hej hej.")
    assert prepare() == 0
    write("Hej.", "Hej hej.")  # other dates, the same content
    assert prepare() == 0
    write("Hej.", "Inte hej.")
    assert prepare() == 2
    assert "is not the file that" in capsys.readouterr().err


def test_files_without_parts_are_read_file_by_file(local: Path) -> None:
    """JSON lines as mC4 has them, in a directory without a README."""
    assert sources(f"hf:{local / 'multilingual'}", LanguageRules(language="no")) == {
        "no": [f"hf:{local / 'multilingual'}/c4-no.{number}.json.gz" for number in range(2)]
    }


def uninterrupted(given: str, tokenizer: Path, output: Path, *more: str) -> dict[str, bytes]:
    assert run_command(Path(given), tokenizer, output, *SMALL, *more) == 0
    assert len(ShardSet(output).all_shards()) > 4
    return content(output)


def with_rows(path: Path, copy: Path, rows: dict[int, str | None]) -> Path:
    """A copy of a Parquet file of the small data set with other texts in some rows."""
    table = pyarrow.parquet.read_table(path)
    texts = [rows.get(number, text) for number, text in enumerate(table["text"].to_pylist())]
    pyarrow.parquet.write_table(table.set_column(1, "text", [texts]), copy, row_group_size=40, compression="none")
    return copy


@pytest.mark.usefixtures("small_parts")
def test_blocks_from_a_place_are_those_of_a_read_from_the_start(local: Path, tmp_path: Path) -> None:
    """With their lines and hashes, which depend on all text before them; and messages name the row of the file."""
    path = local / "data" / "deu_Latn" / "train" / "000.parquet"
    source = Source("de", path, path.name, in_parts=True)
    blocks = list(source.blocks(1500))
    lines = [block.text.count(b"\n") for block in blocks]
    assert [block.first_line for block in blocks] == [sum(lines[:number]) for number in range(len(blocks))]
    first = next(number for number, block in enumerate(blocks) if block.place and block.place.part == 2)
    assert list(source.blocks(1500, blocks[first].place)) == blocks[first:]
    other = Source("de", with_rows(path, tmp_path / "other.parquet", {0: "Etwas anderes."}), path.name, in_parts=True)
    assert {block.digest for block in other.blocks(1500)}.isdisjoint(block.digest for block in blocks)
    bad = with_rows(path, tmp_path / "bad.parquet", {310: None})
    with pytest.raises(CorruptSource, match="of row 311 is null"):
        list(Source("de", bad, path.name, ReadOptions(bad_records="fail"), in_parts=True).blocks(1500))


def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that this process reads, in order."""
    read: list[int] = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self: Any, *arguments: Any, row_groups: list[int], **keywords: Any) -> Any:
        read.extend(row_groups)
        return real(self, *arguments, row_groups=row_groups, **keywords)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    return read


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("more", [(), ("--where", "language_score >= 0.2"), ("--dedup", "lines")], ids=" ".join)
def test_a_run_that_was_stopped_anywhere_makes_the_same_shards(
    local: Path, tiny_tokenizer: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    given, output = f"hf:{local}:deu_Latn", tmp_path / "out"
    expected = uninterrupted(given, tiny_tokenizer, output, *more)
    num_entries = len((output / "de" / JOURNAL_NAME).read_bytes().splitlines())
    for stopped_after in range(1, num_entries, 5):
        stop_after(output, "de", stopped_after)
        workers = ("--workers", str(1 + stopped_after % 2))
        assert run_command(Path(given), tiny_tokenizer, output, *SMALL, *more, *workers) == 0
        assert content(output) == expected


@pytest.mark.usefixtures("small_parts")
def test_row_groups_before_the_last_shard_are_not_read_again(
    local: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, output = f"hf:{local}:deu_Latn", tmp_path / "out"
    uninterrupted(given, tiny_tokenizer, output)
    lines = (output / "de" / JOURNAL_NAME).read_bytes().splitlines()
    entries = [json.loads(line.partition(b" ")[2]) for line in lines]
    number = next(n for n, entry in enumerate(entries) if entry["source"] == 1 and entry["place"]["part"] >= 2)
    stop_after(output, "de", number + 1)
    read = groups_read(monkeypatch)
    assert run_command(Path(given), tiny_tokenizer, output, *SMALL) == 0
    starts = [read[n] for n in range(len(read)) if n and read[n] <= read[n - 1]] or read[:1]
    assert (
        starts[-1] == 2 * entries[number]["place"]["part"]
    )  # the job itself reads last; checks before it read the first
    assert read[-1] == 7


@pytest.mark.usefixtures("small_parts")
def test_a_local_file_that_changed_meanwhile_is_read_from_its_start_and_rejected(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_data_set(tmp_path / "texts")
    given, output = f"hf:{root}:deu_Latn", tmp_path / "out"
    uninterrupted(given, tiny_tokenizer, output)
    stop_after(output, "de", 2)
    path = root / "data" / "deu_Latn" / "train" / "000.parquet"
    with_rows(path, path, {0: "Etwas anderes."})
    assert run_command(Path(given), tiny_tokenizer, output, *SMALL) == 2
    assert "are not those that" in capsys.readouterr().err


def test_without_the_library_its_versions_are_named(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (versions,) = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]["hub"]
    with pytest.raises(DataError, match=rf"need the package datasets: .* -m pip install '{re.escape(versions)}'"):
        sources(f"hf:{local}:deu_Latn", LanguageRules())
