"""A teacher's sentence-transformers files: every form of pooling that they name, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.distillation.models.sentence_files import SentenceSettings, sentence_settings
from pipeline.errors import UserError

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
MEAN = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def teacher(directory: Path, pooling: Any, *more: Any, prompts: Any = None) -> str:
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING, *more]))
    if prompts is not None:
        (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return str(directory)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (MEAN, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 48}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"word_embedding_dimension": 48}, "mean"),
    ],
)
def test_the_pooling_is_the_teachers(tmp_path: Path, pooling: dict, expected: str) -> None:
    found = sentence_settings(teacher(tmp_path, pooling, NORMALIZE), "auto")
    assert found.settings == SentenceSettings(pooling=expected)
    assert found.warnings == []
    assert "modules.json" in found.origin


def test_prefixes_and_normalisation_are_read(tmp_path: Path) -> None:
    prompts = {
        "prompts": {"query": "query: ", "document": "passage: ", "empty": ""},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
    }
    found = sentence_settings(teacher(tmp_path, {**MEAN, "include_prompt": False}, prompts=prompts), "auto")
    assert found.settings == SentenceSettings(
        "mean", False, {"query": "query: ", "document": "passage: "}, "query", False, "dot"
    )
    assert SentenceSettings(**found.settings.recorded()) == found.settings
    assert SentenceSettings("last").recorded() == {"pooling": "last", "normalize": True}


def test_a_hub_model_is_read_from_the_commit_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache, where no network can be asked: that a file is not there does not say that the model has none."""
    revision = "c" * 40
    repository = tmp_path / "cache" / "models--some--teacher"
    snapshot = repository / "snapshots" / revision
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    teacher(snapshot, {"pooling_mode": "cls"})
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    found = sentence_settings("some/teacher", "auto")
    assert (found.settings.pooling, found.settings.normalize) == ("cls", False)
    modules = (snapshot / "modules.json").rename(snapshot / "moved")
    with pytest.raises(UserError, match=r"modules\.json is not in the cache.*hf download some/teacher.*pooling=mean"):
        sentence_settings("some/teacher", "auto")
    assert sentence_settings("some/teacher", "last").settings == SentenceSettings("last")
    modules.rename(snapshot / "modules.json")
    (snapshot / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UserError, match=r"1_Pooling/config\.json"):
        sentence_settings("some/teacher", "auto")


@pytest.mark.parametrize(("asked", "expected"), [("auto", "mean"), ("cls", "cls")])
def test_a_teacher_without_the_files_is_pooled_by_mean(tmp_path: Path, asked: str, expected: str) -> None:
    found = sentence_settings(str(tmp_path), asked)
    assert found.settings == SentenceSettings(pooling=expected)
    assert "has no modules.json" in found.origin


def test_what_is_done_otherwise_than_the_files_say_is_a_warning(tmp_path: Path) -> None:
    found = sentence_settings(teacher(tmp_path, MEAN, DENSE, NORMALIZE), "cls")
    assert found.settings.pooling == "cls"
    own, dense = found.warnings
    assert "relations.pooling is cls, and the teacher's own pooling is mean" in own
    assert "Dense" in dense


@pytest.mark.parametrize(
    ("pooling", "named"),
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": ["cls", "mean"]}, "cls, mean"),
        ({"pooling_mode": 7}, "7"),
    ],
)
def test_another_pooling_needs_a_choice(tmp_path: Path, pooling: dict, named: str) -> None:
    name = teacher(tmp_path, pooling)
    with pytest.raises(UserError, match=rf"pools by {named}.*--set relations\.pooling=mean"):
        sentence_settings(name, "auto")
    assert sentence_settings(name, "mean").settings.pooling == "mean"


def test_a_teacher_without_a_pooling_module_needs_a_choice(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([TRANSFORMER]))
    with pytest.raises(UserError, match="no module of the kind Pooling"):
        sentence_settings(str(tmp_path), "auto")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("modules.json", "{", "not readable JSON"),
        ("modules.json", "{}", "holds no list"),
        ("modules.json", "[3]", "has the entry 3"),
        ("modules.json", '[{"type": "x.Pooling", "path": "../../etc"}]', "no `type` and `path`"),
        ("1_Pooling/config.json", "[]", "holds no object"),
        ("1_Pooling/config.json", "[" * 100_000, "not readable JSON"),
        ("config_sentence_transformers.json", '{"prompts": ["query: "]}', "`prompts`"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 3}}', "`prompts`"),
    ],
)
def test_files_that_cannot_be_used_are_explained(tmp_path: Path, file: str, text: str, words: str) -> None:
    name = teacher(tmp_path, MEAN, NORMALIZE)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"sentence vectors of the teacher .*{words}"):
        sentence_settings(name, "auto")


def test_a_pooling_module_without_settings_is_no_mean(tmp_path: Path) -> None:
    name = teacher(tmp_path, MEAN)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UserError, match=r"names 1_Pooling/config\.json, which is missing"):
        sentence_settings(name, "auto")
