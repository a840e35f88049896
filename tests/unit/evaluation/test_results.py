"""`evaluation.json` after several evaluations: which figures are added, replaced or moved away; the file is always complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.__main__ import main
from pipeline.errors import DivergedRunError, UserError
from pipeline.evaluation import results

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

    weights = load_file(model / "model.safetensors")
    weights["embeddings.LayerNorm.weight"] *= 2
    save_file(weights, model / "model.safetensors", {"format": "pt"})
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
