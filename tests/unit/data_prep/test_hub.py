"""Data sets of a hub: one commit, what the hub answers, and the same shards after any stop."""

from __future__ import annotations

import gzip
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets  # noqa: F401 (here once, and not in every process that lists files)
import pytest

from data_prep.__main__ import main
from data_prep.discovery import LanguageRules
from data_prep.hub_files import HubFile
from data_prep.journal import JOURNAL_NAME
from data_prep.manifest import DATA_SETS, begin_output, commits_of, read_run
from data_prep.shards import DataError, ShardSet
from data_prep.sources import ReadOptions
from tests.unit.data_prep.corpus import content, run_command
from tests.unit.data_prep.small_data_set import SMALL, sources, stop_after, write_data_set
from tests.unit.data_prep.small_hub import SmallHub

FIRST, SECOND, THIRD = "a1" * 20, "b2" * 20, "c3" * 20


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
    assert capsys.readouterr().err.count("the newest revision is commit") == 1
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


def test_a_directory_whose_name_reads_as_a_pattern(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_data_set(tmp_path / "a[1]b" / "texts")
    assert prepare(f"hf:{directory}:deu_Latn") == 2
    assert "the path of the directory has [, and" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    renamed = (tmp_path / "a[1]b").rename(tmp_path / "a1b")
    assert prepare(f"hf:{renamed / 'texts'}:deu_Latn") == 0


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


def test_without_the_hub_by_its_own_switch() -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        DataError, match=r"HF_HUB_OFFLINE is set.*Unset it, or copy the data set.*hf download some/texts"
    ):
        sources("hf:some/texts:deu_Latn", LanguageRules())
