"""Random tokenizers of three kinds: dropping pieces that a text does not use never changes its split.

The reference is the tokenizers library with the full and with the cut vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from data_prep.merge_table import MergeTable
from data_prep.shards import DataError

ALPHABET = "abc"
NUM_WORDS = 60


def words_of(rng: random.Random, alphabet: str = ALPHABET) -> list[str]:
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(NUM_WORDS)]


def split(model: Any, words: list[str]) -> list[list[str]]:
    tokenizer = Tokenizer(model)
    return [tokenizer.encode(word).tokens for word in words]


def random_bpe(rng: random.Random) -> dict[str, Any]:
    """Merges in random order, several for one piece, some of which never apply."""
    prefix, suffix = rng.choice([("", ""), ("", ""), ("##", ""), ("", "</w>"), ("@", "!")])
    letters = rng.sample(ALPHABET, 3 if rng.random() < 0.7 else 2)
    pieces = [start + letter + end for letter in letters for start in {"", prefix} for end in {"", suffix}]
    merges: list[tuple[str, str]] = []
    for _ in range(rng.randint(3, 25)):
        left, right = rng.choice(pieces), rng.choice(pieces)
        if right.startswith(prefix) and not (suffix and left.endswith(suffix)) and (left, right) not in merges:
            merges.append((left, right))
            pieces.append(left + right[len(prefix) :])
    rng.shuffle(merges)
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(["<unk>", *pieces]))}
    return {
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
        "continuing_subword_prefix": prefix or None,
        "end_of_word_suffix": suffix or None,
        "unk_token": "<unk>",
        "fuse_unk": rng.random() < 0.5,
        "ignore_merges": rng.random() < 0.3,
    }


def library_bpe(model: dict[str, Any]) -> models.BPE:
    options = {key: value for key, value in model.items() if value is not None}
    return models.BPE(**{**options, "merges": [tuple(pair) for pair in model["merges"]]})


def cut_bpe(model: dict[str, Any], pieces: set[str]) -> dict[str, Any]:
    vocab = {piece: number for number, piece in enumerate(piece for piece in model["vocab"] if piece in pieces)}
    merges = MergeTable(model, {"<unk>"}, "tokenizer.json").among(vocab.keys())
    return {**model, "vocab": vocab, "merges": merges}


@pytest.mark.parametrize("seed", range(5))
def test_bpe(seed: int) -> None:
    rng, num_differing = random.Random(seed), 0
    for _ in range(120):
        model = random_bpe(rng)
        words = words_of(rng)
        before = split(library_bpe(model), words)
        chosen = rng.sample(range(NUM_WORDS), rng.randint(1, 6))
        used = {piece for number in chosen for piece in before[number]} | {"<unk>"}
        kept = MergeTable(model, {"<unk>"}, "tokenizer.json").parts(used)
        assert used <= kept <= model["vocab"].keys()
        after = split(library_bpe(cut_bpe(model, kept)), words)
        covered = [number for number in range(NUM_WORDS) if kept.issuperset(before[number])]
        assert set(chosen) <= set(covered)
        for number in covered:
            assert after[number] == before[number], (model, words[number])
        # without the pieces in between, the same words are split differently
        without = split(library_bpe(cut_bpe(model, used)), words)
        num_differing += any(without[number] != before[number] for number in chosen)
    assert num_differing > 20


@pytest.mark.parametrize("seed", range(3))
def test_word_piece(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(120):
        texts = {"".join(rng.choices(ALPHABET, k=rng.randint(1, 4))) for _ in range(12)}
        pieces = ["[UNK]", *(start + text for text in sorted(texts | set(ALPHABET[:2])) for start in ("", "##"))]
        rng.shuffle(pieces)
        pieces = ["[UNK]", *(piece for piece in pieces[: rng.randint(6, 20)] if piece != "[UNK]")]
        words = words_of(rng)
        before = split(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"), words)
        used = {piece for tokens in rng.sample(before, 6) for piece in tokens} | {"[UNK]"}
        after = split(models.WordPiece({piece: n for n, piece in enumerate(sorted(used))}, unk_token="[UNK]"), words)
        for one, other in zip(before, after, strict=True):
            if used.issuperset(one) and "[UNK]" not in one:
                assert one == other


def test_word_piece_may_find_a_word_that_was_unknown() -> None:
    """Why words with the unknown token do not count as covered."""
    full = {"[UNK]": 0, "abc": 1, "ab": 2, "##cd": 3}
    fewer = {"[UNK]": 0, "ab": 1, "##cd": 2}
    assert split(models.WordPiece(full, unk_token="[UNK]"), ["abcd"]) == [["[UNK]"]]
    assert split(models.WordPiece(fewer, unk_token="[UNK]"), ["abcd"]) == [["ab", "##cd"]]


@pytest.mark.parametrize("seed", range(3))
def test_unigram(seed: int) -> None:
    """Scores that often tie, and characters that are unknown."""
    rng, with_unknown = random.Random(seed), 0
    for _ in range(120):
        texts = sorted({"".join(rng.choices(ALPHABET, k=rng.randint(1, 4))) for _ in range(12)})
        vocab = [("<unk>", 0.0), *((text, -float(rng.randint(1, 4))) for text in texts)]
        words = words_of(rng, ALPHABET + "x")
        before = [Tokenizer(models.Unigram(vocab, 0)).encode(word).ids for word in words]
        lowest = min(range(len(vocab)), key=lambda number: vocab[number][1])
        used = sorted({number for ids in rng.sample(before, 6) for number in ids} | {0, lowest})
        after = [Tokenizer(models.Unigram([vocab[n] for n in used], 0)).encode(word).ids for word in words]
        for one, other in zip(before, after, strict=True):
            if set(used).issuperset(one):
                assert [used[number] for number in other] == one
                with_unknown += 0 in one
    assert with_unknown > 100


def test_a_pair_that_is_listed_twice_has_its_last_rank() -> None:
    model = {"vocab": {piece: n for n, piece in enumerate(["a", "b", "c", "ab", "bc", "abc"])}}
    model["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"], ["a", "b"]]
    assert MergeTable(model, (), "tokenizer.json").parts({"abc"}) == {"abc", "bc", "a", "b", "c"}
    assert split(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]), ["abc"]) == [["abc"]]


def test_a_long_piece_takes_no_time() -> None:
    """16 384 characters from 14 merges."""
    vocab, merges = {"a": 0}, []
    for doubling in range(14):
        vocab["a" * 2 ** (doubling + 1)] = len(vocab)
        merges.append(["a" * 2**doubling] * 2)
    table = MergeTable({"vocab": vocab, "merges": merges}, (), "tokenizer.json")
    assert table.parts({"a" * 2**14}) == set(vocab)


def test_merges_that_make_each_other_are_rejected() -> None:
    model = {"vocab": {"a": 0, "##": 1, "a##": 2}, "merges": [["a", "##"]], "continuing_subword_prefix": "##"}
    with pytest.raises(DataError, match="adds nothing to one of its parts"):
        MergeTable(model, (), "tokenizer.json")
