"""Encoding by words: the cut into words, the rule, and the proofs that a tokenizer's ids are those of its words."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

from data_prep.__main__ import main
from data_prep.shards import DataError, ShardSet
from data_prep.tokenizer import SentencePieceTokenizer, open_tokenizer
from data_prep.word_boundaries import maps_across_spaces, why_not_json, why_not_sentencepiece
from data_prep.word_unit import WordUnitTokenizer
from data_prep.words import WordEncoder, have_short_words, words_of
from tests.unit.data_prep.corpus import content, run, write_corpus
from tests.unit.data_prep.tiny_tokenizers import byte_bpe

END = 1000
protobuf: Any = sentencepiece_model_pb2


def as_bytes(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """An encoder whose ids are the bytes of a text, without a space at its start."""
    ids = [[*text.removeprefix(b" "), END] for text in texts]
    return np.array([number for text in ids for number in text], np.uint32), np.array([*map(len, ids)], np.int64)


@pytest.mark.parametrize("seed", range(20))
def test_ids_of_lines_are_those_of_their_words(seed: int) -> None:
    """Runs of spaces, lines of spaces, and lines that are not divided."""
    chance = random.Random(seed)
    words = [b"a", b"bb", "ü".encode(), b"", b"x\ty", b"\r"]
    lines = [b" ".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(chance.randint(1, 30))]
    undivided = np.array([chance.random() < 0.3 for _ in lines])
    ids, lengths = WordEncoder(as_bytes).encode(words_of(lines, undivided))
    expected = [
        [*(line.removeprefix(b" ") if one_word else line.replace(b" ", b"")), END]
        for line, one_word in zip(lines, undivided, strict=True)
    ]
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    assert words_of(lines).num_bytes == sum(map(len, lines)) + len(lines)


def test_the_rule_depends_on_the_number_of_different_words() -> None:
    few, many = (
        [b"one two three four five six"] * 50,
        [b" ".join(b"%d" % (n * 7 + k) for k in range(7)) for n in range(99)],
    )
    assert have_short_words(few)
    assert words_of(few).are_worth_it
    assert have_short_words(many)
    assert not words_of(many).are_worth_it
    assert not have_short_words(["すべての人間は、生まれながらにして自由である".encode()])
    assert not have_short_words([])


def test_the_memory_for_words_is_limited_by_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are not divided are long words. They are few, so their number does not limit what is remembered."""
    monkeypatch.setattr("data_prep.words.MOST_REMEMBERED_IDS", 5000)
    encoder = WordEncoder(as_bytes)
    for number in range(50):
        line = b"x  %d" % number * 200
        ids, lengths = encoder.encode(words_of([line], np.array([True])))
        assert (ids.tolist(), lengths.tolist()) == ([*line, END], [len(line) + 1])
        assert len(encoder._ids) < 5000 + 2 * len(line)


def model_with(tiny_tokenizer: Path, change: Callable[[Any], None]) -> bytes:
    model = protobuf.ModelProto()
    model.ParseFromString((tiny_tokenizer / "sentencepiece.bpe.model").read_bytes())
    change(model)
    return model.SerializeToString()


def charsmap(rules: str, directory: Path) -> bytes:
    """The compiled form of normalisation rules, by SentencePiece's own compiler."""
    (directory / "rules.tsv").write_text(rules)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world abc def"] * 50), model_writer=written, vocab_size=30, minloglevel=2,
        hard_vocab_limit=False, normalization_rule_tsv=str(directory / "rules.tsv"),
    )  # fmt: skip
    model = protobuf.ModelProto()
    model.ParseFromString(written.getvalue())
    return model.normalizer_spec.precompiled_charsmap


@pytest.mark.parametrize(
    ("rules", "across"),
    [("61 20 62\t78", True), ("20 61\t62", True), ("61 20\t62", True), ("61 62\t20", False), ("20\t5F", False)],
)
def test_rules_that_reach_across_a_space_are_found(rules: str, across: bool, tmp_path: Path) -> None:
    assert maps_across_spaces(charsmap(f"41\t42\n{rules}\n", tmp_path)) is across


def test_the_rules_of_nfkc_do_not_reach_across_a_space(tiny_tokenizer: Path) -> None:
    model = protobuf.ModelProto()
    model.ParseFromString((tiny_tokenizer / "sentencepiece.bpe.model").read_bytes())
    assert len(model.normalizer_spec.precompiled_charsmap) > 100_000
    assert not maps_across_spaces(model.normalizer_spec.precompiled_charsmap)


