"""`stats` and `verify` show the quality of each language and flag unusual ones; unfinished shards are reported as such."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.manifest import write_manifest
from data_prep.quality import qualities
from data_prep.shards import DataError, ShardSet, manifest_digest
from tests.conftest import SAMPLES
from tests.unit.data_prep.corpus import run_command

LANGUAGES = ("ar", "de", "en", "ru")


@pytest.fixture(scope="module")
def odd(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Languages that the tokenizer knows, and text of unknown characters under the name of Georgian."""
    root = tmp_path_factory.mktemp("odd")
    for language in LANGUAGES:
        shutil.copy(SAMPLES / "cc100" / f"{language}.txt.xz", root)
    (root / "ka.txt").write_text("\n".join("\u10d0 \u10d1 \u10d2 x" for _ in range(500)))
    en = lzma.open(root / "en.txt.xz").read().replace(b"the\n", b"th\xe9\n")
    lines = [line + b" \xe9t\xe9" if number % 40 == 0 and line else line for number, line in enumerate(en.split(b"\n"))]
    (root / "en.txt.xz").write_bytes(lzma.compress(b"\n".join(lines)))
    assert run_command(root, tiny_tokenizer, root / "shards") == 0
    return root / "shards"


def columns(table: str, language: str, first: int) -> list[str]:
    row = next(line for line in table.splitlines() if line.startswith(f"| {language} |"))
    return [cell.strip() for cell in row.split("|")][first:-1]


def test_both_commands_flag_unusual_languages(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, first in (("verify", 2), ("stats", 9)):
        capsys.readouterr()
        assert main([verb, str(odd)]) == 0
        table = capsys.readouterr().out
        assert "broken lines | <unk> | tokens per byte | odd" in table
        broken, unknown, _, why = columns(table, "ka", first)
        assert broken == "0.00%"
        assert float(unknown.strip("%")) > 30
        assert "many <unk>" in why
        broken, _, _, why = columns(table, "en", first)
        assert 1 < float(broken.strip("%")) < 5
        assert why == "broken lines"
        assert columns(table, "de", first)[3] == ""


def test_figures_are_those_of_the_shards(odd: Path) -> None:
    shards = ShardSet(odd)
    for row in qualities(shards):
        ids = shards.stream(row.language, 0, shards.num_tokens(row.language))
        assert row.unknown_share == pytest.approx((ids == 3).mean())
        assert row.tokens_per_byte == pytest.approx(len(ids) / shards.num_bytes(row.language))


def test_tokens_per_byte_are_compared_with_the_others(tiny_tokenizer: Path, tmp_path: Path) -> None:
    for language in LANGUAGES:
        shutil.copy(SAMPLES / "cc100" / f"{language}.txt.xz", tmp_path)
    (tmp_path / "sw.txt").write_text("7.3/9:1(8)2;6=4+5\n" * 200)
    assert run_command(tmp_path, tiny_tokenizer, tmp_path / "shards") == 0
    odd = {row.language: row.odd for row in qualities(ShardSet(tmp_path / "shards")) if row.odd}
    assert list(odd) == ["sw"]
    assert "many tokens per byte" in odd["sw"]


def test_shards_made_before_these_counts_are_valid(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(odd, tmp_path / "old")
    for journal in old.glob("*/journal.jsonl"):
        journal.unlink()
    (old / "prepare.json").unlink()
    manifest: dict[str, Any] = json.loads((old / "manifest.json").read_text())
    for entry in manifest["languages"].values():
        entry["counts"] = {"lines": entry["counts"]["lines"]}
    manifest["manifest_xxh3_128"] = manifest_digest(manifest)
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(old)]) == 0
    assert main(["stats", str(old)]) == 0
    assert columns(capsys.readouterr().out, "ka", 2)[1:4:2] == ["", ""]


def test_unfinished_shards_are_reported_as_unfinished(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(SAMPLES / "cc100" / "sw.txt.xz", tmp_path / "in")
    (tmp_path / "in" / "tr.txt.xz").write_bytes((SAMPLES / "cc100" / "tr.txt.xz").read_bytes()[:5000])
    output = tmp_path / "out"
    assert run_command(tmp_path / "in", tiny_tokenizer, output) == 2
    for verb in ("verify", "stats"):
        capsys.readouterr()
        assert main([verb, str(output)]) == 2
        said = capsys.readouterr().err
        assert "are unfinished" in said
        assert "Run the same prepare command again" in said
        assert f"python -m data_prep merge {output} --partial" in said
        assert "corrupt" not in said
    with pytest.raises(DataError, match="unfinished"):
        ShardSet(output)
    assert main(["merge", str(output), "--partial"]) == 0
    assert ShardSet(output).languages == ["sw"]


def test_languages_that_were_not_merged_are_named_with_the_command(tiny_tokenizer: Path, tmp_path: Path) -> None:
    parts = tmp_path / "shards.parts"
    parts.mkdir()
    assert run_command(SAMPLES / "cc100" / "sw.txt.xz", tiny_tokenizer, parts / "sw") == 0
    with pytest.raises(
        DataError, match=rf"have not been merged.*python -m data_prep merge {tmp_path}/shards --from {parts}/\*"
    ):
        ShardSet(tmp_path / "shards")
    assert main(["merge", str(tmp_path / "shards"), "--from", str(parts / "sw")]) == 0
    write_manifest(tmp_path / "shards")
    assert ShardSet(tmp_path / "shards").languages == ["sw"]
