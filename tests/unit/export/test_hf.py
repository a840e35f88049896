"""Export: AutoModel loads the same weights byte for byte, and the directory appears complete or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, XLMRobertaModel

from data_prep.shards import DataError
from pipeline.__main__ import main
from pipeline.config import Recipe, recipe_to_yaml
from pipeline.data.tokenizer_hash import tokenizer_sha256
from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.models.student import Student, StudentConfig, build_student
from pipeline.distillation.models.teacher import load_encoder
from pipeline.errors import UserError
from pipeline.export import hf
from pipeline.export.sentence_transformers_files import add_sentence_transformers

STATE = {
    "step": 12,
    "samples": 96,
    "data_fingerprint": "data0123",
    "recipe_fingerprint": "recipe4567",
    "precision": "fp32",
}
LINEAGE = {"teacher": "a/teacher", "steps": 12, "languages": ["de", "sw"], "recipe": {"steps": 12}}


@pytest.fixture(scope="module")
def student(tiny_teacher: Path) -> Student:
    return build_student(load_encoder(tiny_teacher), StudentConfig(layers=2, hidden=24, heads=4), seed=3)


@pytest.fixture(scope="module")
def weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in student.model.state_dict().items()}


def export(student: Student, weights: dict[str, torch.Tensor], teacher: Path, output: Path) -> Path:
    return hf.export_student(hf.Export(weights, student.model.config, str(teacher), LINEAGE), output)


def test_weights_and_hidden_states_are_equal_after_export(student, weights, tiny_teacher: Path, tmp_path: Path) -> None:
    output = export(student, weights, tiny_teacher, tmp_path / "student")
    stored = load_file(output / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(stored[name].numpy().tobytes() == weights[name].numpy().tobytes() for name in weights)
    model = AutoModel.from_pretrained(output).eval()
    ids = AutoTokenizer.from_pretrained(output)(["Hello world!"], return_tensors="pt")
    assert ids["input_ids"].tolist() == AutoTokenizer.from_pretrained(tiny_teacher)(["Hello world!"])["input_ids"]
    with torch.inference_mode():
        assert torch.equal(model(**ids).last_hidden_state, student.model.eval()(**ids).last_hidden_state)


def test_the_directory_has_the_files_that_users_need(student, weights, tiny_teacher: Path, tmp_path: Path) -> None:
    output = export(student, weights, tiny_teacher, tmp_path / "student")
    assert {"config.json", "model.safetensors", "README.md", "lineage.json", "tokenizer_config.json"} <= {
        path.name for path in output.iterdir()
    }
    spm = "sentencepiece.bpe.model"
    assert (output / spm).read_bytes() == (tiny_teacher / spm).read_bytes()
    assert json.loads((output / "config.json").read_text())["architectures"] == [XLMRobertaModel.__name__]
    assert json.loads((output / "lineage.json").read_text()) == LINEAGE
    front_matter = (output / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front_matter)["library_name"] == "transformers"
    assert (output / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_an_earlier_export_is_replaced_and_nothing_else(student, weights, tiny_teacher: Path, tmp_path: Path) -> None:
    output = export(student, weights, tiny_teacher, tmp_path / "student")
    (output / "onnx").mkdir()
    (output / "onnx" / "model.onnx").write_text("of the earlier export")
    (output / "notes.txt").write_text("of the user")
    export(student, weights, tiny_teacher, output)
    assert not (output / "onnx").exists()
    assert (output / "notes.txt").read_text() == "of the user"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not an earlier export"):
        export(student, weights, tiny_teacher, precious)
    assert (precious / "thesis.tex").read_text() == "x"


def test_a_failed_export_leaves_no_files(student, weights, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="tokenizer"):
        export(student, weights, tmp_path / "bare", tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize("change", ["missing", "shape", "precision", "extra"])
def test_weights_of_another_model_are_rejected(
    student, weights, tiny_teacher: Path, tmp_path: Path, change: str
) -> None:
    name = "encoder.layer.1.output.dense.weight"
    wrong = dict(weights)
    if change == "missing":
        del wrong[name]
    elif change == "shape":
        wrong[name] = wrong[name].T
    elif change == "precision":
        wrong[name] = wrong[name].half()
    else:
        name = "pooler.dense.weight"
        wrong[name] = torch.zeros(24, 24)
    with pytest.raises(UserError, match=name):
        export(student, wrong, tiny_teacher, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_hub_tokenizer_keeps_the_files_that_identify_it(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filled cache replaces the hub. Its tokenizer.json has a layout that no library writes."""
    revision = "0123456789" * 4
    snapshot = tmp_path / "cache" / "models--some--teacher" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(revision)
    for name in ("config.json", "sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_bytes((tiny_teacher / name).read_bytes())
    (snapshot / "tokenizer.json").write_text(json.dumps(json.loads((snapshot / "tokenizer.json").read_text())))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "student").mkdir()
    hf.copy_tokenizer("some/teacher", tmp_path / "student")
    for name in ("sentencepiece.bpe.model", "tokenizer.json"):
        assert (tmp_path / "student" / name).read_bytes() == (snapshot / name).read_bytes()
    assert tokenizer_sha256("some/teacher") == tokenizer_sha256(tmp_path / "student")


# -- from a run directory


