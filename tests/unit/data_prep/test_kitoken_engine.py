"""kitoken in place of tokenizers: the same ids on every line, a stop where they differ, and its name in the manifest."""

from __future__ import annotations

import json
import lzma
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from benchmarks.json_tokenizers import KINDS, make_tokenizer_json
from data_prep.__main__ import main
from data_prep.fast_tokenizer import FastTokenizer
from data_prep.kitoken_engine import KitokenEngine, any_of
from data_prep.line_sample import LineSample
from data_prep.shards import DataError, ShardSet
from data_prep.tokenizer import open_tokenizer
from tests.conftest import SAMPLES
from tests.unit.data_prep.corpus import content, run, run_command, write_corpus
from tests.unit.data_prep.tiny_tokenizers import WORDS, byte_bpe, save

LANGUAGES = sorted(path.name.split(".")[0] for path in (SAMPLES / "cc100").glob("*.xz"))
# Characters on which libraries disagree: cased, composing, reordered, unassigned, private, spaces, markers, other planes.
AWKWARD = [*"aΣσİıſKÅé'.,<>|[]_-0９½ﬁｶﾞ▁☺😀你ก", *"\u0301\u0323\u0345\u200d\ufeff\u00a0\u3000\u2028\t\r", "\u0378", "\ufffd", "\ue000",
           "\U000113c2", "\U00011938", "\u061d", "\u2e53", "\U0001e030", "\u1ac1"]  # fmt: skip


def lines_of(language: str) -> list[str]:
    with lzma.open(SAMPLES / "cc100" / f"{language}.txt.xz", "rt", encoding="utf-8") as text:
        return [line.strip() for line in text if line.strip()]


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of each kind, trained on some lines of six languages."""
    lines = [line for name in ("en", "de", "ru", "ja", "hi", "el") for line in lines_of(name)[:150]]
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make_tokenizer_json(kind, root / kind, lines, 3000) for kind in KINDS}


def both(directory: Path) -> tuple[FastTokenizer, FastTokenizer]:
    one, other = FastTokenizer(directory / "tokenizer.json", "kitoken"), FastTokenizer(directory / "tokenizer.json")
    assert one.engine.startswith("kitoken ")
    assert other.engine == ""
    return one, other


def edited(directory: Path, target: Path, **changes: Any) -> Path:
    """A copy of a tokenizer.json with other values at its top level."""
    target.mkdir()
    parsed = json.loads((directory / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps({**parsed, **changes}))
    (target / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    return target


def with_added(directory: Path, target: Path, tokens: list[str | AddedToken]) -> Path:
    """A copy of a tokenizer.json with more tokens. Returns the file."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(tokens)
    tokenizer.save(str(target))
    return target


def assert_same_ids(ours: FastTokenizer, theirs: FastTokenizer, lines: list[str]) -> None:
    encoded = [line.encode() for line in lines]
    (ids, lengths), (expected, expected_lengths) = ours.encode_lines(encoded), theirs.encode_lines(encoded)
    assert lengths.tolist() == expected_lengths.tolist()
    assert np.array_equal(ids, expected)
    ours.judge(lines, "a line of the test")  # by lines and by words


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers_on_all_samples(kind: str, tokenizers_of: dict[str, Path]) -> None:
    ours, theirs = both(tokenizers_of[kind])
    for language in LANGUAGES:
        assert_same_ids(ours, theirs, lines_of(language)[:150])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_ids_are_those_of_tokenizers_on_awkward_text(kind: str, seed: int, tokenizers_of: dict[str, Path]) -> None:
    chance = random.Random(seed)
    parts = [*AWKWARD, " ", " ", "  ", "the", "[SEP]", "<eos>", "<0x41>", "[MASK]", "##e", "word"]
    lines = ["".join(chance.choices(parts, k=chance.randint(1, 12))).strip() for _ in range(700)]
    assert_same_ids(*both(tokenizers_of[kind]), [line for line in lines if line])


