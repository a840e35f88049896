"""The command line for the user: exit codes, errors of one paragraph, unusual text."""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from data_prep import command_line
from data_prep.__main__ import main
from data_prep.disk import estimated_bytes
from data_prep.shards import ShardSet
from data_prep.sources import Source
from data_prep.tokenizer import open_tokenizer
from data_prep.verify import verify
from tests.conftest import REPO, SAMPLES
from tests.unit.data_prep.corpus import content, run_command


def test_programs_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to this Python first, so that another environment's on PATH is not started; `pip install --target` has them on PATH."""
    python, elsewhere = tmp_path / "env" / "python", tmp_path / "target" / "bin"
    for program in (python, python.with_name("torchrun"), elsewhere / "torchrun", elsewhere / "deepspeed"):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(elsewhere))
    assert command_line.installed_program("torchrun") == str(python.with_name("torchrun"))
    assert command_line.installed_program("deepspeed") == str(elsewhere / "deepspeed")
    with pytest.raises(FileNotFoundError, match=r"`hf` is neither in .*env nor on PATH") as missing:
        command_line.installed_program("hf")
    assert command_line.paragraph_of(missing.value) == str(missing.value)


def tokens(output: Path, language: str) -> np.ndarray:
    shards = ShardSet(output)
    return shards.stream(language, 0, shards.num_tokens(language))


def one_paragraph(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that was printed: one line without a traceback."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_prepare_verify_stats_by_the_real_command(tiny_tokenizer: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "data_prep", *arguments], cwd=REPO, capture_output=True, text=True, check=False
        )

    output, plot = str(tmp_path / "shards"), str(tmp_path / "plot.png")
    made = run("prepare", "--input", "samples/cc100/hi.txt.xz", "samples/cc100/sw.txt.xz", "--tokenizer",
               str(tiny_tokenizer), "--output", output, "--workers", "2")  # fmt: skip
    assert made.returncode == 0, made.stderr
    *_, written, then = made.stdout.splitlines()
    assert written == f"written: {output} (shards of 2 languages)"
    assert "prepare:" not in made.stderr, "shorter than 30 s, and no terminal"
    assert then.endswith(f" -m data_prep verify {output}")
    checked = run("verify", output)
    assert checked.returncode == 0
    assert checked.stdout.endswith(f"{output}: all 2 shards are valid\n")
    assert "| sw | 0.00% |" in checked.stdout
    shown = run("stats", output, "--seq-len", "64", "--samples", "1000", "--plot", plot)
    assert shown.returncode == 0, shown.stderr
    table = [line.split("|")[1:-1] for line in shown.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table] == ["language", "---", "hi", "sw", "all 2"]
    shares = [float(row[6].strip(" %")) for row in table[2:4]]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    rows = ShardSet(output).num_rows("sw", 64)
    assert float(table[3][7]) == pytest.approx(1000 * shares[1] / 100 / rows, rel=0.01)
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    corrupt = Path(output) / "hi" / "00000.tok"
    corrupt.write_bytes(corrupt.read_bytes()[:5000] + b"X" + corrupt.read_bytes()[5001:])
    assert then.endswith(f" -m data_prep verify {output}")
    checked = run("verify", output)
    assert checked.returncode == 2
    assert "hi/00000.tok: corrupt in the block of bytes 4096 to" in checked.stderr
    assert "Traceback" not in checked.stderr


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        (b"one line", b"one line\n"),
        (b"one\r\ntwo\r\n\r\nthree\r\n", b"one\ntwo\n\nthree\n"),
        (b"\xef\xbb\xbfwith a mark\n", b"with a mark\n"),
        ("ideographic space only\n\u3000\n\nend\n".encode(), b"ideographic space only\n\nend\n"),
    ],
    ids=["no newline at the end", "Windows line ends", "byte order mark", "line without pieces"],
)
def test_line_ends_and_byte_order_marks_do_not_change_the_tokens(
    tiny_tokenizer: Path, tmp_path: Path, text: bytes, same_as: bytes
) -> None:
    for name, data in (("one", text), ("other", same_as)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "en.txt").write_bytes(data)
        assert run_command(tmp_path / name, tiny_tokenizer, tmp_path / f"{name}-shards") == 0
    assert tokens(tmp_path / "one-shards", "en").tolist() == tokens(tmp_path / "other-shards", "en").tolist()
    one, other = (ShardSet(tmp_path / f"{name}-shards").num_documents("en") for name in ("one", "other"))
    assert one == other


