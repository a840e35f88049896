"""Data sets of a hub and of a directory in its layout: languages by config, one commit, and the same shards after any stop."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets  # here once, and not in every process that lists files
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import parquet
from data_prep.__main__ import main
from data_prep.discovery import LanguageRules, survey
from data_prep.hub_files import HubFile
from data_prep.journal import JOURNAL_NAME
from data_prep.languages import CC100, OF_CODE, language_of_code
from data_prep.manifest import DATA_SETS, begin_output, commits_of, read_run
from data_prep.shards import DataError, ShardSet
from data_prep.sources import ReadOptions
from data_prep.where import Where
from tests.conftest import REPO
from tests.unit.data_prep.corpus import content, run_command
from tests.unit.data_prep.small_hub import SmallHub

CONFIGS = {"deu_Latn": "Zeile", "swe_Latn": "rad", "deu_Latn_removed": "weg"}
SMALL = ("--shard-tokens", "1200", "--block-bytes", "1500")
FIRST, SECOND, THIRD = "a1" * 20, "b2" * 20, "c3" * 20


def write_data_set(root: Path, word: str = "") -> Path:
    """A data set with three configs, two files of eight row groups in each; mC4's way for one more config."""
    lines = ["---", "configs:"]
    for config, noun in CONFIGS.items():
        for number in range(2):
            path = root / "data" / config / "train" / f"{number:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{noun}{word} {number} {row} {row * 7919 % 10007}\n{noun} zwei" for row in range(320)]
            not_read = [row.to_bytes(2, "big") * 200 for row in range(320)]
            scores = [row / 320 for row in range(320)]
            table = pyarrow.table({"not_read": not_read, "text": texts, "language_score": scores})
            pyarrow.parquet.write_table(table, path, row_group_size=40, compression="none")
        lines += [f"- config_name: {config}", "  data_files:", "  - split: train", f"    path: data/{config}/train/*"]
        lines += ["  - split: test", f"    path: data/{config}/train/000.parquet"]
    lines += ["- config_name: 'no'", "  data_files:", "  - split: train", "    path: multilingual/c4-no.*.json.gz"]
    (root / "multilingual").mkdir()
    for number in range(2):
        records = [json.dumps({"text": f"linje {number} {row}", "url": ""}) for row in range(50)]
        (root / "multilingual" / f"c4-no.{number}.json.gz").write_bytes(gzip.compress("\n".join(records).encode()))
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


