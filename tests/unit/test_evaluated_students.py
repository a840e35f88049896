"""Which student an evaluation is about: the figures of one run never count for another run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import as_tree, load_recipe
from pipeline.errors import UserError
from pipeline.report.choice import Measure
from pipeline.report.compare import measures_of, read_all
from pipeline.report.family import render_family
from pipeline.report.page import render
from pipeline.runtime.run_paths import RunPaths
from tests.unit.made_up_run import POOLINGS, make_family, make_run


def evaluate(directory: Path, values: dict[str | Path, float], steps: int = 8) -> Path:
    """Write an evaluation: model -> mean accuracy."""
    pair = {pooling: {"mean": 0.5} for pooling in POOLINGS}
    results = {
        str(model): {"mean": dict.fromkeys(POOLINGS, value), "per_pair": {"de": pair}}
        for model, value in values.items()
    }
    models = {model: {"fingerprint": "x", "steps": steps} for model in results}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "evaluation.json").write_text(json.dumps({"models": models, "tasks": {"retrieval": results}}))
    return directory


def export(run_dir: Path, place: Path, student: str = "", changed: dict[str, Any] | None = None) -> Path:
    """The lineage of an export."""
    recipe = as_tree(load_recipe(RunPaths(run_dir, student).recipe, [])) | (changed or {})
    place.mkdir(parents=True)
    lineage = {"student": student, "recipe": recipe} if student else {"recipe": recipe}
    (place / "lineage.json").write_text(json.dumps(lineage))
    return place


def figures(runs: list[Path], *directories: Path) -> dict[str, float]:
    """Name of the student -> retrieval accuracy."""
    students = read_all(runs)
    measures = {measure.name: measure for measure in measures_of(students, directories)}
    values = measures.get("retrieval", Measure("retrieval")).values
    return {students[number].name: value for number, value in values.items()}


def test_a_student_can_be_chosen_by_every_task(tmp_path: Path, evaluated: Path) -> None:
    """The results of a real evaluation, as those of a run's student."""
    run = make_run(tmp_path / "run")
    student = export(run, run / "student")
    report = json.loads((evaluated / "evaluation.json").read_text())
    model = next(iter(report["models"]))
    report["models"] = {str(student): {**report["models"][model], "steps": 8}}
    for task in list(report["tasks"]):
        report["tasks"][task] = {str(student): report["tasks"][task][model]}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(report))
    names = {measure.name for measure in measures_of(read_all([run]), [])}
    assert set(report["tasks"]) - {"heldout", "speed"} <= names
    assert {"beir.values", "xnli", "pawsx", "tagging"} <= names


@pytest.fixture
def sweeps(tmp_path: Path) -> list[Path]:
    """Two runs of one recipe, with one name."""
    return [make_family(tmp_path / parent / "sweep") for parent in ("a", "b")]


