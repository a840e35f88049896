"""What reads a run with several students: export, card and evaluation of one of them, and of any of its checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from pipeline.__main__ import main as pipeline
from pipeline.errors import EXIT_USER, exit_code_of
from pipeline.provenance import START_CONFIG, START_WEIGHTS
from pipeline.runtime.checkpoint import read_model_weights
from pipeline.runtime.run_paths import RunPaths
from tests.dist.runs import curve
from tests.dist.training_process import TrainingProcess

STUDENTS = "{small: {}, wide: {student: {layers: 3, hidden: 48, ffn: 96, init: layers}, optimizer: {lr: 0.02, warmup_steps: 8, decay: constant}}}"
SETTINGS = [
    "steps=8",
    "eval_every=2",
    "save_every=2",
    "checkpoint={keep: 1, keep_best: heldout}",
    "metrics.images=false",
]


@pytest.fixture(scope="module")
def run_dir(
    training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run with two students."""
    directory = tmp_path_factory.mktemp("family") / "run"
    sets = [word for setting in (*SETTINGS, f"students={STUDENTS}") for word in ("--set", setting)]
    ended = training.run("--deepspeed", fp32_config, "--recipe", tiny_recipe, "--run-dir", directory, *sets)
    assert ended.code == 0, ended.err
    return directory


@pytest.fixture(scope="module")
def best(run_dir: Path) -> dict[str, int]:
    """Student -> the step with the lowest held-out loss, of equal ones the later."""
    found = {}
    for name in ("small", "wide"):
        state = json.loads((run_dir / "checkpoints" / "step-00000008" / name / "state.json").read_text())
        losses = dict(state["evaluations"])
        assert list(losses) == [2, 4, 6, 8]
        found[name] = max(step for step in losses if losses[step] == min(losses.values()))
    assert found["wide"] < 8, "its rate grows until it is too high"
    return found


def export(run_dir: Path, output: Path, *words: object) -> Path:
    pipeline(["export", str(run_dir), "--output", str(output), *map(str, words)])
    return output


def error_of(capsys: pytest.CaptureFixture, *words: object) -> str:
    capsys.readouterr()
    assert exit_code_of(lambda: pipeline([*map(str, words)])) == EXIT_USER
    return capsys.readouterr().err


@pytest.mark.parametrize(("name", "layers", "width"), [("small", 2, 24), ("wide", 3, 48)])
@pytest.mark.parametrize("step", [None, "last", "best", 8, "the best of wide"])
def test_each_student_of_a_family_is_exported(
    name: str, layers: int, width: int, step: str | int | None, run_dir: Path, best: dict[str, int], tmp_path: Path
) -> None:
    step = best["wide"] if step == "the best of wide" else step
    output = export(run_dir, tmp_path / name, "--student", name, *([] if step is None else ["--step", step]))
    model = AutoModel.from_pretrained(output)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, width)
    steps = best[name] if step == "best" else step if isinstance(step, int) else 8
    weights, state = read_model_weights(run_dir, name, steps)
    assert state["step"] == steps
    stored = load_file(output / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[key], weights[key]) for key in weights)
    lineage = json.loads((output / "lineage.json").read_text())
    assert (lineage["student"], lineage["steps"]) == (name, steps)
    assert (lineage["recipe"]["student"]["layers"], lineage["recipe"]["students"]) == (layers, None)
    card = (output / "README.md").read_text()
    assert f"| student of the run | {name} |" in card
    heldout = curve(RunPaths(run_dir, name).files, "heldout/mean")
    assert f"| language | step 0 | step {steps} |" in card
    assert f"| mean | {heldout[0]:.3f} | {heldout[steps]:.3f} |" in card


def test_the_smaller_vocabulary_is_that_of_one_student_of_the_family(
    run_dir: Path, best: dict[str, int], vocabulary: Path, tmp_path: Path
) -> None:
    step = best["wide"]
    output = export(run_dir, tmp_path / "small", "--student", "small", "--step", step, "--vocabulary", vocabulary)
    assert AutoModel.from_pretrained(output).config.hidden_size == 24
    lineage = json.loads((output / "lineage.json").read_text())
    assert (lineage["student"], lineage["steps"], lineage["trimmed"]["from"]) == ("small", step, str(run_dir))


