"""PAWS-X from fixtures in the official layout: learning, pairs that are left out, and every kind of bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.finetuning.pawsx import TASK, PawsxConfig, read
from pipeline.evaluation.ranks import alone
from tests.unit.evaluation.labelled_pairs import write_hub_data, write_pawsx


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pawsx(tmp_path / "x-final")


def config(directory: Path | str, **settings: object) -> PawsxConfig:
    quick = {"learning_rates": [3e-3], "epochs": 4, "batch": 16, "micro_batch": 8, "max_length": 48}
    return PawsxConfig(data=str(directory), **{**quick, **settings})


def test_a_decisive_word_is_learned_and_transfers(tiny_teacher: Path, pairs: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(tiny_teacher))
    results = TASK.evaluate([encoder], config(pairs), alone(), tmp_path / "out")
    result = results[encoder.name]
    assert min(scores["accuracy"] for scores in result["test"].values()) >= 90
    table = TASK.table(results)
    assert "PAWS-X accuracy in per cent, trained on 96 pairs of en" in table
    assert "test pairs left out, without translation or label: de 1" in table
    assert "Test pairs left out, without translation or label: de 1." in TASK.card(results)


def test_the_files_of_each_language(pairs: Path) -> None:
    data = read(config(pairs, max_train=5, max_evaluation=3))
    assert (list(data.dev), list(data.test), len(data.train)) == (["de", "en"], ["de", "en"], 5)
    assert [len(of) for of in data.test.values()] == [3, 3], "pairs that are left out do not count"
    assert "NS" not in data.test["de"].first
    translated = read(config(pairs, train_language="de", languages=["en"]))
    assert (list(translated.test), translated.about()) == (["en"], {"train_language": "de", "train_pairs": 96})


def test_the_library_gives_the_same_pairs(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing label is -1 there."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = read(config(pairs, languages=["en"]))
    rows = {
        split: [
            {"sentence1": a, "sentence2": b, "label": label}
            for a, b, label in zip(of.first, of.second, of.labels, strict=True)
        ]
        for split, of in (("train", data.train), ("validation", data.dev["en"]), ("test", data.test["en"]))
    }
    rows = {split: [{**of[0], "label": -1}, *of] for split, of in rows.items()}
    found = read(config(write_hub_data(tmp_path, rows), languages=["en"]))
    assert found.about()["pairs_left_out"] == {"en": 1}
    for of in (found.train, found.dev["en"], found.test["en"]):
        of.left_out = 0
    assert found == data


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("en/train.tsv", "sentence1", "first", r"train\.tsv, line 1: the header lacks sentence1"),
        ("en/train.tsv", "\t1\n", "\t2\n", r"train\.tsv, line \d+: unknown label '2'"),
        ("de/dev_2k.tsv", "\t1\n", "\n", r"dev_2k\.tsv, line \d+: 3 columns, the header has 4"),
    ],
)
def test_a_bad_line_is_named(pairs: Path, name: str, old: str, new: str, message: str) -> None:
    path = pairs / name
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read(config(pairs))


def test_missing_files_and_languages(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the task pawsx needs data.*--set pawsx\.data=x-final"):
        read(PawsxConfig())
    with pytest.raises(UserError, match=r"no dev_2k\.tsv and test_2k\.tsv found below"):
        read(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"of fr found below .* it has those of de, en.*--set pawsx\.train_language"):
        read(config(pairs, train_language="fr"))
    with pytest.raises(UserError, match=r"no dev_2k\.tsv of fr, ur found .*--set 'pawsx\.languages"):
        read(config(pairs, languages=["en", "fr", "ur"]))
    (pairs / "de" / "test_2k.tsv").write_text("id\tsentence1\tsentence2\tlabel\n0\tNS\tNS\t1\n")
    with pytest.raises(UserError, match=r"test_2k\.tsv has no pairs"):
        read(config(pairs))
