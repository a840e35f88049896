"""Models and lineages that users have edited: they are evaluated, or a message says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder, sentence_vectors
from pipeline.evaluation.training_metadata import languages_of, training_metadata

TEXTS = ["Hello world!", "Ein längerer Satz, der in mehr Stücke zerfällt als der erste."]


@pytest.fixture
def model(tiny_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher, tmp_path / "model"))


@pytest.mark.parametrize("padding", [None, "1", -1])
def test_positions_that_are_counted_from_no_padding(model: Path, padding: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": padding}))
    with pytest.raises(UserError, match=r"`pad_token_id` is .*counts positions from it.*Set it to"):
        load_encoder(str(model))


def test_a_tokenizer_without_padding(model: Path, tiny_teacher: Path) -> None:
    """A tokenizer.json says nothing of padding; padded tokens are masked, so the vectors are the same."""
    (model / "sentencepiece.bpe.model").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    encoder = load_encoder(str(model))
    assert encoder.tokenizer.pad_token_id is None
    found, expected = (
        sentence_vectors(x, TEXTS, 60, 2)[0]["output"] for x in (encoder, load_encoder(str(tiny_teacher)))
    )
    assert torch.equal(found, expected)


def test_empty_texts_of_a_tokenizer_without_special_tokens(model: Path) -> None:
    """BEIR has documents without title and text; a batch may hold nothing else."""
    (model / "sentencepiece.bpe.model").unlink()
    tree = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**tree, "post_processor": None}))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    encoder = load_encoder(str(model))
    assert encoder.tokenizer([""])["input_ids"] == [[]]
    for states in sentence_vectors(encoder, ["", "Hello", ""], 60, 2)[0].values():
        assert states.norm(dim=1).tolist() == pytest.approx([0, 1, 0])


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        ({"recipe": {"relations": {"student_layer": "3"}}}, "layer of the student is '3', not a number"),
        ({"recipe": {"relations": {"layers": [{"student": 2, "teacher": "x"}]}}}, "layer of the teacher is 'x'"),
        ({"recipe": {"steps": 1}, "sentences": {"pooling": "max"}}, "'max', not mean, cls, last"),
    ],
)
def test_a_lineage_with_impossible_values(model: Path, lineage: dict, message: str) -> None:
    (model / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(UserError, match=rf"lineage\.json is corrupt .*{message}.*Export the model again"):
        training_metadata(model)


@pytest.mark.parametrize("lineage", [{"languages": "de"}, {"trimmed": {"languages": "de"}}])
def test_languages_that_are_no_list(model: Path, lineage: dict) -> None:
    """The letters of a text would be languages."""
    (model / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(UserError, match="`languages` is not a list"):
        languages_of(model)