def test_an_export_of_a_family_that_is_not_clear_is_an_error(
    run_dir: Path, best: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("export", run_dir, "--output", tmp_path / "student")
    assert "has the students small, wide. Add --student small" in error_of(capsys, *words)
    assert "and none called narrow" in error_of(capsys, *words, "--student", "narrow")
    kept = sorted({*best.values(), 8})
    pruned = min({2, 4, 6} - set(kept))
    error = error_of(capsys, *words, "--student", "wide", "--step", pruned)
    steps = ", ".join(map(str, kept))
    assert re.search(
        rf"the checkpoint of step {pruned} was not kept in .*; it has the steps {steps}\. .*checkpoint.keep_best", error
    )
    error = error_of(capsys, "export", run_dir, "--output", run_dir / "students" / "exported", "--student", "wide")
    assert f"is a student of the run. For example: --output {run_dir / 'students' / 'wide' / 'student'}" in error
    with pytest.raises(SystemExit):
        pipeline([*map(str, words), "--step", "first"])
    assert "'first' is not a number of steps, best or last" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_the_best_step_must_have_been_kept(
    run_dir: Path, best: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pruned = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(pruned / "checkpoints" / f"step-{best['wide']:08d}")
    error = error_of(capsys, "export", pruned, "--output", tmp_path / "student", "--student", "wide", "--step", "best")
    assert re.search(
        rf"the checkpoint of the best held-out loss, \d\.\d{{4}} at step {best['wide']}, was not kept .*keep_best: heldout",
        error,
    )
    export(pruned, tmp_path / "student", "--student", "wide", "--step", 8)


def test_a_card_has_the_figures_of_its_student_of_the_family(
    run_dir: Path, best: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = export(run_dir, tmp_path / "wide", "--student", "wide", "--step", best["wide"])
    before = (output / "README.md").read_text()
    pipeline(["card", str(output), str(run_dir)])
    assert (output / "README.md").read_text() == before
    pipeline(["card", str(output), str(run_dir), "--student", "small"])
    small = curve(RunPaths(run_dir, "small").files, "heldout/mean")
    assert f"| mean | {small[0]:.3f} | {small[best['wide']]:.3f} |" in (output / "README.md").read_text()
    assert "and none called narrow" in error_of(capsys, "card", output, run_dir, "--student", "narrow")
    assert "Leave --student out" in error_of(capsys, "card", output, tmp_path, "--student", "small")
    assert "has one student, without a name" in error_of(capsys, "card", output, "--student", "small")


def test_students_of_a_family_are_evaluated_side_by_side(
    run_dir: Path, best: dict[str, int], tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--tasks", "speed", "--output", tmp_path / "figures"]
    words += [word for key in ("batches=[1]", "lengths=[8]", "rounds=1") for word in ("--set", f"speed.{key}")]
    chosen = ["--student", "small", "--student", "wide", "--step", "best"]
    pipeline(["evaluate", f"{run_dir}@1", str(tiny_teacher), *map(str, [*words, *chosen])])
    report = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    places = {name: tmp_path / "figures" / "exported" / f"run-{name}" for name in best}
    assert list(report["models"]) == [*(f"{place}@1" for place in places.values()), str(tiny_teacher)]
    assert [model["steps"] for model in report["models"].values()] == [*best.values(), None]
    for name, place in places.items():
        assert json.loads((place / "lineage.json").read_text())["student"] == name
    assert "Add --student small" in error_of(capsys, "evaluate", run_dir, *words)
    assert "none of" in error_of(capsys, "evaluate", tiny_teacher, *words, "--student", "small")
    assert "named twice" in error_of(capsys, "evaluate", run_dir, *words, "--student", "small", "--student", "small")


def test_a_student_of_a_family_starts_from_an_encoder(
    run_dir: Path,
    best: dict[str, int],
    training: TrainingProcess,
    tiny_recipe: Path,
    fp32_config: Path,
    tmp_path: Path,
) -> None:
    """An error names the student, and its fix is about this student alone."""
    init = export(run_dir, tmp_path / "wide", "--student", "wide", "--step", best["wide"])

    def train(*sets: str):
        words = [word for setting in ("steps=2", "eval_every=2", *sets) for word in ("--set", setting)]
        return training.run("--deepspeed", fp32_config, "--recipe", tiny_recipe, "--run-dir", tmp_path / "next", *words)

    ended = train(f"students={{first: {{}}, second: {{student: {{init: {init}}}}}}}")
    assert ended.code == EXIT_USER
    assert f"students.second: the encoder of `student.init` '{init}' is not of the student's shape" in ended.err
    fix = re.findall(r"--set (students\.second\.student\.\w+=\d+)", ended.err)
    assert len(fix) == 3
    ended = train(f"students={{first: {{}}, second: {{student: {{init: {run_dir}}}}}}}")
    assert f"pipeline export {run_dir} --student small --output {run_dir / 'student'} " in ended.err
    ended = train(f"students={{first: {{}}, second: {{student: {{init: {init}}}}}}}", *fix)
    assert ended.code == 0, ended.err
    start = curve(RunPaths(tmp_path / "next", "second").files, "heldout/mean")
    assert start[0] == curve(RunPaths(run_dir, "wide").files, "heldout/mean")[best["wide"]]
    identities = [read_model_weights(tmp_path / "next", name)[1]["identity"] for name in ("first", "second")]
    assert identities[1].keys() - identities[0].keys() == {START_WEIGHTS, START_CONFIG}
