"""Tagging from treebanks and entities in the official layouts: learning, scores, words and pieces, tables."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder, load_encoder
from pipeline.evaluation.finetuning.entities import entities, entity_counts, f1_of, iob2, split_tag
from pipeline.evaluation.finetuning.loop import FinetuneTask, GridPoint, finetune
from pipeline.evaluation.finetuning.tagging import (
    evaluate_tagging,
    guessed_tags,
    make_task,
    tag_scores,
    tagging_table,
    word_loss,
)
from pipeline.evaluation.finetuning.tagging_data import TaggingConfig, read_tagging
from pipeline.evaluation.finetuning.word_rows import NO_TARGET, word_rows
from pipeline.evaluation.ranks import alone
from tests.unit.data_prep.tiny_tokenizers import WORDS, byte_bpe, save, word_piece
from tests.unit.evaluation.labelled_pairs import interrupted_in_epoch_3
from tests.unit.evaluation.tagged_words import write_ud, write_wikiann


@pytest.fixture(scope="module")
def treebanks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ud(tmp_path_factory.mktemp("ud"))


@pytest.fixture
def encoder(tiny_teacher: Path) -> Encoder:
    return load_encoder(str(tiny_teacher))


def config(directory: Path, **settings: object) -> TaggingConfig:
    quick = {"learning_rates": [3e-3], "epochs": 4, "batch": 8, "micro_batch": 6, "max_length": 48}
    return TaggingConfig(data=str(directory), **{**quick, **settings})


def task_of(encoder: Encoder, settings: TaggingConfig) -> FinetuneTask:
    return make_task(encoder, read_tagging(settings), settings, alone())


# -- learning


def test_the_tags_of_words_are_learned_and_transfer(encoder: Encoder, treebanks: Path, tmp_path: Path) -> None:
    result = evaluate_tagging([encoder], config(treebanks, epochs=8), alone(), tmp_path)[encoder.name]
    test = {language: scores["accuracy"] for language, scores in result["test"].items()}
    assert list(test) == ["de", "en", "sw"]
    assert min(test["en"], test["de"]) >= 90
    assert test["sw"] <= 10, "its words have other tags: what is correct in English is wrong there"
    assert (result["without_dev"], result["train_sentences"], result["labels"]) == (["sw"], 96, "upos")
    table = tagging_table({encoder.name: result})
    assert "UPOS accuracy in per cent, trained on 96 sentences of en" in table
    assert f"{encoder.name} {(test['de'] + test['sw']) / 2:.2f}" in table
    assert "tested without development sentences: sw" in table


def test_entities_are_learned_and_scored_by_f1(encoder: Encoder, tmp_path: Path) -> None:
    data = write_wikiann(tmp_path / "data")
    result = evaluate_tagging([encoder], config(data, epochs=6), alone(), tmp_path / "out")[encoder.name]
    assert list(result["test"]["de"]) == ["f1", "precision", "recall"]
    assert result["mean"]["f1"] >= 90


def test_an_interrupted_grid_point_resumes(encoder: Encoder, treebanks: Path, tmp_path: Path) -> None:
    settings, point = config(treebanks, epochs=3, max_train=24, max_evaluation=3), GridPoint(3e-3, 0)
    task = task_of(encoder, settings)
    expected = finetune(task, settings, point, tmp_path / "once", alone(), "tiny")
    interrupted_in_epoch_3(task, settings, point, tmp_path / "cut")
    assert finetune(task, settings, point, tmp_path / "cut", alone(), "tiny") == expected


def test_micro_batches_do_not_change_the_gradient(encoder: Encoder, treebanks: Path, tmp_path: Path) -> None:
    losses = [
        finetune(task_of(encoder, settings), settings, GridPoint(1e-3, 0), tmp_path / str(size), alone(), "tiny")
        for size in (8, 5)
        for settings in [config(treebanks, epochs=1, micro_batch=size)]
    ]
    assert losses[0]["epochs"][0]["loss"] == pytest.approx(losses[1]["epochs"][0]["loss"], rel=1e-4)


def test_the_loss_by_hand() -> None:
    """Probabilities one half and three fifths at the two first pieces; the third token and the padding have no target."""
    logits = torch.tensor([[[0.0, 0.0, math.log(2)], [math.log(3), 0.0, 0.0], [9.0, 9.0, 0.0]]])
    targets = torch.tensor([[2, 0, NO_TARGET, NO_TARGET, NO_TARGET]])
    assert float(word_loss(SimpleNamespace(logits=logits), targets)) == pytest.approx(math.log(2) + math.log(5 / 3))


def test_languages_without_development_sentences_need_one_that_has(
    encoder: Encoder, treebanks: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"sw has development examples.*tagging\.languages"):
        evaluate_tagging([encoder], config(treebanks, languages=["sw"]), alone(), tmp_path)


# -- scores


@pytest.mark.parametrize(
    ("truth", "guess", "expected"),
    [
        # seqeval's own example: the person is found, the other entity begins one word too early
        (
            "O O O B-MISC I-MISC I-MISC O / B-PER I-PER O",
            "O O B-MISC I-MISC I-MISC I-MISC O / B-PER I-PER O",
            (1, 2, 2),
        ),
        ("B-PER I-PER B-LOC", "B-PER I-PER B-LOC", (2, 2, 2)),
        ("B-PER I-PER", "I-PER I-PER", (1, 1, 1)),  # an I- that continues nothing begins an entity
        ("B-PER I-PER", "B-PER B-PER", (0, 1, 2)),
        ("B-PER I-PER", "B-PER I-LOC", (0, 1, 2)),  # another type begins another entity
        ("O O", "O O", (0, 0, 0)),
    ],
)
def test_entity_counts_by_hand(truth: str, guess: str, expected: tuple[int, int, int]) -> None:
    pairs = zip(truth.split(" / "), guess.split(" / "), strict=True)
    assert tuple(np.sum([entity_counts(a.split(), b.split()) for a, b in pairs], axis=0)) == expected


def test_f1_by_hand() -> None:
    assert f1_of(1, 2, 4) == pytest.approx({"f1": 100 / 3, "precision": 25.0, "recall": 50.0})
    assert f1_of(0, 0, 0) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_entities_and_f1_are_seqevals() -> None:
    """On random tags of all prefixes, most of which follow no scheme; types contain a dash, as seqeval allows."""
    sequence_labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    draw = random.Random(0)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("A", "B-C"))]
    texts = [[draw.choices(tags, k=draw.randint(1, 9)) for _ in range(300)] for _ in range(2)]
    texts[1] = [[*guess, *["O"] * len(truth)][: len(truth)] for truth, guess in zip(*texts, strict=True)]
    for text in (*texts[0], *texts[1]):
        found = entities([split_tag(tag) or ("", "") for tag in text])
        assert found == sequence_labeling.get_entities(text)
        assert sequence_labeling.get_entities(iob2(found, len(text))) == found
    counts = np.sum([entity_counts(a, b) for a, b in zip(*texts, strict=True)], axis=0)
    with warnings.catch_warnings(action="ignore"):
        precision, recall, f1, _ = sequence_labeling.precision_recall_fscore_support(*texts, average="micro")
    assert f1_of(*counts) == pytest.approx({"f1": 100 * f1, "precision": 100 * precision, "recall": 100 * recall})


def test_ranks_share_the_sentences(encoder: Encoder, treebanks: Path) -> None:
    settings = config(treebanks)
    data = read_tagging(settings)
    rows = word_rows(encoder, data.test["de"].words, [[0] * 6] * 12, 48)
    model = task_of(encoder, settings).load().eval()
    parts = [
        guessed_tags(model, rows, encoder.tokenizer.pad_token_id, 5, SimpleNamespace(rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    every = guessed_tags(model, rows, encoder.tokenizer.pad_token_id, 5, alone())
    assert [sorted(part) for part in parts] == [list(range(0, 12, 2)), list(range(1, 12, 2))]
    assert all(np.array_equal((parts[0] | parts[1])[number], guess) for number, guess in every.items())


def test_words_without_a_piece_are_wrong_or_outside() -> None:
    guesses = {0: np.array([1, -1, 0])}
    assert tag_scores([["VERB", "NOUN", "NOUN"]], guesses, ["NOUN", "VERB"], alone()) == {"accuracy": 100 * 2 / 3}
    tags = ["B-A", "I-A", "O"]
    assert tag_scores([["B-A", "O", "B-A"]], {0: np.array([0, -1, 0])}, tags, alone())["f1"] == 100
    assert tag_scores([["B-A", "I-A", "B-A"]], {0: np.array([0, -1, 0])}, tags, alone())["f1"] == 50


# -- words and pieces


def metaspace_bpe(directory: Path) -> Path:
    """Gemma's kind: blanks become `▁`, and nothing is put before the first word."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # so that no piece has two words
    tokenizer.decoder = decoders.Replace("▁", " ")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    return save(tokenizer, directory, "GemmaTokenizer", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


SENTENCES = [["the", "quick", ",", "fox", "jumps"], ["third", "line", "of", "text", "!"], ["zweiter", "10 000", "dog"]]


@pytest.mark.parametrize("make", [None, word_piece, byte_bpe, metaspace_bpe])
def test_rows_are_the_tokenizers_and_every_word_has_its_first_piece(make, tiny_teacher: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make(tmp_path / "t") if make else tiny_teacher)
    found = word_rows(Encoder("m", None, tokenizer, 1, "m"), SENTENCES, [[7] * len(x) for x in SENTENCES], 64)
    for number, words in enumerate(SENTENCES):
        assert found.rows.ids[number].tolist() == tokenizer(" ".join(words))["input_ids"]
        for word, (row, token) in zip(words, found.places[number].tolist(), strict=True):
            piece = tokenizer.decode(found.rows.ids[row][token : token + 1]).strip(" #")
            assert row == number
            assert word.startswith(piece) or piece == tokenizer.unk_token, f"{piece!r} is not the begin of {word!r}"
            assert found.rows.targets[row, token] == 7
        assert int((found.rows.targets[number] != NO_TARGET).sum()) == len(words)
    if make in (None, word_piece):  # the others do not put a blank before a word that is given alone
        split = tokenizer(SENTENCES, is_split_into_words=True)
        assert [ids.tolist() for ids in found.rows.ids] == split["input_ids"]
        for number, words in enumerate(SENTENCES):
            first = [split.word_ids(number).index(word) for word in range(len(words))]
            assert found.places[number][:, 1].tolist() == first


def test_words_that_give_no_piece(tiny_teacher: Path) -> None:
    """The left-to-right mark is removed by XLM-R's normaliser, and an empty word has no characters."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    encoder = Encoder("m", None, tokenizer, 1, "m")
    sentences = [["the", "\u200e", "", "world"], ["\u200e"], ["", "the"]]
    found = word_rows(encoder, sentences, [[1, 2, 3, 4], [1], [1, 2]], 64)
    assert [(places[:, 0] >= 0).tolist() for places in found.places] == [
        [True, False, False, True],
        [False],
        [False, True],
    ]
    assert found.words_without_piece == 4
    assert sorted(found.rows.targets[found.rows.targets != NO_TARGET].tolist()) == [1, 2, 4]


def test_the_piece_after_a_marker_that_is_alone(tiny_teacher: Path, tmp_path: Path) -> None:
    """XLM-R's tokenizer begins most Chinese words with a piece that is only the marker of the blank before them."""
    for tokenizer in (AutoTokenizer.from_pretrained(x) for x in (tiny_teacher, byte_bpe(tmp_path / "t"))):
        marker = next(x for x in ("▁", "Ġ") if tokenizer.convert_tokens_to_ids(x) not in (None, tokenizer.unk_token_id))
        encoder = Encoder("m", None, tokenizer, 1, "m")
        sentences = [["the", "世界", "text"]]
        of = {after: word_rows(encoder, sentences, [[1, 2, 3]], 64, after_markers=after) for after in (False, True)}
        first = {
            after: tokenizer.convert_ids_to_tokens(int(x.rows.ids[0][x.places[0][1, 1]])) for after, x in of.items()
        }
        assert first[False] == marker
        assert first[True] != marker
        assert of[True].places[0][1, 1] == of[False].places[0][1, 1] + 1
        assert of[True].places[0][0].tolist() == of[False].places[0][0].tolist(), "a word with text in its first piece"
        assert [int(of[True].rows.targets[row, token]) for row, token in of[True].places[0]] == [1, 2, 3]


@pytest.mark.parametrize("max_length", [8, 12, 64])
def test_long_sentences_are_cut_between_words(max_length: int, tiny_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    draw = random.Random(0)
    words = [draw.choice(["world", "the", "internationalization", "x" * 30]) for _ in range(40)]
    found = word_rows(Encoder("m", None, tokenizer, 1, "m"), [words], [list(range(40))], max_length)
    assert max(map(len, found.rows.ids)) <= max_length
    assert found.words_without_piece == 0
    uncut = tokenizer(words, is_split_into_words=True)
    first = [uncut["input_ids"][uncut.word_ids(0).index(word)] for word in range(40)]
    assert [int(found.rows.ids[row][token]) for row, token in found.places[0]] == first
    assert [int(found.rows.targets[row, token]) for row, token in found.places[0]] == list(range(40))
    for ids in found.rows.ids:
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_results_can_be_written(encoder: Encoder, treebanks: Path, tmp_path: Path) -> None:
    """A kept grid point gives the results of the first run."""
    settings = config(treebanks, epochs=1)
    first = evaluate_tagging([encoder], settings, alone(), tmp_path)
    assert json.loads(json.dumps(first)) == evaluate_tagging([encoder], settings, alone(), tmp_path)
