"""Comparing ids with `AutoTokenizer`'s: which lines, which differences are accepted, what is recorded, in which process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from packaging.version import Version
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.awkward import LINES, composed
from data_prep.line_sample import sample_lines
from data_prep.manifest import import_languages, make_manifest, read_run, write_manifest
from data_prep.shards import DataError, ShardSet
from data_prep.sources import Source
from data_prep.tokenizer import SentencePieceTokenizer, open_tokenizer
from tests.conftest import REPO, SAMPLES
from tests.unit.data_prep.corpus import run
from tests.unit.data_prep.id_checks import TEXT, XLMR, error_of, write
from tests.unit.data_prep.tiny_tokenizers import word_piece


def test_words_that_only_the_text_has_are_compared_too(tiny_tokenizer: Path, text: Path, tmp_path: Path) -> None:
    """Two pieces that no fixed line has are exchanged, so that only lines of the language differ."""
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    words = (SAMPLES / "cc100" / "de.txt.xz", "de")
    lines = sample_lines("de", [Source("de", words[0], "de.txt.xz")]).lines
    encoder = open_tokenizer(directory)
    elsewhere = set(encoder.encode_lines([line.encode() for line in LINES])[0].tolist())
    ids = encoder.encode_lines([line.encode() for line in lines])[0]
    numbers, counts = np.unique(ids[~np.isin(ids, [*elsewhere, 0, 1, 2, 3])], return_counts=True)
    one, other = numbers[np.argsort(-counts)[:2]].tolist()
    vocabulary = content["model"]["vocab"]
    vocabulary[one][0], vocabulary[other][0] = vocabulary[other][0], vocabulary[one][0]
    write(directory / "tokenizer.json", content)
    shutil.copy(words[0], text)
    message = error_of(text, directory, tmp_path / "shards")
    assert "The first, a line of de: " in message


def test_splits_with_equal_scores_are_accepted(tmp_path: Path) -> None:
    """One library splits three dots as `..` `.` and the other as `.` `..`, because of rounding."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    lines = [f"{number} words… and more" for number in range(20)]
    train(directory, ["tiếng việt số một", "カキクケコ ガギグゲゴ ハヒフヘホ パピプペポ ゙ ゚"])
    reference, encoder = AutoTokenizer.from_pretrained(directory), open_tokenizer(directory)
    pairs = [
        (encoder.encode_lines([line.encode()])[0].tolist()[:-1], reference(line)["input_ids"][1:-1]) for line in lines
    ]
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    if not differing and Version(sentencepiece.__version__) < Version("0.2.3"):
        pytest.skip(f"the pieces that sentencepiece {sentencepiece.__version__} trains give both libraries one split")
    assert len(differing) > 2
    assert isinstance(encoder, SentencePieceTokenizer)
    assert all(encoder.are_near_tie(*pair) for pair in differing)
    assert not encoder.are_near_tie(differing[0][0], differing[0][1][1:])
    (tmp_path / "en.txt").write_text("\n".join(lines))
    run([str(tmp_path / "en.txt")], directory, tmp_path / "shards")
    counts = ShardSet(tmp_path / "shards").manifest["languages"]["en"]["counts"]
    assert (counts["lines_compared"], counts["lines_compared_differing"]) == (len(lines), len(differing))


