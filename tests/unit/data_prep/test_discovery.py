"""Every file below the input is read once, or reported with the reason why it is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.discovery import LanguageRules, Survey, survey
from data_prep.shards import DataError, ShardSet
from data_prep.sources import ReadOptions
from tests.unit.data_prep.corpus import discover, run_command


def surveyed(*inputs: Path, language_map: Path | None = None) -> Survey:
    return survey([str(path) for path in inputs], LanguageRules.read(language_map, None), ReadOptions())


def names(found: Survey) -> dict[str, list[str]]:
    return {language: [source.name for source in sources] for language, sources in found.sources.items()}


def reasons(found: Survey, root: Path) -> dict[str, str]:
    return {os.path.relpath(one.path, root): one.reason for one in found.not_taken}


def write(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"the text of {name}\n")
    return root


def test_every_file_left_out_is_listed_with_its_reason(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "en.txt", "table.csv", "meta.json", "README.txt", "sw/LICENSE", "en.txt.sha256", "SHA256SUMS",
                 ".de.txt", ".git/de.txt", "sw/a.jsonl", "out/prepare.json", "out/en/journal.jsonl")  # fmt: skip
    (root / "fr.txt").symlink_to("nowhere")
    (root / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(root / "de.txt")
    (root / "sw" / "b.txt").touch()
    found = surveyed(root)
    assert names(found) == {"en": ["en.txt"], "sw": ["sw/a.jsonl", "sw/b.txt"]}
    no_text = "no text of a language (README, LICENSE, checksums)"
    assert reasons(found, root) == {
        ".de.txt": "hidden (the name starts with a dot)",
        ".git": "hidden (the name starts with a dot)",
        "README.txt": no_text,
        "SHA256SUMS": no_text,
        "circle.txt": "a link that leads nowhere",
        "de.txt": "not a regular file (FIFO, socket or device)",
        "en.txt.sha256": no_text,
        "fr.txt": "a link that leads nowhere",
        "meta.json": "of a kind that is not read",
        "out": "an output of prepare",
        "sw/LICENSE": no_text,
        "sw/b.txt": "empty (0 bytes)",
        "table.csv": "of a kind that is not read",
    }


@pytest.mark.parametrize("name", ["ru.TXT", "ru.ndjson", "ru.JSONL.GZ", "ru.json.gz", "ru.txt.bz2", "ru.Parquet"])
def test_known_kinds_of_files_are_read(tmp_path: Path, name: str) -> None:
    assert names(surveyed(write(tmp_path, name))) == {"ru": [name]}


def test_a_plain_json_is_read_only_if_it_is_named_itself(tmp_path: Path) -> None:
    write(tmp_path, "ru.json")
    assert names(surveyed(tmp_path / "ru.json")) == {"ru": ["ru.json"]}
    with pytest.raises(DataError, match=r"Left out: 1 of a kind that is not read: .*ru\.json"):
        surveyed(tmp_path)


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "en.txt", "de/a.txt")
    write(tmp_path / "elsewhere", "fr/a.txt")
    (root / "fr").symlink_to(tmp_path / "elsewhere" / "fr")
    (root / "the-same").symlink_to(tmp_path / "elsewhere" / "fr")
    (root / "a-german-one").symlink_to("de")  # before `de` by name, but not the directory's own
    (root / "de" / "loop").symlink_to(root)
    found = surveyed(root)
    assert names(found) == {"de": ["de/a.txt"], "en": ["en.txt"], "fr": ["fr/a.txt"]}
    assert reasons(found, root) == {
        "a-german-one": f"a link to a directory that is read already, {root}/de",
        "de/loop": f"a link to a directory that is read already, {root}",
        "the-same": f"a link to a directory that is read already, {root}/fr",
    }


def test_the_same_text_under_two_names_is_rejected_with_both_names(tmp_path: Path) -> None:
    root = write(tmp_path / "packed", "en.txt", "en.txt.xz")
    with pytest.raises(
        DataError, match=r"en\.txt\.xz and .*en\.txt are by their names the same text.*a line: en\.txt\.xz -"
    ):
        surveyed(root)
    map_file = tmp_path / "map"
    map_file.write_text("en.txt.xz -\n")
    assert names(surveyed(root, language_map=map_file)) == {"en": ["en.txt"]}
    root = write(tmp_path / "linked", "en/a.txt", "fr/c.txt")
    (root / "en" / "b.txt").symlink_to("a.txt")
    with pytest.raises(DataError, match=r"en/b\.txt is the same file as .*en/a\.txt"):
        surveyed(root)
    (root / "en" / "b.txt").unlink()
    os.link(root / "fr" / "c.txt", root / "en" / "c.txt")
    with pytest.raises(DataError, match=r"fr/c\.txt is the same file as .*en/c\.txt"):
        surveyed(root)


def test_overlapping_inputs_are_rejected(tmp_path: Path) -> None:
    root = write(tmp_path, "en/a.txt", "sw.txt")
    for inputs in ([root, root / "en"], [root / "en", root / "en" / "a.txt"]):
        with pytest.raises(DataError, match=r"a\.txt is given twice as input"):
            surveyed(*inputs)
    (tmp_path.parent / "other").symlink_to(root)
    with pytest.raises(DataError, match="is the same file as"):
        surveyed(root, tmp_path.parent / "other")
    with pytest.raises(DataError, match="hf:a/b is given twice as input"):
        discover(["hf:a/b", "hf:a/b"], LanguageRules(language="de"))


def test_an_input_directory_without_text_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, "texts/en.txt", "others/notes.pdf")
    with pytest.raises(DataError, match=r"No text in .*others.*Left out: 1 of a kind that is not read: .*notes\.pdf"):
        surveyed(tmp_path / "texts", tmp_path / "others")


def test_inputs_that_are_not_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sw.txt")
    with pytest.raises(DataError, match=r"sw\.txt is not a regular file \(FIFO"):
        surveyed(tmp_path / "sw.txt")
    (tmp_path / "en.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match="is a link that leads nowhere"):
        surveyed(tmp_path / "en.txt")


def test_a_language_map_may_have_a_byte_order_mark_and_name_a_readme(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "en/a.txt", "en/notes.txt", "en/README-2.txt")
    map_file = tmp_path / "map"
    map_file.write_bytes(b"\xef\xbb\xbfnotes* -\r\nREADME-2.txt en\r\nmissing.txt fr\r\n")
    found = surveyed(root, language_map=map_file)
    assert names(found) == {"en": ["en/README-2.txt", "en/a.txt"]}
    assert reasons(found, root) == {"en/notes.txt": "left out by the language map"}
    assert found.unmatched == ["missing.txt"]
    map_file.write_bytes("notes* -\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"mapping file .* is not UTF-8.*iconv"):
        surveyed(root, language_map=map_file)


def test_files_read_and_left_out_are_reported(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "in", "en.txt", *(f"note-{number}.doc" for number in range(30)))
    assert run_command(root, tiny_tokenizer, tmp_path / "strict", "--strict-input") == 2
    assert "--strict-input: 30 files below the input are left out" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()
    assert run_command(root, tiny_tokenizer, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "input: en: 19 bytes in 1 files: en.txt" in said
    assert "warning: left out: 30 of a kind that is not read" in said
    assert said.count(".doc") == 20
    listed = (tmp_path / "out" / "not_taken.tsv").read_text().splitlines()
    assert len(listed) == 30
    assert listed[0] == f"of a kind that is not read\t{root}/note-0.doc"
    for path in root.glob("*.doc"):
        path.unlink()
    assert run_command(root, tiny_tokenizer, tmp_path / "out", "--strict-input") == 0
    assert not (tmp_path / "out" / "not_taken.tsv").exists()


def test_unusual_file_names_are_recorded_escaped(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "fr").mkdir(parents=True)
    for name in (b"part-\xe9t\xe9.txt", b"two\nlines.txt", b"50 % of it.txt"):
        (tmp_path / "in" / "fr" / os.fsdecode(name)).write_text(f"Ceci est {name!r}.\n")
    assert run_command(tmp_path / "in", tiny_tokenizer, tmp_path / "out") == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert r"fr/part-\xe9t\xe9.txt" in said
    assert r"fr/two\nlines.txt" in said
    sources = ShardSet(tmp_path / "out").manifest["languages"]["fr"]["sources"]
    assert [source["name"] for source in sources] == [
        "fr/50 % of it.txt",
        r"fr/part-\xe9t\xe9.txt",
        "fr/two\nlines.txt",
    ]


def test_copies_of_one_text_give_a_warning(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "in", "en/a.txt", "sw.txt")
    (root / "en" / "b.txt").write_bytes((root / "en" / "a.txt").read_bytes())
    assert run_command(root, tiny_tokenizer, tmp_path / "out") == 0
    assert "warning: en/a.txt (en) and en/b.txt (en) hold the same text" in capsys.readouterr().err
