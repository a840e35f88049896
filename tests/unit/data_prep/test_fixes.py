"""Options and commands that errors of `data_prep` print: each is added to the same command, or run, and the error is gone."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.__main__ import main
from data_prep.journal import Entry, Journal
from data_prep.shards import DataError, ShardSet
from data_prep.where import Where
from tests.unit.data_prep.corpus import run_command
from tests.unit.data_prep.small_data_set import SMALL, write_data_set
from tests.unit.printed import paste

RECORDS = [{"content": f"Mening nummer {number}.", "id": number, "lang": "sv"} for number in range(200)]
Prepare = Callable[..., str]


@pytest.fixture
def prepare(tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Prepare `my text` with options. Returns the error that is printed; empty where there is none."""
    (tmp_path / "my text").mkdir()

    def run(*options: str, given: str | Path = tmp_path / "my text", output: str = "my shards") -> str:
        code = run_command(Path(given), tiny_tokenizer, tmp_path / output, *options)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), errors
        return errors[0] if errors else ""

    return run


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", ["sv.jsonl", "sv.parquet"])
@pytest.mark.parametrize("more", [{}, {"text": 7}], ids=["missing", "not text"])
def test_the_field_that_holds_the_text(name: str, more: dict[str, Any], prepare: Prepare, tmp_path: Path) -> None:
    write_records(tmp_path / "my text" / name, [{**record, **more} for record in RECORDS])
    message = prepare()
    (option,) = re.findall(r"Name the (?:field|column) that holds the text with (--[\w-]+)", message)
    if "they have" in message or "its columns are" in message:
        assert re.findall(r"(?:they have|its columns are) .*?\bcontent\b", message), message
    assert prepare(option, "content") == ""


@pytest.mark.parametrize("records", [[{"text": 5}], [{"content": "x"}], [{"text": None}]], ids=str)
def test_records_without_text(records: list[dict[str, Any]], prepare: Prepare, tmp_path: Path) -> None:
    good = [{**record, "text": record["content"]} for record in RECORDS]
    write_records(tmp_path / "my text" / "sv.jsonl", [*good, *records])
    message = prepare("--bad-records", "fail")
    (fix,) = re.findall(r"leave such records out with (--bad-records \w+)", message)
    assert prepare(*shlex.split(fix)) == ""


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [
        ("lang == sv", {"lang": "sv"}),
        ("lang = sv", {"lang": "sv"}),
        ("id = 3", {"id": 3}),
        ("`my lang` != de", {"my lang": "sv"}),
        ("id >= 0 and lang=sv and id < 9", {"id": 3, "lang": "sv"}),
    ],
)
def test_a_condition_that_is_written_wrongly(wrong: str, kept: dict[str, Any]) -> None:
    with pytest.raises(DataError) as error:
        Where.parse([wrong])
    (fix,) = re.findall(r"(?:needs quotes|write ==): (--where .*?)\.(?: Write|$)", str(error.value))
    option, condition = shlex.split(fix)
    assert option == "--where"
    where = Where.parse([condition])
    assert where.problem(kept) is None
    assert where.problem({**kept, "lang": "de", "my lang": "de", "id": -4}) is not None


def test_an_ordering_of_texts_names_no_quotes() -> None:
    """Quotes would be the next error."""
    with pytest.raises(DataError, match=r"'sv' is no number. >= compares numbers.$"):
        Where.parse(["lang >= sv"])


def test_a_condition_on_lines_of_text(prepare: Prepare, tmp_path: Path) -> None:
    write_records(tmp_path / "my text" / "sv.jsonl", [{**record, "text": record["content"]} for record in RECORDS])
    (tmp_path / "my text" / "de.txt").write_text("Eine Zeile.\n")
    where = ("--where", "id >= 3")
    map_option(prepare(*where), tmp_path / "map", "de.txt")
    assert prepare(*where, "--language-map", str(tmp_path / "map")) == ""


