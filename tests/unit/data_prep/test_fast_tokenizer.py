"""Shards made with a tokenizer.json: WordPiece and byte-level BPE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, CamembertTokenizer, XLMRobertaTokenizer

from data_prep.prepare import PrepareConfig, prepare
from data_prep.shards import BOS_ID, DataError, ShardSet
from data_prep.tokenizer import FastTokenizer, SentencePieceTokenizer, open_tokenizer
from data_prep.tokenizer_ids import tokenizer_file
from tests.unit.data_prep.tiny_tokenizers import WORDS, byte_bpe, save, word_piece

LINES = ["The [SEP] quick brown fox's den, unaffordable.", "Ein </s> zweiter Satz 你好 [CLS]", "third line é", "x"]


@pytest.mark.parametrize("make", [word_piece, byte_bpe])
def test_rows_are_what_the_hugging_face_tokenizer_gives(make, tmp_path: Path) -> None:
    """The ids of every line and its end token, in order. Names of special tokens in the text stay text."""
    directory = make(tmp_path / "tokenizer")
    plain = [line for line in LINES if "[" not in line and "</s>" not in line]
    encoder = open_tokenizer(directory)
    reference = AutoTokenizer.from_pretrained(directory)
    ids, lengths = encoder.encode_lines([line.encode() for line in LINES])
    lines = np.split(ids, np.cumsum(lengths)[:-1])
    assert len(lines) == len(LINES)
    ends = encoder.special_ids
    for line, of_line in zip(LINES, lines, strict=True):
        assert of_line[-1] == ends["eos"]
        assert not set(of_line[:-1].tolist()) & {ends["bos"], ends["eos"]}
        if line in plain:
            expected = reference(line, add_special_tokens=True, truncation=False, padding=False)["input_ids"]
            assert [ends["bos"], *of_line.tolist()] == expected
    assert encoder.vocab_size == len(reference)
    assert encoder.encode_lines([])[0].size == 0


@pytest.mark.parametrize("make", [word_piece, byte_bpe])
def test_shards_begin_and_end_their_rows_as_the_encoder_does(make, tmp_path: Path) -> None:
    directory = make(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.txt").write_text("\n\n".join(WORDS))
    outputs = []
    for num_workers in (1, 2):
        output = tmp_path / f"shards{num_workers}"
        prepare(PrepareConfig([str(tmp_path / "text")], directory, output, num_workers=num_workers))
        outputs.append({file.name: file.read_bytes() for file in output.rglob("*.tok")})
    assert outputs[0] == outputs[1]
    shards = ShardSet(tmp_path / "shards1")
    ends = open_tokenizer(directory).special_ids
    rows = shards.rows("en", range(shards.num_rows("en", 16)), 16)
    assert set(rows[:, 0]) == {ends["bos"]}
    assert set(rows[:, -1]) == {ends["eos"]}
    text = AutoTokenizer.from_pretrained(directory).decode(rows[0], skip_special_tokens=True)
    assert "quick brown" in text.replace("  ", " ")


def test_the_class_of_the_directory_decides_between_two_files(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """XLM-R's SentencePiece model is preferred to its tokenizer.json; for other classes the tokenizer.json is."""
    both = byte_bpe(tmp_path / "both")
    shutil.copy(tiny_tokenizer / "sentencepiece.bpe.model", both)
    assert isinstance(open_tokenizer(both), FastTokenizer)
    shutil.copy(tiny_tokenizer / "tokenizer_config.json", both)
    assert isinstance(open_tokenizer(both), SentencePieceTokenizer)


@pytest.mark.parametrize("config", [None, {"model_max_length": 512}], ids=["no config", "config without a class"])
@pytest.mark.parametrize(
    ("family", "deciding"),
    [(XLMRobertaTokenizer, "sentencepiece.bpe.model"), (CamembertTokenizer, "tokenizer.json")],
)
def test_a_directory_that_names_no_class_is_judged_by_its_ids(
    family, deciding: str, config: dict | None, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """CamemBERT's SentencePiece model has the name of XLM-R's, and its pieces have other ids."""
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    reference = family.from_pretrained(directory)
    reference.save_pretrained(directory)  # the library converts it to a tokenizer.json
    (directory / "tokenizer_config.json").unlink()
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = open_tokenizer(directory)
    assert encoder.path.name == deciding
    line = "The quick brown fox and a second sentence"
    begin, *expected = reference(line)["input_ids"]
    assert encoder.encode_lines([line.encode()])[0].tolist() == expected
    assert encoder.special_ids.get("bos", BOS_ID) == begin
    (directory / "tokenizer.json").unlink()
    assert tokenizer_file(directory).name == "sentencepiece.bpe.model"


def test_an_invalid_tokenizer_json_is_not_ignored(tiny_tokenizer: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    (directory / "tokenizer_config.json").unlink()
    (directory / "tokenizer.json").write_text('{"model": {"vocab": ')
    with pytest.raises(DataError, match=r"is not a valid tokenizer\.json"):
        open_tokenizer(directory)


def test_a_tokenizer_without_special_tokens_is_rejected(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=60))
    with pytest.raises(DataError, match="puts 0 special tokens around a text"):
        open_tokenizer(save(tokenizer, tmp_path / "decoder", "GPT2Tokenizer"))
    (tmp_path / "decoder" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a valid tokenizer\.json"):
        open_tokenizer(tmp_path / "decoder")
