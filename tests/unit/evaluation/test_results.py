"""`evaluation.json` after several evaluations: which figures are added, replaced or moved away; the file is always complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.__main__ import main
from pipeline.errors import DivergedRunError, UserError
from pipeline.evaluation import results
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.model_content import content_of
from pipeline.evaluation.pooling import Dense
from pipeline.export.sentence_transformers_files import write_dense

MODELS = {"a": "1", "b": "2"}


def evaluate(model: Path, output: Path, task: str, *settings: str) -> dict:
    words = [word for setting in settings for word in ("--set", f"{task}.{setting}")]
    main(["evaluate", str(model), "--tasks", task, "--output", str(output), *words])
    return json.loads((output / results.FILE).read_text())


def test_a_second_evaluation_is_added_to_the_first(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output, scored = Path(shutil.copytree(tiny_teacher, tmp_path / "m")), tmp_path / "out", tmp_path / "s.tsv"
    scored.write_text("a\tb\t1\nc\td\t2\ne\tf\t3\n")
    quick = ("languages=[de]", "max_pairs=3", "max_length=60")
    first = evaluate(model, output, "retrieval", *quick)
    both = evaluate(model, output, "sts", f"files=[{scored}]", "max_length=60")
    assert list(both["tasks"]) == ["retrieval", "sts"]
    for part in ("tasks", "settings"):
        assert both[part]["retrieval"] == first[part]["retrieval"]
    assert "(retrieval, sts)" in capsys.readouterr().out
    again = evaluate(model, output, "retrieval", *quick[:1], "max_pairs=4", "max_length=60")
    assert again["tasks"]["sts"] == both["tasks"]["sts"]
    assert again["settings"]["retrieval"]["max_pairs"] == 4
    assert again["tasks"]["retrieval"][str(model)]["num_pairs"] == {"de": 4}

    changed_weights(model)
    after = evaluate(model, output, "retrieval", *quick)
    assert list(after["tasks"]) == ["retrieval"], "figures of other weights are not in the same file"
    assert json.loads((output / results.OTHER_MODELS_FILE).read_text()) == again
    assert "of other models or weights" in capsys.readouterr().out


def test_another_job_may_have_added_a_task(tmp_path: Path) -> None:
    path = tmp_path / results.FILE
    for task in ("xnli", "mlqa", "xnli"):
        results.add(path, MODELS, task, {"a": {task: 1.0}}, {})
    assert list(results.read(path)["tasks"]) == ["xnli", "mlqa"]


def test_figures_that_are_not_finite_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / results.FILE
    results.add(path, MODELS, "sts", {"a": 0.5}, {})
    before = path.read_bytes()
    with pytest.raises(DivergedRunError, match="not finite"):
        results.add(path, MODELS, "heldout", {"a": float("nan")}, {})
    assert (path.read_bytes(), [file.name for file in tmp_path.iterdir()]) == (before, [results.FILE])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task": {}}', '{"tasks": []}'])
def test_an_invalid_file_is_rejected_before_any_model_is_loaded(tmp_path: Path, text: str) -> None:
    (tmp_path / results.FILE).write_text(text)
    with pytest.raises(UserError, match="is not an evaluation"):
        main(["evaluate", "nowhere", "--output", str(tmp_path)])


def changed_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["embeddings.LayerNorm.weight"] *= 2
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def changed_pooling(model: Path) -> None:
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')


def changed_projection(model: Path) -> None:
    shutil.rmtree(model / "2_Dense")
    write_dense(model, Dense(torch.eye(48)[:6]))


@pytest.mark.parametrize("change", [changed_pooling, changed_projection])
def test_figures_of_other_sentence_vectors_are_those_of_another_model(
    change: Callable[[Path], None], tiny_teacher: Path, tmp_path: Path
) -> None:
    """The weights of the encoder are the same, as after an export with and without --drop-projection."""
    model = Path(shutil.copytree(tiny_teacher, tmp_path / "m"))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    write_dense(model, Dense(torch.eye(48)[:5]))
    scored = tmp_path / "s.tsv"
    scored.write_text("a\tb\t1\nc\td\t2\ne\tf\t3\n")
    evaluate(model, tmp_path / "out", "retrieval", "languages=[de]", "max_pairs=3", "max_length=60")
    change(model)
    after = evaluate(model, tmp_path / "out", "sts", f"files=[{scored}]", "max_length=60")
    assert list(after["tasks"]) == ["sts"]


def test_a_model_that_is_replaced_during_an_evaluation_keeps_its_content(tiny_teacher: Path, tmp_path: Path) -> None:
    """A grid of a later task must not file the results of the loaded weights under those that took their place."""
    model = Path(shutil.copytree(tiny_teacher, tmp_path / "m"))
    encoder = load_encoder(str(model))
    before = encoder.content
    changed_weights(model)
    assert encoder.content == before != load_encoder(str(model)).content


def test_the_content_of_a_model_has_the_settings_of_its_tokenizer(tiny_teacher: Path, tmp_path: Path) -> None:
    """`do_lower_case` changes the ids of a text even where there is a tokenizer.json; the greatest length does not."""
    model = Path(shutil.copytree(tiny_teacher, tmp_path / "m"))
    path, found = model / "tokenizer_config.json", []
    for settings in ({}, {"model_max_length": 7}, {"do_lower_case": False}, {"do_lower_case": True}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        found.append(content_of(model))
    assert found[0] == found[1]
    assert len({*map(tuple, found)}) == 3


def test_a_model_below_the_home_directory(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, the shell leaves the ~ as it is: the model is known by its files too, and its lineage is read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Path(shutil.copytree(tiny_teacher, tmp_path / "m"))
    encoder = load_encoder("~/m@2")
    assert (encoder.name, encoder.path, encoder.content) == ("~/m@2", str(model), content_of(model))


def test_a_task_that_is_named_twice_runs_once(tiny_teacher: Path, tmp_path: Path) -> None:
    more = ["--set", "retrieval.languages=[de]", "--set", "retrieval.max_pairs=3", "--set", "retrieval.max_length=60"]
    main(["evaluate", str(tiny_teacher), "--tasks", "retrieval,retrieval", "--output", str(tmp_path / "out"), *more])
    assert list(results.read(tmp_path / "out" / results.FILE)["tasks"]) == ["retrieval"]