def map_option(message: str, file: Path, pattern: str) -> None:
    """Write the language map that a message describes: its line, with this pattern in the place of PATTERN."""
    option, line = re.findall(r"(--language-map) FILE \(a line: (.*?)\)", message)[0]
    assert option == "--language-map"
    file.write_text(line.replace("PATTERN", pattern) + "\n")


@pytest.mark.parametrize("name", ["sw.txt", "sw part [1] #2.txt"])
def test_a_text_that_is_there_packed_and_unpacked(name: str, prepare: Prepare, tmp_path: Path) -> None:
    directory = tmp_path / "my text" / "sw"
    directory.mkdir()
    (directory / name).write_text("Habari ya asubuhi.\n")
    (directory / f"{name}.gz").write_bytes(gzip.compress(b"Habari ya asubuhi.\n"))
    map_option(prepare(), tmp_path / "map", "not replaced")
    assert prepare("--language-map", str(tmp_path / "map")) == ""


def test_a_file_whose_language_is_unknown(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "my text" / "novel.txt"
    path.write_text("Habari ya asubuhi.\n")
    message = prepare(given=path)
    assert "--language xx" in message
    assert prepare("--language", "sw", given=path) == ""
    assert "lines of: PATTERN LANGUAGE" in message
    (tmp_path / "map").write_text("novel.txt sw\n")
    assert prepare("--language-map", str(tmp_path / "map"), output="others") == ""


def test_a_language_that_was_added_to_the_input(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "my text" / "sw.txt").write_text("Habari ya asubuhi.\n")
    assert prepare() == ""
    shutil.copytree(tmp_path / "my shards", tmp_path / "joined")
    (tmp_path / "my text" / "de.txt").write_text("Eine Zeile.\n")
    message = prepare()
    (option,) = re.findall(r"Use (--\w+) to add", message)
    assert prepare(option) == ""
    assert ShardSet(tmp_path / "my shards").languages == ["de", "sw"]

    assert prepare("--language", "de", output="new ones") == ""
    (command,) = re.findall(r"`(.*? merge .*?) DIRECTORY`", message)
    command = command.replace(shlex.quote(str(tmp_path / "my shards")), shlex.quote(str(tmp_path / "joined")))
    paste(f"{command} {shlex.quote(str(tmp_path / 'new ones'))}")
    assert ShardSet(tmp_path / "joined").languages == ["de", "sw"]


def test_lines_that_are_not_utf8(prepare: Prepare, tmp_path: Path) -> None:
    lines = [f"Zeile {number} \xfcber \xc4pfel".encode("latin-1") for number in range(300)]
    (tmp_path / "my text" / "de.txt").write_bytes(b"good\n" * 300 + b"\n".join(lines) + b"\n")
    message = prepare()
    (fix,) = re.findall(r"(--max-broken-lines \d+)", message)
    assert prepare(*shlex.split(fix)) == ""


def test_files_that_a_strict_input_does_not_allow(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "my text" / "sw.txt").write_text("Habari ya asubuhi.\n")
    (tmp_path / "my text" / "picture.png").write_bytes(b"\x89PNG")
    message = prepare("--strict-input")
    if message:
        assert "do without --strict-input" in message
    assert prepare() == ""


def test_options_for_the_other_kind_of_tokenizer(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "my text" / "sw.txt").write_text("Habari ya asubuhi.\n")
    message = prepare("--engine", "tokenizers")
    assert message.endswith("Leave the option out.")
    assert prepare() == ""


def test_languages_that_are_not_finished(prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for language in ("de", "sw"):
        (tmp_path / "my text" / f"{language}.txt").write_text("Habari ya asubuhi.\n")
    assert prepare() == ""
    shards = tmp_path / "my shards"
    (shards / "manifest.json").unlink()
    shutil.rmtree(shards / "de")
    assert main(["merge", str(shards)]) == 2
    command, option = re.findall(r"then `(.*? merge .*?)` \(with (--partial)", capsys.readouterr().err)[0]
    paste(f"{command} {option}")
    assert ShardSet(shards).languages == ["sw"]


def test_an_input_without_a_language_that_is_not_finished(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Path
) -> None:
    for language in ("de", "sw"):
        (tmp_path / "my text" / f"{language}.txt").write_text("Habari ya asubuhi.\n")
    assert prepare() == ""
    shutil.rmtree(tmp_path / "my shards" / "de")
    assert run_command(tmp_path / "my text" / "sw.txt", tiny_tokenizer, tmp_path / "my shards") == 0
    assert "this input is finished; still to be prepared: de" in capsys.readouterr().out


def test_a_shard_that_was_lost(prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my text" / "sw.txt").write_text("Habari ya asubuhi.\n")
    assert prepare() == ""
    next((tmp_path / "my shards" / "sw").glob("*.tok")).unlink()
    merge = ["merge", str(tmp_path / "all"), "--from", str(tmp_path / "my shards")]
    assert main(merge) == 2
    (fix,) = re.findall(r"prepare it again with (--redo \w+)", capsys.readouterr().err)
    assert prepare(*shlex.split(fix)) == ""
    assert main(merge) == 0


@pytest.mark.parametrize("name", ["sv.jsonl", "sv.txt"])
@pytest.mark.parametrize("more", [(), ("--min-document-chars", "1")], ids=["same options", "other options"])
def test_a_corrupt_journal(name: str, more: tuple[str, ...], prepare: Prepare, tmp_path: Path) -> None:
    write_records(tmp_path / "my text" / name, [{"text": record["content"]} for record in RECORDS])
    assert prepare() == ""
    journal = tmp_path / "my shards" / "sv" / "journal.jsonl"
    journal.write_bytes(b"0" * 16 + journal.read_bytes()[16:])
    message = prepare()
    (fix,) = re.findall(r"the same command with (--redo \w+)", message)
    message = prepare(*shlex.split(fix), *more)
    assert message == "" if not more else "Use the same, or give --output a new directory" in message, message


def test_a_stop_of_redo_names_the_command_that_continues(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --redo it would begin again."""
    text, output, small = tmp_path / "sw.txt", tmp_path / "shards", ("--shard-tokens", "300", "--block-bytes", "1000")
    text.write_text("".join(f"Habari ya asubuhi {number}.\n\n" for number in range(300)))
    assert run_command(text, tiny_tokenizer, output, *small) == 0
    append, expected = Journal.append, ShardSet(output).fingerprint

    def append_and_stop(journal: Journal, entry: Entry) -> None:
        append(journal, entry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", append_and_stop)
        assert run_command(text, tiny_tokenizer, output, *small, "--redo", "sw") == 130
    assert "without --redo it continues after the finished ones" in capsys.readouterr().err
    before = (output / "sw" / "00000.tok").stat().st_mtime_ns
    assert run_command(text, tiny_tokenizer, output, *small) == 0
    assert (output / "sw" / "00000.tok").stat().st_mtime_ns == before
    assert ShardSet(output).fingerprint == expected


def test_a_data_set_with_several_configs(prepare: Prepare, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    place = write_data_set(tmp_path / "my data set")
    message = prepare(*SMALL, given=f"hf:{place}")
    (word,) = re.findall(r"Name one \((.*?)\), or several", message)
    assert prepare(*SMALL, given=shlex.split(word)[0]) == ""


def test_a_config_whose_language_is_unknown(prepare: Prepare, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    place = write_data_set(tmp_path / "my data set")
    config = f"hf:{place}:deu_Latn_removed"
    message = prepare(*SMALL, given=config)
    map_option(message, tmp_path / "map", "not replaced")
    (tmp_path / "map").write_text((tmp_path / "map").read_text().replace(" xx", " de"))
    assert prepare(*SMALL, "--language-map", str(tmp_path / "map"), given=config) == ""
    assert "--language xx" in message
    assert prepare(*SMALL, "--language", "de", given=config, output="others") == ""