def test_characters_that_differ_go_to_tokenizers(tokenizers_of: dict[str, Path]) -> None:
    """kitoken lowers a final capital sigma as if a letter followed, and has newer tables of punctuation and marks."""
    ours, _ = both(tokenizers_of["wordpiece"])
    engine = ours._engine
    assert engine is not None
    texts = ["ΠΟΛΙΤΙΣΜΟΣ", "plain text", "end\u061d", "unknown \u0378", "private \ue000", "[SEP]", "日本語"]
    assert engine.unsafe(texts).tolist() == [True, False, True, True, True, True, False]
    encoded = ours._by_tokenizers(texts)
    assert engine.encode(texts[:1])[0] != encoded[0].ids, "the case is one in which the engine is wrong"


def test_marks_whose_order_differs_go_to_tokenizers(tokenizers_of: dict[str, Path]) -> None:
    """kitoken's tables of Unicode are newer: it moves U+07FD of N'Ko and Arabic's U+08D3 before or behind other marks."""
    ours, theirs = both(tokenizers_of["byte_bpe"])
    marks = [chr(code) for code in range(0x300, 0x11000) if unicodedata.combining(chr(code))]
    texts = [
        base + text for mark in marks for base in "a'" for text in (f"\u0301{mark}", f"{mark}\u0334", f"\u0345{mark}")
    ]
    assert_same_ids(ours, theirs, [" ".join(texts[number : number + 20]) for number in range(0, len(texts), 20)])
    assert_same_ids(ours, theirs, texts)
    engine = ours._engine
    assert engine is not None
    assert engine.encode(["ߊ߽߫"])[0] != ours._by_tokenizers(["ߊ߽߫"])[0].ids, "the engine is wrong here"
    assert_same_ids(ours, theirs, ["ߊ߽߫"])


@pytest.mark.parametrize("kind", ["bpe", "byte_bpe"])
def test_pieces_that_no_merge_makes_go_to_tokenizers(kind: str, tokenizers_of: dict[str, Path], tmp_path: Path) -> None:
    """kitoken makes such a piece of its parts. Gemma has three: ▁YYYY is one of them."""
    model = json.loads((tokenizers_of[kind] / "tokenizer.json").read_text())["model"]
    space = "▁" if kind == "bpe" else "Ġ"
    model["vocab"] |= {f"{space}the{space}"[:4] + "qzq": 2990 + len(model["vocab"]), "qzq": 2991 + len(model["vocab"])}
    directory = edited(tokenizers_of[kind], tmp_path / "t", model=model)
    ours, theirs = both(directory)
    assert_same_ids(ours, theirs, ["qzq", "a qzq b", "see theqzq here", "qzqqzq", "theqzq"])
    engine = ours._engine
    assert engine is not None
    assert engine.unsafe(["a qzq b", "a qz b"]).tolist() == [True, False]
    assert engine.encode(["qzq"])[0] != ours._by_tokenizers(["qzq"])[0].ids, "the engine is wrong here"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": False}]
)
def test_added_tokens_are_found_as_tokenizers_finds_them(
    kind: str, flags: dict[str, bool], tokenizers_of: dict[str, Path], tmp_path: Path
) -> None:
    tokens = [AddedToken(text, **flags) for text in ("zblorg", "New York", "[unused1]", "[unused2]", "Kq;")]
    file = with_added(tokenizers_of[kind], tmp_path / "tokenizer.json", tokens)
    ours, theirs = FastTokenizer(file, "auto"), FastTokenizer(file)
    lines = [
        "a zblorg b",
        "azblorgb ZBLORG zBlorg",
        "in New York now",
        "in New  York",
        "new york",
        "[unused1][unused2]",
    ]
    lines += ["x zblorg  y", "x  zblorg y", "the \u212aq; and \u212aq\u037e", "zbl\u0301org", "word " * 40 + "zblorg"]
    assert_same_ids(ours, theirs, lines)


def test_an_added_token_that_may_be_spelled_otherwise_keeps_tokenizers(
    tokenizers_of: dict[str, Path], tmp_path: Path
) -> None:
    file = with_added(tokenizers_of["wordpiece"], tmp_path / "tokenizer.json", ["café"])
    ours = FastTokenizer(file, "auto")
    assert ours.engine == ""
    assert "its added token 'café' may be found in text that is spelled otherwise" in ours.note
    with pytest.raises(DataError, match="Prepare it with --engine tokenizers or auto"):
        FastTokenizer(file, "kitoken")


