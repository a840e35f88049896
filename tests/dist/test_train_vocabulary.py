"""Training on a smaller vocabulary: the same losses on covered text, a smaller student, and errors for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from data_prep.__main__ import main as data_prep
from pipeline.__main__ import main as pipeline
from tests.conftest import SAMPLES
from tests.dist.runs import curve
from tests.dist.training_process import Ended, TrainingProcess
from tests.tiny_encoders import tiny_encoder
from tests.unit.data_prep.trim_tokenizers import cut_to, modernbert, write_text

LANGUAGES = ("hi", "sw", "he", "tr")
# Copied layers: a random start would draw other numbers for a smaller embedding.
SETTINGS = ["steps=2", "eval_every=2", "student={layers: 2, hidden: 48, heads: 4, ffn: 96, init: layers, dropout: 0.0}"]


@pytest.fixture(scope="module")
def trimmed(tiny_teacher: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A vocabulary of all ids in the shards, and the same text prepared with it."""
    directory = tmp_path_factory.mktemp("trimmed")
    vocabulary, shards = directory / "vocabulary", directory / "shards"
    texts = [SAMPLES / "cc100" / f"{language}.txt.xz" for language in LANGUAGES]
    for words in (
        ["trim-vocab", "--tokenizer", tiny_teacher, "--shards", tiny_shards, "--output", vocabulary],
        ["prepare", "--tokenizer", vocabulary, "--input", *texts, "--output", shards, "--workers", 1],
    ):
        assert data_prep([str(word) for word in words]) == 0
    return {"vocabulary": vocabulary, "data": shards}


def test_a_smaller_vocabulary_trains_the_same(
    tiny_recipe: Path, fp32_config: Path, tiny_shards: Path, trimmed: dict[str, Path], tmp_path: Path
) -> None:
    with TrainingProcess() as process:

        def run(name: str, *settings: str) -> Ended:
            sets = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
            words = ["--deepspeed", fp32_config, "--recipe", tiny_recipe, "--run-dir", tmp_path / name, *sets]
            return process.run(*words)

        both = [f"{key}={value}" for key, value in trimmed.items()]
        for name, settings in (("full", []), ("small", both)):
            ended = run(name, *settings)
            assert ended.code == 0, ended.err
        # Shards of the full vocabulary with a smaller vocabulary, and the reverse.
        ended = run("mixed", both[0])
        assert ended.code == 2
        assert f"--tokenizer {trimmed['vocabulary']}" in ended.err
        assert "that of `vocabulary`" in ended.err
        assert run("mixed", both[1]).code == 2
        # A vocabulary that was not cut from the teacher's tokenizer.
        path = trimmed["vocabulary"] / "vocabulary.json"
        right = path.read_text()
        path.write_text(json.dumps({**json.loads(right), "source_sha256": "0" * 64}))
        ended = run("mixed", *both)
        path.write_text(right)
        assert ended.code == 2
        assert "cut from another tokenizer" in ended.err
        assert not (tmp_path / "mixed").exists()

    full, small = (curve(tmp_path / name) for name in ("full", "small"))
    assert list(full) == [1, 2]
    assert small[1] == full[1]
    assert small == pytest.approx(full, rel=1e-6)  # the clipped norm sums over fewer zeros
    for tag in ("heldout/mean", "heldout/sw"):
        assert curve(tmp_path / "small", tag) == pytest.approx(curve(tmp_path / "full", tag), rel=1e-6)

    pipeline(["export", str(tmp_path / "small"), "--output", str(tmp_path / "student")])
    about = json.loads((trimmed["vocabulary"] / "vocabulary.json").read_text())
    model, tokenizer = (kind.from_pretrained(tmp_path / "student") for kind in (AutoModel, AutoTokenizer))
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == about["vocab_size"]
    assert about["vocab_size"] < about["source_vocab_size"]
    assert json.loads((tmp_path / "student" / "lineage.json").read_text())["vocabulary"] == str(trimmed["vocabulary"])

    # A student trained on the full vocabulary and cut afterwards equals the one trained on the small vocabulary.
    cut = ["--output", str(tmp_path / "cut"), "--vocabulary", str(trimmed["vocabulary"])]
    pipeline(["export", str(tmp_path / "full"), *cut])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "cut"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)
    lineage = json.loads((tmp_path / "cut" / "lineage.json").read_text())
    assert lineage["trimmed"]["from"] == str(tmp_path / "full")
    assert lineage["steps"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "full", "small", "student"]


def test_a_smaller_vocabulary_of_a_bpe_teacher_trains_the_same(
    tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    """A ModernBERT whose special ids are behind its pieces, so that all of them change."""
    teacher, text = modernbert(tmp_path / "teacher"), write_text(tmp_path / "text")
    vocabulary = cut_to(teacher, text, tmp_path / "vocabulary")
    shards = {"full": tmp_path / "shards", "small": tmp_path / "small shards"}
    for name, tokenizer in (("full", teacher), ("small", vocabulary)):
        words = ["prepare", "--tokenizer", tokenizer, "--input", text, "--output", shards[name], "--workers", 1]
        assert data_prep([str(word) for word in words]) == 0
    ids = AutoTokenizer.from_pretrained(teacher)
    special = {f"{name}_token_id": getattr(ids, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    tiny_encoder(
        "modernbert", vocab_size=len(ids) + 5, bos_token_id=None, eos_token_id=None, **special
    ).save_pretrained(teacher)
    settings = [*SETTINGS, f"teacher={teacher}", "relations={heads: 12, teacher_layer: 4}"]
    with TrainingProcess() as process:
        for name, more in (("full", []), ("small", [f"vocabulary={vocabulary}"])):
            sets = [word for setting in (*settings, f"data={shards[name]}", *more) for word in ("--set", setting)]
            words = ["--deepspeed", fp32_config, "--recipe", tiny_recipe, "--run-dir", tmp_path / "runs" / name, *sets]
            ended = process.run(*words)
            assert ended.code == 0, ended.err
    full, small = (curve(tmp_path / "runs" / name) for name in ("full", "small"))
    assert small[1] == full[1]
    assert small == pytest.approx(full, rel=1e-6)  # the clipped norm sums over fewer zeros
    pipeline(["export", str(tmp_path / "runs" / "small"), "--output", str(tmp_path / "student")])
    cut = ["--output", str(tmp_path / "cut"), "--vocabulary", str(vocabulary)]
    pipeline(["export", str(tmp_path / "runs" / "full"), *cut])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "cut"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)
    new = AutoTokenizer.from_pretrained(tmp_path / "student")
    for name in ("student", "cut"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["vocab_size"] == len(new) < len(ids)
        assert [config[key] for key in special] == [getattr(new, key) for key in special]