@pytest.fixture
def run_dir(tmp_path: Path, student, weights, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    student.model.config.to_json_file(directory / "student_config.json", use_diff=False)
    (directory / "recipe.yaml").write_text(recipe_to_yaml(Recipe(teacher=str(tiny_teacher))))
    run = {"teacher": str(tiny_teacher), "languages": ["de"], "git_commit": "abc123", "packages": {"torch": "2"}}
    (directory / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(hf, "read_model_weights", lambda *which: (weights, STATE))
    return directory


def test_the_lineage_names_the_origin_of_a_student(run_dir: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    output = hf.export_run(run_dir, tmp_path / "student")
    lineage = json.loads((output / "lineage.json").read_text())
    assert lineage["teacher"] == str(tiny_teacher)
    for key, value in {"steps": 12, "data_fingerprint": "data0123", "git_commit": "abc123"}.items():
        assert lineage[key] == value
    card = (output / "README.md").read_text()
    for fact in (str(tiny_teacher), "data0123", "abc123", "| relation heads | 48 |", "| steps | 12 |", "seq_len: 512"):
        assert fact in card
    AutoModel.from_pretrained(output)


def imitates(run_dir: Path, teacher: Path, tail: str, pooling: dict[str, bool] | None) -> None:
    """The run's student imitates its teacher's output by `tail`. The teacher gets files with this pooling and a prefix."""
    relations = RelationsConfig(tail=tail)  # type: ignore[arg-type]
    (run_dir / "recipe.yaml").write_text(recipe_to_yaml(Recipe(teacher=str(teacher), relations=relations)))
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "teacher": str(teacher)}))
    if pooling is not None:
        modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
        (teacher / "modules.json").write_text(json.dumps(modules))
        (teacher / "1_Pooling").mkdir()
        (teacher / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        prompts = {"prompts": {"query": "query: ", "long": "two\nlines: "}}
        (teacher / "config_sentence_transformers.json").write_text(json.dumps(prompts))


@pytest.fixture
def teacher(tiny_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


CLS, MAX = {"pooling_mode_cls_token": True}, {"pooling_mode_max_tokens": True}


@pytest.mark.parametrize("tail", ["mse", "relation"])
def test_a_student_that_imitates_the_output_is_pooled_as_its_teacher(
    run_dir: Path, teacher: Path, tmp_path: Path, tail: str
) -> None:
    """SentenceTransformer gives the state of the first token, and the card says so and names the prefix."""
    pytest.importorskip("sentence_transformers", reason="pip install -r requirements-dev.txt")
    from sentence_transformers import SentenceTransformer

    imitates(run_dir, teacher, tail, CLS)
    output = hf.export_run(run_dir, tmp_path / "student", [add_sentence_transformers])
    model, tokenizer = AutoModel.from_pretrained(output).eval(), AutoTokenizer.from_pretrained(output)
    loaded = SentenceTransformer(str(output), device="cpu")
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling"], "the teacher does not normalise"
    for name, text in (("", "Hello"), ("query", "query: Hello")):
        with torch.inference_mode():
            first_D = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0, 0]
        found_D = torch.from_numpy(loaded.encode("Hello", prompt_name=name or None))
        torch.testing.assert_close(found_D, first_D, rtol=1e-4, atol=1e-5)
    card = (output / "README.md").read_text()
    assert "sentence vectors: `last_hidden_state` of the first token" in card
    assert r"""prefix before the text: `"query: "` (query), `"two\nlines: "` (long).""" in card


@pytest.mark.parametrize(
    ("tail", "pooling", "warning"),
    [
        ("none", CLS, ""),  # relations alone do not train the output
        ("none", MAX, ""),
        ("mse", None, ""),
        ("mse", MAX, "pools by max"),
    ],
)
def test_other_students_have_mean_pooling(
    run_dir: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tail: str, pooling, warning: str
) -> None:
    imitates(run_dir, teacher, tail, pooling)
    output = hf.export_run(run_dir, tmp_path / "student", [add_sentence_transformers])
    told = [line for line in capsys.readouterr().err.splitlines() if "pool" in line]
    assert len(told) == bool(warning)
    assert warning in "".join(told)
    assert "--set" not in "".join(told), "an export has no recipe"
    assert json.loads((output / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    assert "prompts" not in json.loads((output / "config_sentence_transformers.json").read_text())
    assert "prefix before" not in (output / "README.md").read_text()


@pytest.mark.parametrize("name", ["run.json", "student_config.json", "recipe.yaml"])
def test_a_run_directory_with_a_missing_file(run_dir: Path, tmp_path: Path, name: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=name):
        hf.export_run(run_dir, tmp_path / "student")


def test_an_export_with_a_smaller_vocabulary_replaces_nothing_that_the_run_needs(
    run_dir: Path, tiny_teacher: Path, tmp_path: Path, vocabulary: Path
) -> None:
    """The teacher is an export itself: a directory with a lineage, which an export may replace."""
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    (teacher / "lineage.json").write_text("{}")
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "teacher": str(teacher)}))
    before = sorted(path.name for path in teacher.iterdir())
    cut = ["--vocabulary", str(vocabulary)]
    for output, of in ((teacher, "the teacher"), (run_dir, "the run directory")):
        for more in ([], cut):
            with pytest.raises(DataError, match=f"is {of} .*, which must not be overwritten"):
                main(["export", str(run_dir), "--output", str(output), *more])
    assert sorted(path.name for path in teacher.iterdir()) == before

    family = tmp_path / "family"
    shutil.copytree(run_dir, family / "students" / "small")
    for more in ([], cut):
        with pytest.raises(UserError, match=r"every directory in .* is a student of the run"):
            main(["export", str(family), "--student", "small", "--output", str(family / "students" / "x"), *more])
    assert [path.name for path in (family / "students").iterdir()] == ["small"]


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run directory .*nothing not found"):
        main(["export", str(tmp_path / "nothing"), "--output", str(tmp_path / "student")])