def test_too_many_added_tokens_to_search_for_keep_tokenizers(tokenizers_of: dict[str, Path], tmp_path: Path) -> None:
    """With 2000 added words of Chinese, searching for them takes 20 times as long as encoding."""
    words = [chr(0x4E00 + number) * 4 for number in range(2000)]
    ours = FastTokenizer(with_added(tokenizers_of["wordpiece"], tmp_path / "tokenizer.json", words), "auto")
    assert (ours.engine, ours._words) == ("", None)
    assert "too many added tokens" in ours.note
    ours.judge(["the 一一一一 word"], "a line of the test")


def test_a_kind_that_the_engine_is_not_used_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unigram: both libraries round scores differently. The tokenizers library encodes, and one note says so."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    directory = save(tokenizer, tmp_path / "t", "T", bos_token="<s>", eos_token="</s>")
    (tmp_path / "en.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    assert run_command(tmp_path / "en.txt", directory, tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert error.count("note: tokenizers makes the ids") == 1
    assert "kitoken is used for BPE and WordPiece, and its model is of another kind" in error
    assert run_command(tmp_path / "en.txt", directory, tmp_path / "other", "--engine", "tokenizers") == 0
    assert "note:" not in capsys.readouterr().err
    assert ShardSet(tmp_path / "out").fingerprint == ShardSet(tmp_path / "other").fingerprint


def test_without_the_engine_the_ids_are_the_same_and_a_note_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = byte_bpe(tmp_path / "t")
    corpus = write_corpus(tmp_path / "corpus")
    run(corpus, directory, tmp_path / "with", quiet=False)
    assert "note:" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "kitoken", None)
    run(corpus, directory, tmp_path / "without", quiet=False, num_workers=2)
    assert capsys.readouterr().err.count("kitoken is not installed (") == 1
    one, other = ShardSet(tmp_path / "with"), ShardSet(tmp_path / "without")
    assert one.fingerprint == other.fingerprint
    engines = [
        {shard.get("engine") for entry in s.manifest["languages"].values() for shard in entry["shards"]}
        for s in (one, other)
    ]
    assert engines == [{f"kitoken {KitokenEngine.installed_version()}"}, {None}]
    with pytest.raises(DataError, match="kitoken is not installed"):
        open_tokenizer(directory, engine="kitoken")


def test_shards_are_the_same_for_any_number_of_workers_and_after_an_interruption(tmp_path: Path) -> None:
    directory, corpus = byte_bpe(tmp_path / "t"), write_corpus(tmp_path / "corpus")
    for name, workers in (("one", 1), ("two", 2), ("resumed", 1)):
        run(corpus, directory, tmp_path / name, num_workers=workers)
    journal = tmp_path / "resumed" / "tr" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    (tmp_path / "resumed" / "manifest.json").unlink()
    run(corpus, directory, tmp_path / "resumed", num_workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "resumed")


def test_a_preparation_that_another_engine_began_is_continued(tmp_path: Path) -> None:
    """What an earlier version left is what `--engine tokenizers` leaves: no shard names an engine."""
    directory, corpus = byte_bpe(tmp_path / "t"), write_corpus(tmp_path / "corpus")
    run(corpus, directory, tmp_path / "one", engine="tokenizers")
    run(corpus, directory, tmp_path / "resumed", engine="tokenizers")
    journal = tmp_path / "resumed" / "tr" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:1]))
    (tmp_path / "resumed" / "manifest.json").unlink()
    run(corpus, directory, tmp_path / "resumed")
    one, resumed = ShardSet(tmp_path / "one"), ShardSet(tmp_path / "resumed")
    assert one.fingerprint == resumed.fingerprint
    assert "engine" not in resumed.manifest["options"]
    assert [shard.get("engine", "")[:7] for shard in resumed.manifest["languages"]["tr"]["shards"]][:2] == [
        "",
        "kitoken",
    ]
    assert not any("engine" in shard for shard in one.manifest["languages"]["tr"]["shards"])