def change_piece(model: Any, text: str, **fields: Any) -> None:
    piece = model.pieces[100]
    piece.piece = text
    for name, value in fields.items():
        setattr(piece, name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: change_piece(model, "▁of▁the"), "piece '▁of▁the' holds a space after its start"),
        (lambda model: change_piece(model, "New", type=4), "piece 'New' is found in the text before"),
        (lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False), "add_dummy_prefix off"),
        (lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", False), "extra_whitespaces off"),
        (lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True), "the space after a word"),
        (lambda model: setattr(model.trainer_spec, "model_type", 2), "not a unigram model"),
        (
            lambda model: [setattr(piece, "piece", "qq") for piece in model.pieces if piece.piece == "▁"],
            "no piece for a space alone",
        ),
    ],
)
def test_a_model_whose_words_are_not_apart_is_rejected(
    change: Callable[[Any], None], reason: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.model").write_bytes(model_with(tiny_tokenizer, change))
    with pytest.raises(DataError, match=reason) as error:
        open_tokenizer(tmp_path / "m.model", unit="word")
    assert "Use --unit line" in str(error.value)
    assert "\n" not in str(error.value)
    assert open_tokenizer(tmp_path / "m.model").unit == "line"


def test_a_model_with_a_rule_across_spaces_is_rejected(tiny_tokenizer: Path, tmp_path: Path) -> None:
    rules = charsmap("61 20 62\t78\n", tmp_path)
    model = model_with(tiny_tokenizer, lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", rules))
    assert "a rule for a text with a space" in str(why_not_sentencepiece(model))


def test_a_tokenizer_json_is_rejected_for_the_unit_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "en.txt").write_text("some text\n")
    words = ["--input", tmp_path / "en.txt", "--tokenizer", byte_bpe(tmp_path / "t"), "--output", tmp_path / "out"]
    assert main(["prepare", *map(str, words), "--unit", "word"]) == 2
    assert "--unit word is for SentencePiece models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ids_of_words_differ_from_those_of_lines_by_near_ties_only(tiny_tokenizer: Path, tmp_path: Path) -> None:
    by_line, by_word = SentencePieceTokenizer(tiny_tokenizer), WordUnitTokenizer(tiny_tokenizer)
    corpus = write_corpus(tmp_path / "corpus")
    lines = [line for line in (corpus / "sw" / "part-1.txt").read_bytes().split(b"\n") if line.strip()] * 3
    lines += [b"a  b   c", "☺ ☺☺ ☺ e\u0301 \u0301x".encode()]
    ids, lengths = by_word.encode_by_words(lines)
    expected, expected_lengths = by_line.encode_lines(lines)
    differing = 0
    parts = [np.split(a, np.cumsum(b)[:-1]) for a, b in ((ids, lengths), (expected, expected_lengths))]
    for ours, theirs in zip(*parts, strict=True):
        one, other = ours[:-1].tolist(), theirs[:-1].tolist()
        if one != other:
            differing += 1
            assert by_line.are_near_tie(one, other)
    assert differing <= len(lines) // 50
    assert np.array_equal(by_word.encode_lines(lines)[0], ids), "the lines are repeated, so their words are worth it"


def test_shards_of_words_are_the_same_for_any_number_of_workers_and_after_an_interruption(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    for name, workers in (("one", 1), ("two", 2), ("resumed", 1)):
        run(corpus, tiny_tokenizer, tmp_path / name, num_workers=workers, unit="word")
    journal = tmp_path / "resumed" / "tr" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    (tmp_path / "resumed" / "manifest.json").unlink()
    run(corpus, tiny_tokenizer, tmp_path / "resumed", num_workers=2, unit="word")
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "resumed")
    assert ShardSet(tmp_path / "one").manifest["options"]["unit"] == "word"


def test_a_directory_holds_shards_of_one_unit(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("some text here\n" * 5)
    run(tmp_path / "en.txt", tiny_tokenizer, tmp_path / "out")
    assert "unit" not in ShardSet(tmp_path / "out").manifest["options"]
    with pytest.raises(DataError, match="unit is 'line' there and 'word' here"):
        run(tmp_path / "en.txt", tiny_tokenizer, tmp_path / "out", unit="word")


PARTS = {
    "bert": ({"type": "BertNormalizer"}, {"type": "BertPreTokenizer"}),
    "roberta": (None, {"type": "ByteLevel", "add_prefix_space": False}),
    "metaspace": ({"type": "NFKC"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}),
    "after": (None, {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "WhitespaceSplit"}]}),
}


@pytest.mark.parametrize("name", PARTS)
def test_steps_that_cut_at_spaces_are_known(name: str) -> None:
    normalizer, pre_tokenizer = PARTS[name]
    parsed = {"model": {"type": "WordPiece"}, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    assert why_not_json(parsed) is None


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
ADDED = {"content": "New York", "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "ByteLevel is not known"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": " ?x"}, "behavior": "Isolated"}}, "Split is not known"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "a b"}, "content": "c"}}, "Replace may reach"),
        ({"model": {"type": "BPE", "dropout": 0.1, "vocab": {}}}, "at random"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}, "normalizer": SPACES}, "no piece for a space"),
        ({"model": {"type": "Unigram", "vocab": []}, "normalizer": SPACES}, "nothing in it cuts"),
        ({"model": {"type": "BPE", "vocab": dict.fromkeys(["▁", *(f"a▁{n}" for n in range(200))], 0)}, "normalizer": SPACES},
         "200 of its pieces"),
        ({"added_tokens": [ADDED], "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "WhitespaceSplit"}},
         "added token 'New York'"),
    ],
)  # fmt: skip
def test_steps_that_may_reach_across_are_not_trusted(parts: dict[str, Any], reason: str) -> None:
    assert reason in str(why_not_json({"model": {"type": "BPE", "vocab": {}}, **parts}))


def test_precompiled_rules_of_a_tokenizer_json_are_read(tmp_path: Path) -> None:
    for rules, across in (("61 20 62\t78\n", True), ("61 62\t78\n", False)):
        step = json.loads(normalizers.Precompiled(charsmap(rules, tmp_path)).__getstate__())
        assert base64.b64decode(step["precompiled_charsmap"])
        parsed = {"model": {"type": "Unigram"}, "normalizer": step, "pre_tokenizer": {"type": "WhitespaceSplit"}}
        assert ("a rule for a text with a space" in str(why_not_json(parsed))) is across