def train(directory: Path, texts: list[str]) -> None:
    """Train a SentencePiece model in XLM-R's layout on these texts and the fixed lines."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *LINES] * 10),
        model_prefix=str(directory / "sentencepiece.bpe"),
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    write(directory / "tokenizer_config.json", XLMR)


def test_a_few_lines_may_differ(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """U+0085 is white space for one library and an unknown character for the other."""
    (tmp_path / "en.txt").write_bytes("\n".join([*TEXT, "one\u0085two", "three\u0085four"]).encode())
    run([str(tmp_path / "en.txt")], tiny_tokenizer, tmp_path / "shards")
    counts = ShardSet(tmp_path / "shards").manifest["languages"]["en"]["counts"]
    assert (counts["lines_compared"], counts["lines_compared_differing"]) == (len(TEXT) + 2, 2)


def test_decomposed_vietnamese_and_half_width_kana_are_accepted(tmp_path: Path) -> None:
    """The two libraries compose characters of several code points differently. They agree on the composed line."""
    lines = [*["Tie\u0302\u0301ng Vie\u0323\u0302t"] * 9, *["ｶﾞｷﾞｸﾞ ﾊﾟﾋﾟ"] * 9]
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    train(directory, ["tiếng việt số một", "カキクケコ ガギグゲゴ ハヒフヘホ パピプペポ ゙ ゚"])
    reference, encoder = AutoTokenizer.from_pretrained(directory), open_tokenizer(directory)

    def differ(line: str) -> bool:
        return encoder.encode_lines([line.encode()])[0].tolist() != reference(line)["input_ids"][1:]

    assert all(map(differ, lines))
    assert not any(differ(composed(line)) for line in lines)
    (tmp_path / "vi.txt").write_text(
        "\n".join(f"{line} {number}" for number, line in enumerate(lines)), encoding="utf-8"
    )
    run([str(tmp_path / "vi.txt")], directory, tmp_path / "shards")
    counts = ShardSet(tmp_path / "shards").manifest["languages"]["vi"]["counts"]
    assert (counts["lines_compared"], counts["lines_compared_differing"]) == (18, 18)


def test_the_sample_is_reproducible_and_holds_rare_lines(tmp_path: Path) -> None:
    lines = [f"line number {number} of plain text" for number in range(5000)]
    lines[3500] = "a line with ☃ in it"
    (tmp_path / "en.txt").write_text("\n".join(lines))
    source = Source("en", tmp_path / "en.txt", "en.txt")
    one, other = sample_lines("en", [source]), sample_lines("en", [source])
    assert one == other
    assert one.lines[:100] == lines[:100]
    assert lines[3500] in one.lines
    assert any(line in one.lines for line in lines[1000:3500])
    assert len(one.lines) <= 300


def test_the_counts_survive_a_merge_and_old_outputs_have_none(tiny_tokenizer: Path, text: Path, tmp_path: Path) -> None:
    run(text, tiny_tokenizer, tmp_path / "one")
    import_languages(tmp_path / "merged", tmp_path / "one")
    write_manifest(tmp_path / "merged")
    merged = ShardSet(tmp_path / "merged").manifest
    assert merged == ShardSet(tmp_path / "one").manifest
    assert set(merged["ids_compared_with"]) == {"transformers", "tokenizers", "sha256"}
    old = {key: value for key, value in read_run(tmp_path / "merged").items() if key != "ids_compared_with"}
    write(tmp_path / "merged" / "prepare.json", old)
    write(tmp_path / "merged" / "manifest.json", make_manifest(tmp_path / "merged", old))
    assert run(text, tiny_tokenizer, tmp_path / "merged") == []
    assert "ids_compared_with" not in ShardSet(tmp_path / "merged").manifest


def test_older_shards_without_unknown_words_are_recognised(text: Path, tmp_path: Path) -> None:
    """Older versions left out unknown words of WordPiece. Their outputs are not continued, and a run that reads them warns."""
    directory = word_piece(tmp_path / "tokenizer")
    run(text, directory, tmp_path / "shards")
    what, warnings = ShardSet(tmp_path / "shards").compare_ids(directory)
    assert (what, warnings) == ("ids compared with AutoTokenizer's when the shards were prepared", [])
    old = read_run(tmp_path / "shards")
    del old["tokenizer"]["unk"], old["ids_compared_with"]
    write(tmp_path / "shards" / "prepare.json", old)
    write_manifest(tmp_path / "shards")
    what, warnings = ShardSet(tmp_path / "shards").compare_ids(directory)
    assert re.fullmatch(r"ids compared with AutoTokenizer's on \d\d lines", what)
    assert ["left out unknown words" in warning for warning in warnings] == [True]
    with pytest.raises(DataError, match="unk is None there and 1 here"):
        run(text, directory, tmp_path / "shards")


def test_a_vocabulary_is_not_cut_from_a_model_that_is_not_xlmrs(
    model_alone: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = model_alone(tokenizer_config={"tokenizer_class": "CamembertTokenizer"})
    words = ["trim-vocab", "--tokenizer", directory, "--input", text, "--output", tmp_path / "small", "--workers", 1]
    assert main([str(word) for word in words]) == 2
    assert "(CamembertTokenizer)" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_the_process_that_forks_imports_neither_transformers_nor_torch(
    tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from data_prep.__main__ import main; "
        f"assert main(['prepare', '--input', {str(text)!r}, '--tokenizer', {str(tiny_tokenizer)!r}, '--workers', '2', "
        f"'--output', {str(tmp_path / 'shards')!r}]) == 0; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True)
    assert ShardSet(tmp_path / "shards").manifest["languages"]["en"]["counts"]["lines_compared"] == len(TEXT)


def test_a_comparison_that_is_killed_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    import os
    import signal

    from data_prep import id_check

    monkeypatch.setattr(id_check, "reference_of", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert "ended with status -9" in error_of(text, tiny_tokenizer, tmp_path / "shards")