def test_figures_of_two_runs_of_one_recipe_and_one_name(sweeps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sweeps
    for run_dir, accuracy in ((a, 0.6), (b, 0.8)):
        place = run_dir / "evaluation"
        evaluate(place, {export(run_dir, place / "exported" / "sweep-deep", "deep"): accuracy})
    expected = {f"{a}/deep": 0.6, f"{b}/deep": 0.8}
    assert figures(sweeps) == expected
    shutil.rmtree(a / "evaluation" / "exported")
    shutil.rmtree(b / "evaluation" / "exported")
    assert figures(sweeps) == expected, "evaluations in a run directory are about this run, also without the models"
    for run_dir in sweeps:
        shutil.rmtree(run_dir / "evaluation")
        export(run_dir, run_dir / "students" / "flat" / "student", "flat")
    both = evaluate(
        a.parent.parent / "scores", {"a/sweep/students/flat/student": 0.7, "b/sweep/students/flat/student": 0.9}
    )
    assert figures(sweeps, both) == {f"{a}/flat": 0.7, f"{b}/flat": 0.9}
    monkeypatch.chdir(a)
    assert figures(sweeps, both) == {f"{a}/flat": 0.7, f"{b}/flat": 0.9}, "from any working directory"
    assert figures([a], both) == {"flat": 0.7}, "the other model belongs to a run that is not compared"
    for run_dir in sweeps:
        shutil.rmtree(run_dir / "students" / "flat" / "student")
    assert figures(sweeps, both) == {f"{a}/flat": 0.7, f"{b}/flat": 0.9}, "the longer end of the path decides"


def test_an_evaluation_in_a_run_directory_is_about_this_run(sweeps: list[Path]) -> None:
    a, b = sweeps
    evaluate(
        a,
        {
            export(b, b / "students" / "deep" / "student", "deep"): 0.9,
            export(b, b.parent / "exported" / "sweep-late", "late"): 0.9,
        },
    )
    assert figures(sweeps) == {f"{a}/late": 0.9}, (
        "the export next to the runs may be of either, and is in a's evaluation"
    )
    evaluate(b, {b / "students" / "deep" / "student": 0.8})
    assert figures(sweeps) == {f"{a}/late": 0.9, f"{b}/deep": 0.8}


def test_a_recipe_that_several_runs_have_decides_nothing(sweeps: list[Path], tmp_path: Path) -> None:
    a, b = sweeps
    scores = evaluate(tmp_path / "scores", {export(a, tmp_path / "exports" / "deep", "deep"): 0.9})
    assert figures(sweeps, scores) == {}
    assert figures([b], scores) == {"deep": 0.9}
    other = evaluate(tmp_path / "other", {export(a, b / "mine", "flat"): 0.7})
    assert figures(sweeps, other) == {f"{b}/flat": 0.7}, "an export in a run directory is of this run"
    named = {export(a, tmp_path / "out" / "exported" / name, "late"): 0.5 for name in ("sweep-late", "another-late")}
    assert figures([a], evaluate(tmp_path / "out", named)) == {"late": 0.5}
    assert figures([a], evaluate(tmp_path / "out", dict(list(named.items())[1:]))) == {}


@pytest.mark.parametrize(
    ("changed", "is_own"),
    [
        ({"steps": 4, "save_every": 2, "checkpoint": {"keep": 9}}, True),
        ({"of_a_newer_version": 3}, True),
        ({"seq_len": 64}, False),
        ({"student": 3}, False),
    ],
)
def test_recipes_are_compared_by_what_is_computed(
    sweeps: list[Path], tmp_path: Path, changed: dict[str, Any], is_own: bool
) -> None:
    place = export(sweeps[0], tmp_path / "deep", "deep", changed)
    lineage = json.loads((place / "lineage.json").read_text())
    del lineage["recipe"]["stop_when"], lineage["recipe"]["relations"]["tail"]  # of an older version
    (place / "lineage.json").write_text(json.dumps(lineage))
    found = figures(sweeps[:1], evaluate(tmp_path / "scores", {place: 0.9}))
    assert found == ({"deep": 0.9} if is_own else {})


def test_a_trimmed_student_is_another_model(tmp_path: Path) -> None:
    """It has the recipe and steps of the student, but text outside of its vocabulary is read otherwise."""
    run = make_run(tmp_path / "run")
    complete, cut = export(run, tmp_path / "complete"), export(run, tmp_path / "cut")
    lineage = json.loads((cut / "lineage.json").read_text())
    (cut / "lineage.json").write_text(json.dumps({**lineage, "trimmed": {"languages": ["de"]}}))
    scores = evaluate(tmp_path / "scores", {complete: 0.75, cut: 0.25})
    shutil.rmtree(run / "retrieval")
    assert figures([run], scores) == {"run": 0.75}
    assert figures([run], evaluate(tmp_path / "other", {cut: 0.25})) == {}


def test_of_two_evaluations_that_of_more_steps_counts_and_then_the_newer(sweeps: list[Path], tmp_path: Path) -> None:
    model = sweeps[0] / "students" / "deep" / "student"
    places = [evaluate(tmp_path / name, {model: value}) for name, value in (("x", 0.5), ("y", 0.6))]
    inside = evaluate(sweeps[0], {model: 0.7}, steps=4)
    for age, place in enumerate((inside, *places)):
        os.utime(place / "evaluation.json", (1000.0 - age, 1000.0 - age))
    for order in (places, places[::-1]):
        assert figures(sweeps[:1], *order) == {"deep": 0.5}
    assert figures(sweeps[:1]) == {"deep": 0.7}


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"result": 3}',
        '{"result": {"mean": 0.5}}',
        '{"result": {"mean": {"output": 0.5}, "per_pair": {}}}',
        '{"result": {"mean": {"output": NaN, "last_input": 1, "values": 1}, "per_pair": {}}}',
        '{"result": {"mean": {"output": 1, "last_input": 1, "values": 1, "other": "x"}, "per_pair": {}}}',
        '{"result": {"mean": {"output": 1, "last_input": 1, "values": 1}, "per_pair": {"de": 3}}}',
    ],
)
def test_a_demo_with_other_figures_is_named(tmp_path: Path, content: str) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "retrieval" / "after.json").write_text(content)
    for read in (lambda: figures([run_dir]), lambda: render(run_dir)):
        with pytest.raises(UserError, match=r"retrieval/after\.json has no `result`"):
            read()


def test_the_report_has_what_an_evaluation_of_the_run_directory_wrote(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "alone")
    shutil.rmtree(run_dir / "retrieval")
    (run_dir / "recipe.yaml").write_text("teacher: some/teacher\nseq_len: 128\n")
    place = run_dir / "evaluation"
    evaluate(place, {"some/teacher": 0.9, export(run_dir, place / "exported" / "alone"): 0.75})
    page = render(run_dir)
    assert '<div class="fact">retrieval<b>0.750</b></div>' in page
    assert "<tr><td>teacher</td><td>output</td><td>0.500</td><td>0.900</td></tr>" in page


def test_the_report_has_what_an_evaluation_of_several_students_wrote(sweeps: list[Path]) -> None:
    place = sweeps[0] / "evaluation"
    exports = {name: export(sweeps[0], place / "exported" / f"sweep-{name}", name) for name in ("deep", "late")}
    evaluate(place, {exports["deep"]: 0.75, exports["late"]: 0.25, f"{exports['deep']}@2": 1.0})
    sections = render_family(sweeps[0]).split("<h2>Student ")[1:]
    assert [("0.750" in section, "0.250" in section, "1.000" in section) for section in sections] == [
        (True, False, False),
        (False, False, False),
        (False, False, False),
    ], "late has another number of steps"
    evaluate(place, {exports["deep"]: 0.75, exports["late"]: 0.25}, steps=3)
    assert ">0.250<" in render_family(sweeps[0]).split("<h2>Student late")[1]
    assert "<td>student of 8 steps</td>" not in (page := render(sweeps[0], "deep"))
    assert "<td>student of 3 steps</td>" in page
