"""Sentence vectors of an evaluation are those that the package sentence-transformers makes with the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.evaluation.encoder import load_encoder, sentence_vectors
from pipeline.evaluation.pooling import Dense
from pipeline.evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from pipeline.export.sentence_transformers_files import write_dense

TEXTS = ["Hello world!", "Ein längerer Satz, der in mehr Stücke zerfällt als der erste.", "你好，世界", "да"]
KEYS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "max": "max_tokens"}
RANDOM = torch.Generator().manual_seed(0)
DENSE = {
    "Identity": Dense(torch.randn(20, 48, generator=RANDOM)),
    "Tanh": Dense(torch.randn(20, 48, generator=RANDOM), torch.randn(20, generator=RANDOM), "Tanh"),
}


def model_with(
    tiny_teacher: Path, directory: Path, pooling: str = "", dense: Dense | None = None, *more: str, trained: str = ""
) -> str:
    """A copy of the teacher with the files of sentence-transformers (without a `pooling`: none), and a lineage."""
    model = Path(shutil.copytree(tiny_teacher, directory))
    if dense is not None:
        write_dense(model, dense)
    if trained:
        sentences = {"pooling": trained, "normalize": True}
        lineage = {"recipe": {"student": {"init": "layers"}}, "sentences": sentences}
        (model / "lineage.json").write_text(json.dumps(lineage))
    if pooling:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", **({"2_Dense": "Dense"} if dense else {})}
        kinds |= {f"9_{kind}": kind for kind in more}
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(kinds.items())
        ]
        (model / "modules.json").write_text(json.dumps(modules))
        (model / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": false}')
        (model / "1_Pooling").mkdir()
        config = {"word_embedding_dimension": 48, f"pooling_mode_{KEYS[pooling]}": True}
        (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False, **config}))
    return str(model)


def outputs(model: str) -> torch.Tensor:
    return sentence_vectors(load_encoder(model), TEXTS, 64, 3)[0]["output"]


@pytest.mark.parametrize("projection", ["none", *DENSE])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_as_the_package_makes_them(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pooling: str, projection: str
) -> None:
    pytest.importorskip("sentence_transformers", reason="pip install -r requirements-dev.txt")
    from sentence_transformers import SentenceTransformer

    model = model_with(tiny_teacher, tmp_path / "model", pooling, DENSE.get(projection))
    expected = SentenceTransformer(model, device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert torch.allclose(outputs(model), torch.from_numpy(expected), atol=1e-5)
    named = pooling + (" and 2_Dense" if projection in DENSE else "")
    said = capsys.readouterr().err
    assert (f"are made with pooling: {named}\n" in said) == (named != "mean")
    assert "warning" not in said


def test_the_other_vectors_are_means_of_tokens(tiny_teacher: Path, tmp_path: Path) -> None:
    plain, cls = (model_with(tiny_teacher, tmp_path / name, name) for name in ("mean", "cls"))
    one, other = (sentence_vectors(load_encoder(model), TEXTS, 64, 3)[0] for model in (plain, cls))
    assert torch.equal(one["values"], other["values"])
    assert torch.equal(one["last_input"], other["last_input"])
    assert not torch.allclose(one["output"], other["output"], atol=0.01)


def test_a_lineage_counts_where_there_are_no_such_files(tiny_teacher: Path, tmp_path: Path) -> None:
    from_files = outputs(model_with(tiny_teacher, tmp_path / "files", "last", DENSE["Identity"]))
    from_lineage = outputs(model_with(tiny_teacher, tmp_path / "lineage", "", DENSE["Identity"], trained="last"))
    assert torch.equal(from_files, from_lineage)
    both = model_with(tiny_teacher, tmp_path / "both", "cls", trained="last")
    assert load_encoder(both).pooling.name == "cls"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max", "pools by max, and sentence vectors are compared by"),
        ("module", "not applied to the sentence vectors here: LSTM"),
        ("activation", "2_Dense has the activation GELU; known here: Identity, Tanh"),
        ("other file", "2_Dense has no model.safetensors, and other files of weights are not read"),
        ("missing", "not applied to the sentence vectors here: Dense"),
    ],
)
def test_what_is_not_applied_is_said_once(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    pooling, more = ("max" if change == "max" else "cls"), (("LSTM",) if change == "module" else ())
    model = model_with(tiny_teacher, tmp_path / "model", pooling, DENSE["Identity"], *more)
    dense = Path(model) / "2_Dense"
    if change == "activation":
        (dense / "config.json").write_text('{"activation_function": "torch.nn.modules.activation.GELU"}')
    elif change == "other file":
        (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    elif change == "missing":
        shutil.rmtree(dense)
    encoder = load_encoder(model)
    for _ in range(2):
        vectors, _ = sentence_vectors(encoder, TEXTS, 64, 3)
    assert capsys.readouterr().err.count(message) == 1
    assert vectors["output"].shape == (4, 20 if change == "module" else 48)


def test_results_name_the_pooling(tiny_teacher: Path, tmp_path: Path) -> None:
    found = evaluate_retrieval(
        load_encoder(model_with(tiny_teacher, tmp_path / "model", "cls", DENSE["Tanh"])),
        RetrievalConfig(languages=["de"], max_pairs=4, max_length=60),
    )
    assert found["sentence_pooling"] == "cls and 2_Dense"
