"""A smaller vocabulary: covered text is split as before, ids map one to one, and lost tokens are counted."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.sentencepiece_pieces import SentencePiecePieces, cut_fast_tokenizer
from data_prep.shards import DataError, ShardSet
from data_prep.tokenizer import SentencePieceTokenizer, ids_of
from data_prep.vocabulary import TrimOptions, kept_ids
from tests.conftest import SAMPLES

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def trim_vocab(tokenizer: Path, output: Path, *words: object) -> int:
    words = ("trim-vocab", "--tokenizer", tokenizer, "--output", output, "--workers", 1, *words)
    return main([str(word) for word in words])


def about(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "vocabulary.json").read_text())


@pytest.fixture(scope="module")
def vocabulary(tiny_teacher: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pieces of the teacher's tokenizer that Swahili and Turkish use, with all files."""
    output = tmp_path_factory.mktemp("vocabulary") / "small"
    assert trim_vocab(tiny_teacher, output, "--shards", tiny_shards, "--languages", "sw,tr") == 0
    return output


def lines_of(tiny_shards: Path, language: str) -> list[np.ndarray]:
    """The ids of every line of a language, with its `</s>`."""
    shards = ShardSet(tiny_shards)
    stream = shards.stream(language, 0, shards.num_tokens(language)).astype(np.int64)
    return [line for line in np.split(stream, np.flatnonzero(stream == 2) + 1) if len(line)]


@pytest.mark.parametrize("language", ["sw", "tr"])
def test_covered_text_maps_one_to_one(tiny_teacher: Path, tiny_shards: Path, vocabulary: Path, language: str) -> None:
    old, new = AutoTokenizer.from_pretrained(tiny_teacher), AutoTokenizer.from_pretrained(vocabulary)
    old_ids = np.array(about(vocabulary)["old_ids"])
    assert len(new) == len(old_ids) < len(old)
    texts = [old.decode(line[:-1].tolist()) for line in lines_of(tiny_shards, language)[:60]]
    for before, after in zip(old(texts)["input_ids"], new(texts)["input_ids"], strict=True):
        assert old_ids[after].tolist() == before


def test_text_with_unknown_characters_maps_one_to_one(tiny_tokenizer: Path, vocabulary: Path) -> None:
    """`<unk>` scores as before, because the piece of lowest score is kept."""
    old, new = (SentencePieceTokenizer(directory) for directory in (tiny_tokenizer, vocabulary))
    old_ids, choice = np.array(about(vocabulary)["old_ids"]), random.Random(0)
    texts = [old.processor.id_to_piece(number - 1).replace("▁", " ") for number in old_ids[4:-1].tolist()]
    lines = ["".join(choice.choices([*texts, "\U0001f0a1"], k=8)) for _ in range(2000)]
    with_unknown = 0
    for before, after in zip(ids_of(old, lines), ids_of(new, lines), strict=True):
        if np.isin(before, old_ids).all():
            assert old_ids[after].tolist() == before.tolist()
            with_unknown += 3 in before
    assert with_unknown > 2
    scores = [
        min(processor.get_score(n) for n in range(3, processor.get_piece_size()))
        for processor in (old.processor, new.processor)
    ]
    assert scores[0] == scores[1]


