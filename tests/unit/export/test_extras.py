"""Optional files of an export: ONNX files that agree with torch, and the sentence-transformers layout."""

from __future__ import annotations

import json
import logging
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from pipeline.distillation.models.teacher import load_encoder as load_teacher_encoder
from pipeline.errors import UserError
from pipeline.evaluation.encoder import load_encoder, sentence_vectors
from pipeline.evaluation.pooling import Dense
from pipeline.evaluation.retrieval import RetrievalConfig
from pipeline.export import onnx
from pipeline.export.command import CHECK_LINES, further_lines, onnx_lines
from pipeline.export.hf import Export, export_student
from pipeline.export.sentence_transformers_files import add_sentence_transformers, drop_dense

REPO = Path(__file__).resolve().parents[3]
TEXTS = ["Hello world!", "Ein längerer Satz, der in mehr Stücke zerfällt als der erste.", "你好，世界"]
LINEAGE = {"teacher": "a/teacher", "steps": 0, "recipe": {}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> RetrievalConfig:
    directory = tmp_path_factory.mktemp("pairs")
    (directory / "en-de.tsv").write_text("Hello\tHallo\nA path by the sea\tEin Weg am Meer\n")
    return RetrievalConfig(pairs=str(directory), max_length=60)


@pytest.fixture(scope="module")
def exported(tiny_teacher: Path, pairs: RetrievalConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export with everything."""
    for package in ("onnxruntime", "onnxscript", "sentence_transformers"):
        pytest.importorskip(package, reason="pip install -r requirements-dev.txt")
    return export(
        tiny_teacher,
        tmp_path_factory.mktemp("exports") / "student",
        add_sentence_transformers,
        lambda directory: onnx.add_onnx(directory, pairs),
    )


def export(tiny_teacher: Path, output: Path, *extras) -> Path:
    model = load_teacher_encoder(tiny_teacher)
    return export_student(Export(model.state_dict(), model.config, str(tiny_teacher), LINEAGE, extras), output)


def test_onnx_gives_the_hidden_states_of_torch(exported: Path) -> None:
    import onnxruntime

    check = json.loads((exported / "onnx" / "check.json").read_text())
    assert check["fp32"]["greatest_difference"] <= onnx.GREATEST_DIFFERENCE
    assert (check["languages"], check["sentences"]) == (["de"], 4)
    assert check["megabytes"]["int8"] < check["megabytes"]["fp32"]
    assert "fp32   retrieval" in onnx_lines(check)
    assert onnx.int8_warning(check) == ""
    for int8, warned in ((0.88, False), (0.8799, True)):
        check["torch"]["retrieval_mean"], check["int8"]["retrieval_mean"] = 0.9, int8
        assert ("loses 0.020 of retrieval" in onnx.int8_warning(check)) == warned

    session = onnxruntime.InferenceSession(str(exported / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    model, tokenizer = AutoModel.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    for texts in (TEXTS, TEXTS[:1]):  # another batch size, another length, padding and none
        feeds = tokenizer(texts, padding=True, return_tensors="np")
        states_BLD = session.run(None, {name: feeds[name] for name in ("input_ids", "attention_mask")})[0]
        with torch.inference_mode():
            expected_BLD = model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state.numpy()
        real = feeds["attention_mask"].astype(bool)
        np.testing.assert_allclose(states_BLD[real], expected_BLD[real], atol=onnx.GREATEST_DIFFERENCE)


def test_onnx_with_a_tokenizer_without_padding(tiny_teacher: Path, pairs: RetrievalConfig, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_teacher, tmp_path / "model"))
    (model / "sentencepiece.bpe.model").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert onnx.add_onnx(model, pairs)["fp32"]["greatest_difference"] < onnx.GREATEST_DIFFERENCE


def test_a_difference_is_noticed_and_measured(tiny_teacher: Path, pairs: RetrievalConfig) -> None:
    encoder = load_encoder(str(tiny_teacher))
    right = onnx._torch_run(encoder)
    runs = {"torch": right, "fp32": lambda ids, mask: right(ids, mask) + 0.25 * (1 - mask.unsqueeze(-1))}
    assert onnx.compare_runs(encoder, runs, pairs)["fp32"]["greatest_difference"] == 0.0  # padding does not count
    runs["fp32"] = lambda ids, mask: right(ids, mask) + 0.25
    assert onnx.compare_runs(encoder, runs, pairs)["fp32"]["greatest_difference"] == pytest.approx(0.25, abs=1e-5)
    (word,) = encoder.tokenizer("да", add_special_tokens=False)["input_ids"][-1:]
    runs["fp32"] = lambda ids, mask: right(ids, mask) + 0.5 * (ids == word).unsqueeze(-1)
    assert onnx.compare_runs(encoder, runs, pairs)["fp32"]["greatest_difference"] == 0.0
    check = onnx.compare_runs(encoder, runs, pairs, {"ru": ["да"]})
    assert check["fp32"]["greatest_difference"] == pytest.approx(0.5, abs=1e-5), "lines without a pair count as well"
    assert (check["languages"], check["further_languages"], check["sentences"]) == (["de"], ["ru"], 5)


def test_every_sample_language_is_in_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    further = further_lines("samples/parallel", None)
    paired = {path.stem.removeprefix("en-") for path in Path("samples/parallel").glob("en-*.tsv")}
    samples = {path.name.removesuffix(".txt.xz") for path in Path("samples/cc100").iterdir()}
    assert (set(further) | paired | {"en"}, set(further) & paired) == (samples, set())
    assert all(len(lines) == CHECK_LINES and all(lines) for lines in further.values())
    monkeypatch.chdir(tmp_path)
    pairs = str(REPO / "samples" / "parallel")
    assert further_lines(pairs, None) == {}, "outside the repository there are no samples"
    with pytest.raises(UserError, match="--check-text"):
        further_lines(pairs, tmp_path)
    (tmp_path / "xx.txt").write_text("\n eins \n\nzwei")
    (tmp_path / "yy.txt.xz").write_bytes(b"not compressed")
    with pytest.raises(UserError, match=r"yy\.txt\.xz cannot be read"):
        further_lines(pairs, tmp_path)
    (tmp_path / "yy.txt.xz").unlink()
    assert further_lines(pairs, tmp_path) == {"xx": ["eins", "zwei"]}


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_a_wrong_onnx_file_fails_and_nothing_is_kept(tiny_teacher: Path, tmp_path: Path, difference: float) -> None:
    with pytest.raises(UserError, match="differs from torch"):
        export(tiny_teacher, tmp_path / "student", lambda directory: onnx.check_difference(difference))
    assert list(tmp_path.iterdir()) == []
    onnx.check_difference(2e-6)


def test_sentence_transformers_computes_the_same_vectors(exported: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported), device="cpu")
    assert model.max_seq_length == 64
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    ours, _ = sentence_vectors(load_encoder(str(exported)), TEXTS, max_length=64, batch_size=2)
    np.testing.assert_allclose(model.encode(TEXTS), ours["output"].numpy(), atol=1e-5)


USES = sorted(set((REPO / "examples").glob("*.py")) - {REPO / "examples" / "with_trainer.py"})


@pytest.mark.parametrize("example", USES, ids=lambda path: path.stem)
def test_every_use_of_a_student_runs(
    exported: Path, example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(example), str(exported)])
    reported, verbosity = Reported(), transformers.logging.get_verbosity()
    transformers.logging.add_handler(reported)
    try:
        runpy.run_path(str(example), run_name="__main__")
    finally:
        transformers.logging.remove_handler(reported)
        transformers.logging.set_verbosity(verbosity)
    assert capsys.readouterr().out.count("->") == 4
    assert not reported.lines, "a report about the pooler that a student does not have"


class Reported(logging.Handler):
    """The messages that transformers would show."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_padding_is_the_tokenizers(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BERT body with XLM-R's tokenizer (e5-small on the hub) has another padding id in its config.json."""
    student = shutil.copytree(exported, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    monkeypatch.setattr("sys.argv", ["", str(student)])
    names = runpy.run_path(str(REPO / "examples" / "with_onnxruntime.py"))
    assert names["input_ids_BL"][names["mask_BL"] == 0].tolist() == [1] * (names["mask_BL"] == 0).sum()
    assert AutoTokenizer.from_pretrained(exported).pad_token_id == 1


SENTENCES = {
    "pooling": "last",
    "normalize": True,
    "prompts": {"query": "query: "},
    "default_prompt": None,
    "include_prompt": True,
    "similarity": "dot",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_trained_projection_is_a_module_of_sentence_transformers(
    tiny_teacher: Path, tmp_path: Path, pooling: str, dtype: torch.dtype
) -> None:
    """With the pooling and prefixes that the run recorded. A trimmed copy keeps it; without it the vectors are the student's."""
    pytest.importorskip("sentence_transformers", reason="pip install -r requirements-dev.txt")
    from sentence_transformers import SentenceTransformer

    model, lineage = load_teacher_encoder(tiny_teacher), {**LINEAGE, "sentences": {**SENTENCES, "pooling": pooling}}
    projection_Dd = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    for name, extras in (("kept", [add_sentence_transformers]), ("dropped", [drop_dense, add_sentence_transformers])):
        made_of = Export(
            model.state_dict(), model.config, str(tiny_teacher), lineage, extras, dtype, (), Dense(projection_Dd)
        )
        output = export_student(made_of, tmp_path / name)
        loaded = SentenceTransformer(str(output), device="cpu")
        assert loaded.prompts["query"] == "query: "
        assert loaded.similarity_fn_name == "dot"
        is_kept = name == "kept"
        assert [type(module).__name__ for module in loaded][2:-1] == ["Dense"] * is_kept
        vectors = torch.from_numpy(loaded.encode(TEXTS)).float()
        tokenizer = AutoTokenizer.from_pretrained(output)
        for vector, text in zip(vectors, TEXTS, strict=True):
            with torch.inference_mode():
                states_LD = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
            pooled = {"mean": states_LD.mean(0), "cls": states_LD[0], "last": states_LD[-1]}[pooling]
            expected = torch.nn.functional.normalize(projection_Dd @ pooled if is_kept else pooled, dim=0)
            assert torch.allclose(vector, expected, atol=1e-5 if dtype == torch.float32 else 5e-3)
        card = (output / "README.md").read_text()
        assert ("2_Dense" in card) == is_kept
        assert {"mean": "the mean of", "cls": "first token", "last": "last real token"}[pooling] in card


def test_a_corrupt_lineage_names_the_keys_of_sentence_vectors(tiny_teacher: Path, tmp_path: Path) -> None:
    model = load_teacher_encoder(tiny_teacher)
    for wrong in ({"pooling": "max"}, {"other": 1}):
        made_of = Export(model.state_dict(), model.config, str(tiny_teacher), {**LINEAGE, "sentences": wrong})
        with pytest.raises(UserError, match=r"lineage\.json: `sentences`.*pooling, normalize"):
            export_student(made_of, tmp_path / "student")
