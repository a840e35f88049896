"""`merge --from` copies the regular files that the journals of a finished output describe, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from data_prep.__main__ import main
from data_prep.shards import ShardSet
from data_prep.verify import verify
from pipeline.errors import EXIT_USER
from tests.unit.printed import paste

LANGUAGE = "he"
Corruption = Callable[[Path], object]


@pytest.fixture
def other(tiny_shards: Path, tmp_path: Path) -> Path:
    """An output directory from elsewhere."""
    return shutil.copytree(tiny_shards, tmp_path / "other")


def merge(output: Path, other: Path) -> int:
    return main(["merge", str(output), "--from", str(other)])


def replaced(path: Path, make: Corruption) -> None:
    """Move `path` away and make something else under its name."""
    path.rename(path.with_name("kept"))
    make(path)


def linked(path: Path) -> None:
    path.symlink_to(path.with_name("kept"))


def change_journal(directory: Path, change: Callable[[dict], object]) -> None:
    """Change every entry of a journal, with matching hashes."""
    journal, lines = directory / "journal.jsonl", []
    for line in journal.read_bytes().splitlines():
        entry = json.loads(line.partition(b" ")[2])
        change(entry)
        text = json.dumps(entry).encode()
        lines.append(xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n")
    journal.write_bytes(b"".join(lines))


def name_another_file(entry: dict) -> None:
    if entry["shard"]:
        entry["shard"]["file"] = f"../../etc/{Path(entry['shard']['file']).name}"


def overwrite_header(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\0" * 64)


REJECTED: dict[str, tuple[Corruption, str]] = {
    "shard is a link": (lambda d: replaced(d / "00000.tok", linked), r"00000\.tok is a link or not a regular file"),
    "shard is a FIFO": (lambda d: replaced(d / "00000.tok", os.mkfifo), r"00000\.tok is a link or not a regular file"),
    "shard is a directory": (
        lambda d: replaced(d / "00000.tok", Path.mkdir),
        r"00000\.tok is a link or not a regular file",
    ),
    "one more file is a link": (lambda d: (d / "99999.tok").symlink_to("/etc/passwd"), r"99999\.tok is a link"),
    "journal is a link": (lambda d: replaced(d / "journal.jsonl", linked), r"journal\.jsonl is a link"),
    "language is a link": (
        lambda d: (d.rename(d.parents[1] / "kept"), d.symlink_to(d.parents[1] / "kept")),
        "leads out of .* by a symbolic link",
    ),
    "journal names a way out": (
        lambda d: change_journal(d, name_another_file),
        r"names a shard '\.\./\.\./etc/00000\.tok'",
    ),
    "header of another shard": (lambda d: overwrite_header(d / "00000.tok"), "is not the one its journal describes"),
    "shard is cut": (lambda d: os.truncate(d / "00000.tok", 5000), "has lost a shard or a part of one"),
    "manifest is corrupt": (lambda d: (d.parent / "manifest.json").write_text("{"), r"manifest\.json is corrupt"),
    "manifest is a link": (lambda d: replaced(d.parent / "manifest.json", linked), r"manifest\.json is a link"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_links_and_foreign_files_are_rejected(
    name: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    corrupt, expected = REJECTED[name]
    corrupt(other / LANGUAGE)
    output = tmp_path / "all"
    assert merge(output, other) == EXIT_USER
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(expected, error)
    assert not output.exists(), "nothing was written"


def test_the_printed_fix_for_a_link_works(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    replaced(other / LANGUAGE / "00000.tok", linked)
    assert merge(tmp_path / "all", other) == EXIT_USER
    path = shlex.quote(str(other / LANGUAGE / "00000.tok"))
    command = f'cp --remove-destination "$(readlink -f {path})" {path}'
    assert command in capsys.readouterr().err
    subprocess.run(["bash", "-c", command], check=True)
    assert merge(tmp_path / "all", other) == 0
    assert verify(tmp_path / "all") == []


def test_files_that_the_journal_does_not_name_are_not_copied(other: Path, tmp_path: Path) -> None:
    """Notes of the user, a link and a directory are neither read nor copied. The directory itself may be named by a link."""
    (other / LANGUAGE / "notes.txt").write_text("mine")
    (other / LANGUAGE / "secret").symlink_to("/etc/passwd")
    (other / LANGUAGE / "deep").mkdir()
    (other / "deep").symlink_to("/etc")
    (tmp_path / "elsewhere").symlink_to(other)
    assert merge(tmp_path / "all", tmp_path / "elsewhere") == 0
    kinds = {path.suffix for path in (tmp_path / "all" / LANGUAGE).iterdir()}
    assert kinds == {".tok", ".jsonl"}
    assert ShardSet(tmp_path / "all").fingerprint == ShardSet(other).fingerprint
    assert verify(tmp_path / "all") == []


def test_an_unfinished_language_is_named(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (other / "manifest.json").unlink()
    journal = other / LANGUAGE / "journal.jsonl"
    journal.write_bytes(b"")
    assert merge(tmp_path / "all", other) == 0
    assert f"; not finished there: {LANGUAGE}" in capsys.readouterr().out
    assert LANGUAGE not in ShardSet(tmp_path / "all").languages


def test_a_linked_language_is_rejected_without_a_manifest(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (other / "manifest.json").unlink()
    replaced(other / LANGUAGE, linked)
    assert merge(tmp_path / "all", other) == EXIT_USER
    assert f"{LANGUAGE} is a link or not a directory" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_a_language_that_a_killed_merge_copied_is_added_by_the_next_one(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def killed(*unused: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("data_prep.manifest.with_data_sets", killed)  # the languages are there, and not in prepare.json
        assert merge(tmp_path / "all", other) == 130
    assert (tmp_path / "all" / LANGUAGE).is_dir()
    assert merge(tmp_path / "all", other) == 0
    assert "added nothing" not in capsys.readouterr().out
    assert ShardSet(tmp_path / "all").fingerprint == ShardSet(other).fingerprint
    assert merge(tmp_path / "all", other) == 0
    assert "added nothing" in capsys.readouterr().out


def test_directories_without_a_finished_language_give_no_output(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (other / "manifest.json").unlink()
    for journal in other.glob("*/journal.jsonl"):
        journal.write_bytes(b"")
    assert merge(tmp_path / "all", other) == EXIT_USER
    assert "no language is finished in" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
    (tmp_path / "all").mkdir()
    run = json.loads((other / "prepare.json").read_text())
    (tmp_path / "all" / "prepare.json").write_text(json.dumps({**run, "languages": []}))
    assert merge(tmp_path / "all", other) == EXIT_USER
    assert not (tmp_path / "all" / "manifest.json").exists()


def test_a_directory_without_a_journal_is_named(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "all" / LANGUAGE).mkdir(parents=True)
    shutil.copy(other / "prepare.json", tmp_path / "all")
    assert merge(tmp_path / "all", other) == EXIT_USER
    (fix,) = re.findall(r"To keep those of .*: (rm -r .*)", capsys.readouterr().err)
    paste(fix)
    assert merge(tmp_path / "all", other) == 0
    assert ShardSet(tmp_path / "all").fingerprint == ShardSet(other).fingerprint