def test_prepared_again_the_shards_are_the_same_text(tiny_shards: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Shards made with the smaller tokenizer are the old shards with every id mapped."""
    words = ["prepare", "--input", SAMPLES / "cc100" / "sw.txt.xz", "--tokenizer", vocabulary, "--workers", 1]
    assert main([*map(str, words), "--output", str(tmp_path / "shards")]) == 0
    new = np.concatenate(lines_of(tmp_path / "shards", "sw"))
    assert np.array(about(vocabulary)["old_ids"])[new].tolist() == np.concatenate(lines_of(tiny_shards, "sw")).tolist()


def test_specials_keep_their_meaning(tiny_teacher: Path, vocabulary: Path) -> None:
    old, new = AutoTokenizer.from_pretrained(tiny_teacher), AutoTokenizer.from_pretrained(vocabulary)
    old_ids = about(vocabulary)["old_ids"]
    for token in SPECIALS:
        assert old_ids[new.convert_tokens_to_ids(token)] == old.convert_tokens_to_ids(token)
    assert new.convert_tokens_to_ids("<mask>") == len(old_ids) - 1
    assert new.unk_token_id in new("हिन्दी")["input_ids"]


def test_a_lone_model_file_is_enough(tiny_tokenizer: Path, tiny_shards: Path, tmp_path: Path) -> None:
    model = shutil.copy(tiny_tokenizer / "sentencepiece.bpe.model", tmp_path)
    assert trim_vocab(Path(model), tmp_path / "small", "--shards", tiny_shards) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == about(tmp_path / "small")["vocab_size"]


def test_lost_tokens_are_counted(
    tiny_teacher: Path, tiny_shards: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = about(vocabulary)
    for language in ("sw", "tr"):
        loss = found["loss"][language]
        assert (loss["kept"], loss["longer"]) == (1.0, 1.0)
        assert loss["lines"] == loss["lines_equal"] > 10
    hindi = found["loss"]["hi"]
    assert hindi["kept"] == pytest.approx(np.isin(np.concatenate(lines_of(tiny_shards, "hi")), found["old_ids"]).mean())
    assert hindi["kept"] < 0.9
    assert hindi["unknown"] > 0.1
    trim_vocab(tiny_teacher, vocabulary, "--shards", tiny_shards, "--languages", "sw,tr")  # an earlier one is replaced
    printed = capsys.readouterr().out
    assert f"-> {found['vocab_size']:,}" in printed
    assert any(line.startswith("hi ") and "requested" not in line for line in printed.splitlines())
    assert about(vocabulary) == found


def test_text_and_its_shards_count_the_same(tiny_teacher: Path, tiny_shards: Path, tmp_path: Path) -> None:
    texts = [SAMPLES / "cc100" / f"{language}.txt.xz" for language in ("hi", "sw", "he", "tr")]
    assert trim_vocab(tiny_teacher, tmp_path / "text", "--workers", 2, "--input", *texts, "--min-count", 3) == 0
    assert trim_vocab(tiny_teacher, tmp_path / "shards", "--shards", tiny_shards, "--min-count", 3) == 0
    assert about(tmp_path / "text") == about(tmp_path / "shards")


def test_coverage_keeps_the_most_frequent_pieces(tiny_teacher: Path, tiny_shards: Path, tmp_path: Path) -> None:
    sizes = []
    for coverage in (0.9, 0.99, 1.0):
        trim_vocab(tiny_teacher, tmp_path / "v", "--shards", tiny_shards, "--coverage", coverage)
        found = about(tmp_path / "v")
        sizes.append(found["vocab_size"])
        assert all(loss["kept"] >= coverage for loss in found["loss"].values())
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_kept_pieces(tiny_tokenizer: Path) -> None:
    pieces = SentencePiecePieces(SentencePieceTokenizer(tiny_tokenizer))
    number = {text: n for n, text in enumerate(pieces.texts)}
    used = next(text for text in pieces.texts if len(text) > 3 and text.startswith("▁"))
    other = next(text for text in pieces.texts if len(text) > 3 and not set(text) & set(used))
    counts = {language: np.zeros(len(pieces.texts), dtype=np.int64) for language in ("xx", "yy")}
    counts["xx"][[number[used], number["▁a"]]] = 5, 1
    counts["yy"][number[other]] = 9

    def kept(*languages: str, **options: Any) -> set[str]:
        return {pieces.texts[n] for n in kept_ids(counts, TrimOptions(languages, **options), pieces)}

    characters = {text for text in number if 0 < len(text.removeprefix("▁")) <= 1 and set(text) <= set(used)}
    lowest = kept("xx", min_count=6)  # `<unk>` scores below this piece
    assert len(lowest - {""}) <= 2
    assert kept("xx", min_count=2) == {"", used, *characters, *lowest}
    assert kept("xx") == kept("xx", coverage=1.0) > kept("xx", coverage=0.8) == kept("xx", min_count=2)
    assert {used, other} < kept("xx", "yy", coverage=0.8)
    assert other not in kept("xx")


# -- errors


def failure(capsys: pytest.CaptureFixture[str], tokenizer: Path, output: Path, *words: object) -> str:
    """The error of a command that must fail and write nothing: one paragraph."""
    before = sorted(output.parent.rglob("*"))
    assert trim_vocab(tokenizer, output, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sorted(output.parent.rglob("*")) == before
    return errors[0]


def test_impossible_options_are_rejected(tiny_teacher: Path, tiny_shards: Path, tmp_path: Path, capsys) -> None:
    out, shards = tmp_path / "small", ("--shards", tiny_shards)
    assert "at least 1" in failure(capsys, tiny_teacher, out, *shards, "--min-count", 0)
    assert "above 0" in failure(capsys, tiny_teacher, out, *shards, "--coverage", 0)
    assert "at most 1" in failure(capsys, tiny_teacher, out, *shards, "--coverage", 99.5)
    assert "no text of xx, only of he, hi, sw, tr" in failure(capsys, tiny_teacher, out, *shards, "--languages", "xx")
    assert "of --shards everything is counted" in failure(capsys, tiny_teacher, out, *shards, "--where", "score > 0.5")
    with pytest.raises(SystemExit):
        trim_vocab(tiny_teacher, out)
    with pytest.raises(SystemExit):
        trim_vocab(tiny_teacher, out, *shards, "--input", "text")


def test_shards_of_another_tokenizer_are_rejected(
    tiny_teacher: Path, tiny_shards: Path, tmp_path: Path, capsys
) -> None:
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    with open(other / "sentencepiece.bpe.model", "ab") as file:
        file.write(b"\xf8\x07\x01")  # an unknown field: the same pieces under another sha256
    assert "not made with the tokenizer" in failure(capsys, other, tmp_path / "small", "--shards", tiny_shards)


def test_a_directory_that_is_no_output_is_not_overwritten(
    tiny_teacher: Path, tiny_shards: Path, vocabulary: Path, tmp_path: Path, capsys
) -> None:
    precious = tmp_path / "student"
    precious.mkdir()
    (precious / "config.json").write_text("{}")
    shutil.copy(vocabulary / "vocabulary.json", precious)  # a trimmed student carries its map
    assert "is not replaced" in failure(capsys, tiny_teacher, precious, "--shards", tiny_shards)


def test_a_fast_tokenizer_with_another_vocabulary_is_rejected(tiny_teacher: Path) -> None:
    path = tiny_teacher / "tokenizer.json"
    tree = json.loads(path.read_text())
    pieces = ["", "", "", "", *(piece for piece, _ in tree["model"]["vocab"][4:-1]), ""]
    kept = np.arange(len(pieces))
    assert cut_fast_tokenizer(tree, pieces, kept, path) == tree
    with pytest.raises(DataError, match="does not have the vocabulary of"):
        cut_fast_tokenizer(tree, [*pieces[:9], "other", *pieces[10:]], kept, path)
    with pytest.raises(DataError, match="does not have the vocabulary of"):
        cut_fast_tokenizer({**tree, "model": {"type": "BPE", "vocab": {"a": 1}}}, pieces, kept, path)


def test_a_sentencepiece_model_of_another_kind_is_rejected(tmp_path: Path) -> None:
    """Its splits follow other rules: `tokenizer.json` states them."""
    lines = iter(["the quick brown fox jumps over the lazy dog"] * 20)
    prefix = str(tmp_path / "sentencepiece.bpe")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=prefix, vocab_size=40, model_type="bpe", minloglevel=2
    )
    with pytest.raises(DataError, match=r"is not a unigram model.*tokenizer\.json.*save_pretrained"):
        SentencePiecePieces(SentencePieceTokenizer(tmp_path))


def test_text_in_another_encoding_is_not_counted(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "de.txt").write_bytes(b"gr\xfcn\ngr\xfcn\ngr\xfcn\nrot\n" * 2)
    arguments = ["trim-vocab", "--tokenizer", str(tiny_tokenizer), "--input", str(tmp_path), "--workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "vocabulary")]) == 2
    assert "6 of 8 lines (75%) are not UTF-8, the first in line 1 of" in capsys.readouterr().err
    assert not (tmp_path / "vocabulary").exists()