class WrongEngine:
    """Changes the ids of one text, as a fault of the engine would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        right = KitokenEngine.encode

        def encode(engine: KitokenEngine, texts: list[str]) -> list[list[int] | None]:
            found = right(engine, texts)
            return [[*ids, 9] if ids and text in given else ids for given, ids in zip(texts, found, strict=True)]

        monkeypatch.setattr(KitokenEngine, "encode", encode)


def test_a_difference_in_the_sample_stops_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "en.txt").write_text("a first line\na second zweiter line\n" * 9)
    directory = byte_bpe(tmp_path / "t")
    WrongEngine(monkeypatch, "zweiter")
    assert run_command(tmp_path / "en.txt", directory, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "gives other ids than tokenizers for a line of en: 'a second zweiter line' from token" in error
    assert "--engine tokenizers" in error
    assert not (tmp_path / "out").exists()
    assert run_command(tmp_path / "en.txt", directory, tmp_path / "out", "--engine", "tokenizers") == 0


@pytest.mark.parametrize("fault", [10_000, 19_999, 20_000, 20_001])
def test_every_ten_thousandth_line_is_compared(fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both(byte_bpe(tmp_path / "t"))
    WrongEngine(monkeypatch, "zweiter")
    lines = [b"line %d" % number for number in range(25_000)]
    lines[fault] = b"here is a zweiter one"
    ours.encode_lines(lines[:7000])
    if fault % 10_000:
        ours.encode_lines(lines[7000:])
    else:
        with pytest.raises(
            DataError, match=f"for line {fault + 1} of this process: 'here is a zweiter one' from token"
        ):
            ours.encode_lines(lines[7000:])


def test_a_difference_in_later_text_stops_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_prep.id_check.sample_lines", lambda *unused: LineSample([], True))
    lines = [f"line {number}" if number < 500 else f"the zweiter {number}" for number in range(12_000)]
    (tmp_path / "en.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "de.txt").write_text("line 1\nline 2\n")
    WrongEngine(monkeypatch, "zweiter")
    inputs = [tmp_path / "en.txt", tmp_path / "de.txt"]
    words = [
        "--tokenizer",
        byte_bpe(tmp_path / "t"),
        "--output",
        tmp_path / "out",
        "--workers",
        "2",
        "--input",
        *inputs,
    ]
    assert main(["prepare", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert "1 of 2 languages could not be finished. en: " in error
    assert "en.txt, in the text after line 0: kitoken" in error
    assert "of this process: 'the zweiter " in error
    assert (tmp_path / "out" / "de" / "00000.tok").is_file()
    assert not (tmp_path / "out" / "en" / "00000.tok").exists()


def test_text_that_the_engine_cannot_encode_goes_to_tokenizers(tokenizers_of: dict[str, Path]) -> None:
    """A panic in Rust is no Exception. The other texts keep the engine."""
    ours, theirs = both(tokenizers_of["bpe"])
    engine = ours._engine
    assert engine is not None
    right = engine._kitoken

    class Panic(BaseException):
        pass

    class Failing:
        def encode_all(self, texts: list[str], specials: bool) -> list[list[int]]:
            if any("zz" in text for text in texts):
                raise Panic
            return right.encode_all(texts, specials)

    engine._kitoken = Failing()
    assert [ids is None for ids in engine.encode(["a", "b zz", "c", "zz", "d"])] == [False, True, False, True, False]
    assert_same_ids(ours, theirs, ["the zz and", "the word", "zz", "a zzb c"])


@pytest.mark.parametrize("engine", ["kitoken", "tokenizers"])
def test_an_engine_is_rejected_for_a_sentencepiece_model(engine: str, tiny_tokenizer: Path) -> None:
    with pytest.raises(DataError, match=f"--engine {engine} is for a tokenizer.json, and SentencePiece encodes"):
        open_tokenizer(tiny_tokenizer, engine=engine)
    assert open_tokenizer(tiny_tokenizer, engine="auto").engine == ""


def test_an_expression_finds_any_of_some_texts() -> None:
    assert any_of(["<unused1>", "<unu", "  ", "   ", "a.b"]) == r"\ \ |a\.b|<unu"
    assert any_of([]) == ""
