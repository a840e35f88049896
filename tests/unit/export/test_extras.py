"""What an export can carry beside the model: ONNX files that agree with torch, and the sentence-transformers layout."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pipeline.distillation.teacher import load_encoder as load_teacher_encoder
from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder, sentence_vectors
from pipeline.evaluation.retrieval import RetrievalConfig
from pipeline.export import onnx
from pipeline.export.command import onnx_lines
from pipeline.export.hf import export_student
from pipeline.export.sentence_vectors import add_sentence_transformers

REPO = Path(__file__).resolve().parents[3]
TEXTS = ["Hello world!", "Ein längerer Satz, der in mehr Stücke zerfällt als der erste.", "你好，世界"]
LINEAGE = {"teacher": "a/teacher", "steps": 0, "recipe": {}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> RetrievalConfig:
    directory = tmp_path_factory.mktemp("pairs")
    (directory / "en-de.tsv").write_text("Hello\tHallo\nA house by the sea\tEin Haus am Meer\n")
    return RetrievalConfig(pairs=str(directory), max_length=60)


@pytest.fixture(scope="module")
def exported(tiny_teacher: Path, pairs: RetrievalConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export with everything."""
    for package in ("onnxruntime", "onnxscript", "sentence_transformers"):
        pytest.importorskip(package, reason="pip install -r requirements-dev.txt")
    return export(
        tiny_teacher,
        tmp_path_factory.mktemp("exports") / "student",
        lambda directory: add_sentence_transformers(directory, 48, 64),
        lambda directory: onnx.add_onnx(directory, pairs),
    )


def export(tiny_teacher: Path, output: Path, *extras) -> Path:
    model = load_teacher_encoder(tiny_teacher)
    return export_student(model.state_dict(), model.config, str(tiny_teacher), output, LINEAGE, extras)


def test_onnx_gives_the_hidden_states_of_torch(exported: Path) -> None:
    import onnxruntime

    check = json.loads((exported / "onnx" / "check.json").read_text())
    assert check["fp32"]["greatest_difference"] <= onnx.GREATEST_DIFFERENCE
    assert (check["languages"], check["sentences"]) == (["de"], 4)
    assert check["megabytes"]["int8"] < check["megabytes"]["fp32"]
    assert "fp32   retrieval" in onnx_lines(check)

    session = onnxruntime.InferenceSession(str(exported / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    model, tokenizer = AutoModel.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    for texts in (TEXTS, TEXTS[:1]):  # another batch size, another length, padding and none
        feeds = tokenizer(texts, padding=True, return_tensors="np")
        states_BLD = session.run(None, {name: feeds[name] for name in ("input_ids", "attention_mask")})[0]
        with torch.inference_mode():
            expected_BLD = model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state.numpy()
        real = feeds["attention_mask"].astype(bool)
        np.testing.assert_allclose(states_BLD[real], expected_BLD[real], atol=onnx.GREATEST_DIFFERENCE)


def test_a_difference_is_noticed_and_measured(tiny_teacher: Path, pairs: RetrievalConfig) -> None:
    encoder = load_encoder(str(tiny_teacher))
    right = onnx._torch_run(encoder)
    runs = {"torch": right, "fp32": lambda ids, mask: right(ids, mask) + 0.25 * (1 - mask.unsqueeze(-1))}
    assert onnx.compare_runs(encoder, runs, pairs)["fp32"]["greatest_difference"] == 0.0  # padding does not count
    runs["fp32"] = lambda ids, mask: right(ids, mask) + 0.25
    assert onnx.compare_runs(encoder, runs, pairs)["fp32"]["greatest_difference"] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_a_wrong_onnx_file_is_refused_and_nothing_is_kept(
    tiny_teacher: Path, tmp_path: Path, difference: float
) -> None:
    with pytest.raises(UserError, match="differs from torch"):
        export(tiny_teacher, tmp_path / "student", lambda directory: onnx.refuse_difference(difference))
    assert list(tmp_path.iterdir()) == []
    onnx.refuse_difference(2e-6)


def test_sentence_transformers_gives_our_vectors(exported: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported), device="cpu")
    assert model.max_seq_length == 64
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    ours, _ = sentence_vectors(load_encoder(str(exported)), TEXTS, max_length=64, batch_size=2)
    np.testing.assert_allclose(model.encode(TEXTS), ours["output"].numpy(), atol=1e-5)


@pytest.mark.parametrize("example", sorted((REPO / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs(
    exported: Path, example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(example), str(exported)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.count("->") == 4