def test_special_tokens_and_nuls_in_text_stay_text(tiny_tokenizer: Path, tmp_path: Path) -> None:
    line = b"a </s> b <mask> c <s> d <pad> e \0 f <unk>"
    (tmp_path / "en.txt").write_bytes(line + b"\n")
    assert run_command(tmp_path / "en.txt", tiny_tokenizer, tmp_path / "shards") == 0
    got = tokens(tmp_path / "shards", "en")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer / "sentencepiece.bpe.model"))
    pieces = [processor.id_to_piece(int(token) - 1) for token in got[got > 3]]
    for literal in ("/s", "mask", "pad"):
        assert literal in "".join(pieces)
    assert (got == 2).sum() == 1
    assert got[-1] == 2
    assert not np.isin(got, [0, 1, processor.get_piece_size() + 1]).any()


def test_a_line_of_megabytes_is_split_with_a_warning(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = lzma.open(SAMPLES / "cc100" / "sw.txt.xz").read().replace(b"\n", b" ") * 1000
    (tmp_path / "sw.txt").write_bytes(words + b"\n\nlast document\n")
    assert run_command(tmp_path / "sw.txt", tiny_tokenizer, tmp_path / "shards") == 0
    assert "warning: sw: 4 times a document was cut because it is over 2 MiB" in capsys.readouterr().err
    shards = ShardSet(tmp_path / "shards")
    assert shards.num_documents("sw") == 6
    assert shards.manifest["languages"]["sw"]["counts"]["documents_split"] == 4


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("en.txt", b"", "there is no text in"),
        ("en.txt", b"\n \n\r\n\n", "there is no text in"),
        ("en.txt", bytes(range(256)) * 40, "not text in UTF-8"),
        ("en.txt.xz", b"this is no xz file", "corrupt or truncated: reading stopped at byte"),
        ("corpus.txt", b"text", "cannot tell its language"),
        ("en.csv", b"text", "unknown kind of file"),
    ],
)
def test_invalid_files_are_named_and_nothing_incomplete_is_left(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert run_command(tmp_path / name, tiny_tokenizer, tmp_path / "shards") == 2
    error = one_paragraph(capsys)
    assert message in error
    assert name in error
    assert not any(file.endswith((".tok", ".tmp", "manifest.json")) for file in content(tmp_path))


def test_a_corrupt_file_fails_alone_and_keeps_its_finished_shards(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "in"
    corpus.mkdir()
    shutil.copy(SAMPLES / "cc100" / "sw.txt.xz", corpus)
    complete = (SAMPLES / "cc100" / "tr.txt.xz").read_bytes()
    (corpus / "tr.txt.xz").write_bytes(complete[: len(complete) // 2])
    sizes = ("--shard-tokens", "3000", "--block-bytes", "20000")
    assert run_command(corpus, tiny_tokenizer, tmp_path / "shards", *sizes) == 2
    error = one_paragraph(capsys)
    assert f"1 of 2 languages could not be finished. tr: {corpus}/tr.txt.xz is corrupt" in error
    assert f"stopped at byte {len(complete) // 2} of {len(complete) // 2}" in error
    kept = sorted((tmp_path / "shards" / "tr").glob("*.tok"))
    assert len(kept) >= 3
    assert (tmp_path / "shards" / "sw" / "00000.tok").is_file()
    before = [path.read_bytes() for path in kept]
    (corpus / "tr.txt.xz").write_bytes(complete)
    assert run_command(corpus, tiny_tokenizer, tmp_path / "shards", *sizes) == 0
    assert [path.read_bytes() for path in kept] == before
    assert verify(tmp_path / "shards") == []
    assert run_command(corpus, tiny_tokenizer, tmp_path / "clean", *sizes) == 0
    fresh, fixed = content(tmp_path / "clean"), content(tmp_path / "shards")
    assert {name: data for name, data in fresh.items() if name.endswith((".tok", "manifest.json"))} == {
        name: data for name, data in fixed.items() if name.endswith((".tok", "manifest.json"))
    }


def test_shards_in_the_input_directory_are_not_read_as_input(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A journal is a .jsonl in a folder named like a language, so a second run could read it as a new file of text."""
    (tmp_path / "en.txt").write_text("some text\n")
    for output in ("shards", "shards", "other-shards"):
        assert run_command(tmp_path, tiny_tokenizer, tmp_path / output) == 0
    names = [source["name"] for source in ShardSet(tmp_path / "other-shards").manifest["languages"]["en"]["sources"]]
    assert names == ["en.txt"]


@pytest.mark.parametrize("target", ["file/shards", "/sys/shards"])  # /sys is read-only, even to root
def test_an_output_that_cannot_be_written_is_named(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(SAMPLES / "cc100" / "sw.txt.xz", tiny_tokenizer, tmp_path / target) == 2
    assert f"Cannot write to {tmp_path / target}" in one_paragraph(capsys)


def test_too_little_disk_space_is_rejected_before_writing(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    assert run_command(SAMPLES / "cc100" / "tr.txt.xz", tiny_tokenizer, tmp_path / "shards") == 2
    assert "0.00 GB free; the shards still to be made need about 0.00 GB" in one_paragraph(capsys)
    assert set(content(tmp_path / "shards")) == {"prepare.json"}


def test_the_disk_estimate_is_close(tiny_tokenizer: Path, tmp_path: Path) -> None:
    assert run_command(SAMPLES / "cc100" / "tr.txt.xz", tiny_tokenizer, tmp_path / "shards") == 0
    source = Source("tr", SAMPLES / "cc100" / "tr.txt.xz", "tr.txt.xz")
    written = (tmp_path / "shards" / "tr" / "00000.tok").stat().st_size
    assert estimated_bytes([source], open_tokenizer(tiny_tokenizer)) == pytest.approx(written, rel=0.15)


@pytest.mark.parametrize("words", [3, 1500], ids=["short", "long"])
def test_the_disk_estimate_of_parquet_is_close(words: int, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """The first rows that are read have more text than the estimate needs, or less."""
    texts = [f"number {row} " * words for row in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "row": range(1000)}), tmp_path / "en.parquet")
    assert run_command(tmp_path / "en.parquet", tiny_tokenizer, tmp_path / "shards") == 0
    written = (tmp_path / "shards" / "en" / "00000.tok").stat().st_size
    source = Source("en", tmp_path / "en.parquet", "en.parquet")
    assert estimated_bytes([source], open_tokenizer(tiny_tokenizer)) == pytest.approx(written, rel=0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0: the value must be at least 1"),
        (["--shard-tokens", "-5"], "--shard-tokens -5: the value must be at least 1"),
        (["--redo", "xx"], "--redo xx: the input has no such language"),
        (["--language", "de"], "No text of language de"),
        (["--dedup", "lines", "--dedup-memory-mb", "99999999"], "no 99999999 MB for --dedup-memory-mb"),
    ],
)
def test_invalid_options_are_named(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_command(SAMPLES / "cc100" / "sw.txt.xz", tiny_tokenizer, tmp_path / "shards", *arguments) == 2
    assert message in one_paragraph(capsys)


@pytest.mark.parametrize("verb", ["merge", "verify", "stats"])
def test_verbs_name_a_missing_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, str(tmp_path)]) == 2
    assert "python -m data_prep prepare" in one_paragraph(capsys)


def test_a_tokenizer_whose_path_is_not_utf8(tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / os.fsdecode(b"tok\xe9")
    shutil.copytree(tiny_tokenizer, tokenizer)
    assert run_command(SAMPLES / "cc100" / "sw.txt.xz", tokenizer, tmp_path / "shards") == 0
    assert ShardSet(tmp_path / "shards").languages == ["sw"]


def test_version_option_prints_distribution_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"{project['name']} {project['version']}\n"


def test_version_of_an_installed_distribution_comes_from_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line.metadata, "version", {command_line.DISTRIBUTION: "9.8.7"}.__getitem__)
    assert command_line.distribution_version() == "9.8.7"


def test_help_describes_every_verb_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    _, _, listed = capsys.readouterr().out.partition("  VERB\n")
    verbs = dict(line.split(maxsplit=1) for line in listed.partition("\n\n")[0].splitlines())
    assert list(verbs) == ["prepare", "merge", "verify", "stats", "trim-vocab"]
    assert all(len(description.split()) >= 3 for description in verbs.values())