def sources(given: str, rules: LanguageRules) -> dict[str, list[str]]:
    found = survey([given], rules, ReadOptions()).sources
    return {language: [source.name for source in some] for language, some in found.items()}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two row groups."""
    monkeypatch.setattr(parquet, "PART_BYTES", 2000)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data-set") / "texts")


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


def stop_after(output: Path, language: str, num_entries: int) -> None:
    """Leave what a run leaves that was killed after some shards. The shards behind them stay, as unfinished files would."""
    journal = output / language / JOURNAL_NAME
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:num_entries]))


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
    local: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
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
    table = pyarrow.parquet.read_table(path)
    texts = ["Etwas anderes.", *table["text"].to_pylist()[1:]]
    pyarrow.parquet.write_table(table.set_column(1, "text", [texts]), path, row_group_size=40, compression="none")
    assert run_command(Path(given), tiny_tokenizer, output, *SMALL) == 2
    assert "are not those that" in capsys.readouterr().err


@pytest.fixture(scope="module")
def running_hub(local: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallHub]:
    newer = write_data_set(tmp_path_factory.mktemp("newer") / "texts", word="en")
    commits = {FIRST: str(local), SECOND: str(newer)}
    with SmallHub(tmp_path_factory.mktemp("hub"), "some/texts", commits, FIRST).running() as hub:
        yield hub


@pytest.fixture
def hub(running_hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> SmallHub:
    running_hub.change(main=FIRST, answer=None, fail_after=None)
    running_hub.use_here(monkeypatch)
    return running_hub


Prepare = Callable[..., int]


@pytest.fixture
def prepare(tiny_tokenizer: Path, tmp_path: Path) -> Prepare:
    def run(*given: str, more: tuple[str, ...] = ()) -> int:
        words = ["prepare", "--input", *given, "--tokenizer", str(tiny_tokenizer), "--output", str(tmp_path / "out")]
        return main([*words, "--workers", "1", *SMALL, *more])

    return run


@pytest.mark.usefixtures("small_parts")
def test_several_languages_of_a_hub_in_one_command(
    hub: SmallHub,
    local: Path,
    prepare: Prepare,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare("hf:some/texts:deu_Latn", "hf:some/texts:swe_Latn", "hf:some/texts:no") == 0
    assert f"input: data set some/texts at commit {FIRST}" in capsys.readouterr().err
    manifest = ShardSet(tmp_path / "out").manifest
    assert manifest["data_sets"] == {"some/texts": [FIRST]}
    address = f"hf://datasets/some/texts@{FIRST}/data/deu_Latn/train/"
    assert [one["name"] for one in manifest["languages"]["de"]["sources"]] == [
        f"{address}000.parquet",
        f"{address}001.parquet",
    ]
    assert run_command(Path(f"hf:{local}:deu_Latn"), tiny_tokenizer, tmp_path / "local", *SMALL) == 0
    assert manifest["languages"]["no"]["documents"] == 100
    assert [Path(one["name"]).name for one in manifest["languages"]["no"]["sources"]] == [
        "c4-no.0.json.gz",
        "c4-no.1.json.gz",
    ]
    for name, shard in content(tmp_path / "local" / "de").items():
        if name.endswith(".tok"):
            assert (tmp_path / "out" / "de" / name).read_bytes() == shard


@pytest.mark.usefixtures("small_parts")
def test_an_output_keeps_its_commit(
    hub: SmallHub, prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("hf:some/texts:deu_Latn") == 0
    expected = content(tmp_path / "out")
    stop_after(tmp_path / "out", "de", 2)
    hub.change(main=SECOND)
    capsys.readouterr()
    assert prepare("hf:some/texts:deu_Latn") == 0
    said = capsys.readouterr().err
    assert f"the newest revision is commit {SECOND[:12]}; the output was begun with {FIRST[:12]} and continues" in said
    assert content(tmp_path / "out") == expected
    assert prepare(f"hf:some/texts@{SECOND}:deu_Latn") == 2
    assert f"was begun with commit {FIRST}, and one output holds one revision" in capsys.readouterr().err
    assert prepare(f"hf:some/texts@{FIRST}:deu_Latn") == 0
    assert content(tmp_path / "out") == expected
    assert prepare("hf:some/texts:deu_Latn", "hf:some/texts:swe_Latn", more=("--add",)) == 0
    assert all(FIRST in one["name"] for one in ShardSet(tmp_path / "out").manifest["languages"]["sv"]["sources"])


def test_merging_two_commits_keeps_both(hub: SmallHub, prepare: Prepare, tmp_path: Path) -> None:
    assert prepare("hf:some/texts:deu_Latn") == 0
    (tmp_path / "out").rename(tmp_path / "german")
    hub.change(main=SECOND)
    assert prepare("hf:some/texts:swe_Latn") == 0
    assert main(["merge", str(tmp_path / "german"), "--from", str(tmp_path / "out")]) == 0
    manifest = ShardSet(tmp_path / "german").manifest
    assert manifest["data_sets"] == {"some/texts": [FIRST, SECOND]}
    names = {language: entry["sources"][0]["name"] for language, entry in manifest["languages"].items()}
    assert f"@{FIRST}/" in names["de"]
    assert f"@{SECOND}/" in names["sv"]


def test_two_runs_that_begin_an_output_with_two_commits(local: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """The second has looked up a newer commit before the first has written its own."""
    assert run_command(Path(f"hf:{local}:deu_Latn"), tiny_tokenizer, tmp_path / "out", *SMALL) == 0
    about = read_run(tmp_path / "out")
    begin_output(tmp_path / "out", {**about, DATA_SETS: {"some/texts": [FIRST]}}, ["de"], may_add=False)
    assert commits_of(tmp_path / "out") == {"some/texts": FIRST}
    with pytest.raises(
        DataError, match=f"begun with commit {FIRST} of some/texts, and this run found {SECOND}.*Run the same"
    ):
        begin_output(tmp_path / "out", {**about, DATA_SETS: {"some/texts": [SECOND]}}, ["de"], may_add=False)


@pytest.mark.usefixtures("small_parts")
def test_a_hub_that_fails_while_it_is_read_costs_no_finished_shard(
    hub: SmallHub, prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.hub_files.FETCHED_BYTES", 8000)
    assert prepare("hf:some/texts:deu_Latn") == 0
    expected, requests = content(tmp_path / "out"), [line for line in hub.log if " bytes=" in line]
    assert sum("001.parquet" in line for line in requests) > 4
    stop_after(tmp_path / "out", "de", 0)
    hub.change(answer=(403, ""), fail_after=len(requests) - 3)
    capsys.readouterr()
    assert prepare("hf:some/texts:deu_Latn") == 2
    assert "train/001.parquet: the hub denies access (HTTP 403)" in capsys.readouterr().err
    kept = (tmp_path / "out" / "de" / JOURNAL_NAME).read_bytes().splitlines()
    assert len(kept) > 2
    hub.change(answer=None, fail_after=None)
    assert prepare("hf:some/texts:deu_Latn") == 0
    assert content(tmp_path / "out") == expected


def test_a_file_of_the_hub_that_must_be_converted_is_read_from_a_copy(tmp_path: Path) -> None:
    """The same command would read the hub's file again."""
    address = f"hf://datasets/some/texts@{FIRST}/multilingual/c4-no.0.json.gz"
    source = HubFile("no", Path("multilingual/c4-no.0.json.gz"), address, ReadOptions())
    said = source._not_utf8("its first bytes are not", "ISO-8859-1")
    assert "give the corrected copy (hf:downloaded) in place of hf:some/texts and another --output: hf download" in said
    command = said.partition("another --output: ")[2]
    download, _, convert = command.partition(" && ")
    asked = shlex.split(download)
    assert asked[:5] == ["hf", "download", "some/texts", "--revision", FIRST]
    assert asked[-6:] == ["--include", "README.md", "--include", "multilingual/*", "--local-dir", "downloaded"]
    copy = tmp_path / "downloaded" / "multilingual" / "c4-no.0.json.gz"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(gzip.compress('{"text": "blåbær"}\n'.encode("latin-1")))
    subprocess.run(["bash", "-c", convert], cwd=tmp_path, check=True)
    assert gzip.decompress(copy.read_bytes()).decode() == '{"text": "blåbær"}\n'


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, "GatedRepo"), r"is gated\. Accept its conditions at http.*/datasets/some/texts.*hf auth login"),
        ((401, "RepoNotFound"), r"has no public data set some/texts\. Correct the name; for a private or gated one"),
        ((429, ""), r"limits the rate of requests \(HTTP 429\)\. Wait some minutes"),
        ((403, ""), r"denies access \(HTTP 403\)"),
        ((503, ""), r"answered HTTP 503\. Try later\. Finished shards are kept"),
    ],
)
def test_what_the_hub_answers_is_explained(
    hub: SmallHub, answer: tuple[int, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts after 429
    hub.change(answer=answer)
    with pytest.raises(DataError, match=message):
        sources("hf:some/texts:deu_Latn", LanguageRules())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hf:some/texts@v9:deu_Latn", r"some/texts has no such revision\. Give a branch, tag or commit"),
        ("hf:some/other:deu_Latn", r"has no public data set some/other"),
        ("hf:some/texts:deu", r"no config 'deu' among its 4"),
        ("hf:texts", r"there is no directory texts, and a data set of the hub is named OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: SmallHub, given: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sources(given, LanguageRules())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--text-field",
            "body",
            "000.parquet: there is no column 'body'; its columns are not_read, text, language_score",
        ),
        ("--where", "score >= 1", "000.parquet: --where 'score >= 1': there is no column 'score'"),
        ("--where", "not_read >= 1", "column 'not_read' is of type binary, not number"),
    ],
)
def test_a_missing_column_of_a_hub_is_named_before_anything_is_written(
    hub: SmallHub,
    prepare: Prepare,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    message: str,
) -> None:
    assert prepare("hf:some/texts:deu_Latn", more=(option, value)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_script_of_the_hub_is_not_run(hub: SmallHub, tmp_path: Path) -> None:
    (tmp_path / "texts.py").write_text("raise SystemExit\n")
    hub.change(main=THIRD, commits={**hub.commits, THIRD: str(tmp_path)})
    with pytest.raises(DataError, match=r"the data set is a script, and no script is run\. Use.*hf:allenai/c4"):
        sources("hf:some/texts", LanguageRules(language="de"))


def test_a_hub_that_cannot_be_reached_is_one_paragraph(
    hub: SmallHub, prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert prepare("hf:some/texts:deu_Latn") == 2
    said = capsys.readouterr().err
    assert "error: hf:some/texts:deu_Latn: the hub http://127.0.0.1:9 cannot be reached" in said
    assert "hf download some/texts --repo-type dataset --local-dir DIR" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_the_library_its_versions_are_named(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (versions,) = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]["hub"]
    with pytest.raises(DataError, match=rf"need the package datasets: pip install '{re.escape(versions)}'"):
        sources(f"hf:{local}:deu_Latn", LanguageRules())


def test_without_the_hub_by_its_own_switch(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        DataError, match=r"HF_HUB_OFFLINE is set.*Unset it, or copy the data set.*hf download some/texts"
    ):
        sources("hf:some/texts:deu_Latn", LanguageRules())
