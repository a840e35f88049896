"""Vocabulary trimming: covered text is split as before with equal hidden states, and the rest is reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.shards import ShardSet
from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.export import trim
from pipeline.export.vocabulary import coverage, kept_ids


@pytest.fixture(scope="module")
def trimmed(tiny_teacher: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trimmed") / "small"
    main(["trim", str(tiny_teacher), "--shards", str(tiny_shards), "--languages", "sw,tr", "--output", str(output)])
    return output


def covered_text(tiny_teacher: Path, tiny_shards: Path, language: str) -> str:
    """The first lines of a language, out of its shards."""
    ids = ShardSet(tiny_shards).stream(language, 0, 50)
    return AutoTokenizer.from_pretrained(tiny_teacher).decode(ids.tolist(), skip_special_tokens=True)


@torch.inference_mode()
@pytest.mark.parametrize("language", ["sw", "tr"])
def test_covered_text_maps_one_to_one(tiny_teacher: Path, tiny_shards: Path, trimmed: Path, language: str) -> None:
    text = covered_text(tiny_teacher, tiny_shards, language)
    old = AutoTokenizer.from_pretrained(tiny_teacher)(text, return_tensors="pt")
    new = AutoTokenizer.from_pretrained(trimmed)(text, return_tensors="pt")
    old_ids = np.array(json.loads((trimmed / "trimming.json").read_text())["old_ids"])
    assert old_ids[new["input_ids"][0]].tolist() == old["input_ids"][0].tolist()
    models = [AutoModel.from_pretrained(directory).eval() for directory in (tiny_teacher, trimmed)]
    states = [model(**ids).last_hidden_state for model, ids in zip(models, (old, new), strict=True)]
    assert torch.equal(*states)
    assert models[1].config.vocab_size == len(old_ids) < models[0].config.vocab_size


def test_specials_keep_their_meaning(tiny_teacher: Path, trimmed: Path) -> None:
    old, new = AutoTokenizer.from_pretrained(tiny_teacher), AutoTokenizer.from_pretrained(trimmed)
    old_ids = json.loads((trimmed / "trimming.json").read_text())["old_ids"]
    for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>"):
        assert old_ids[new.convert_tokens_to_ids(token)] == old.convert_tokens_to_ids(token)
    assert new.convert_tokens_to_ids("<mask>") == len(old_ids) - 1
    assert new.unk_token_id in new("हिन्दी")["input_ids"]


def test_the_report_counts_what_is_lost(tiny_shards: Path, trimmed: Path) -> None:
    report = json.loads((trimmed / "trimming.json").read_text())
    shares = report["coverage"]
    assert (shares["sw"], shares["tr"]) == (1.0, 1.0)
    stream = ShardSet(tiny_shards).stream("hi", 0, ShardSet(tiny_shards).num_tokens("hi"))
    assert shares["hi"] == pytest.approx(np.isin(stream, report["old_ids"]).mean())
    assert report["parameters"][0] - report["parameters"][1] == (report["pieces"][0] - report["pieces"][1]) * 48
    assert report["checked_rows"]["rows"] > 4
    card = (trimmed / "README.md").read_text()
    assert "sw" in card
    assert f"{report['pieces'][1]:,}" in card


def test_which_pieces_are_kept() -> None:
    pieces = ["", "", "", "", "▁ab", "a", "b", "c", "▁cd", ""]
    counts = {"xx": np.array([0, 0, 0, 0, 5, 0, 0, 0, 1, 0]), "yy": np.array([0, 0, 0, 0, 0, 0, 0, 9, 0, 0])}
    # <s> <pad> </s> <unk>; the piece that is used; its single characters; <mask>
    assert kept_ids(counts, ["xx"], 2, pieces).tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert kept_ids(counts, ["xx"], 1, pieces).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert coverage(counts, np.array([4])) == {"xx": pytest.approx(5 / 6), "yy": 0.0}


# -- what must not happen


def test_shards_of_another_tokenizer(tiny_teacher: Path, tiny_shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_teacher.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    with open(other / "sentencepiece.bpe.model", "ab") as file:
        file.write(b"\xf8\x07\x01")  # an unknown field: the same pieces under another sha256
    with pytest.raises(UserError, match="not made with the tokenizer"):
        trim.trim(other, ShardSet(tiny_shards), ["sw"], 1, tmp_path / "small")


def test_a_language_that_the_shards_do_not_have(tiny_teacher: Path, tiny_shards: Path, tmp_path: Path) -> None:
    arguments = ["trim", str(tiny_teacher), "--shards", str(tiny_shards), "--output", str(tmp_path / "small")]
    with pytest.raises(UserError, match="has no xx; it has"):
        main([*arguments, "--languages", "sw,xx"])
    with pytest.raises(UserError, match="at least 1"):
        main([*arguments, "--min-count", "0"])
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_sentencepiece(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="XLM-R's kind"):
        trim.trim(tmp_path, ShardSet(tiny_shards), ["sw"], 1, tmp_path / "small")


def test_a_wrong_cut_is_noticed_and_leaves_nothing(
    tiny_teacher: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trim.trimmed_weights

    def off_by_one(model, kept):
        return right(model, np.roll(kept, 1))

    monkeypatch.setattr(trim, "trimmed_weights", off_by_one)
    with pytest.raises(UserError, match="hidden states changed"):
        trim.trim(tiny_teacher, ShardSet(tiny_shards), ["sw"], 1, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
