"""`pipeline compare`: what it prints and writes, which student is chosen, and its recipe as a file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.comparison.students import read_students
from pipeline.config import as_tree, load_recipe
from pipeline.errors import UserError
from pipeline.report.choice import choose
from pipeline.report.compare import measures_of, read_all, table_lines
from pipeline.report.family import render_comparison
from pipeline.report.timeline import training_hours
from pipeline.runtime.run_paths import RunPaths
from tests.unit.made_up_run import change_recipe, make_family, make_run, write_metrics

POOLED = {"output": {"mean": 0.5}, "values": {"mean": 0.5}}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return make_family(tmp_path / "family")


@pytest.fixture
def compare(family: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command on the family; return what it printed, with every space as one."""

    def run(*options: str | Path) -> str:
        capsys.readouterr()
        main(["compare", str(family), *map(str, options)])
        return " ".join(capsys.readouterr().out.split())

    return run


def chosen(family: Path, by: str | None = None, *directories: Path) -> str:
    """The table and the sentence that the command prints, with every space as one."""
    students = read_students(family)
    measures = measures_of(students, directories)
    return " ".join("\n".join([*table_lines(students, measures[1:]), choose(students, measures, by)[1]]).split())


def evaluate(directory: Path, values: dict[str, tuple[float, float]], **more: Any) -> None:
    """Write an evaluation: model -> mean accuracy pooled from output and from values."""
    means = {name: dict(zip(("output", "values"), both, strict=True)) for name, both in values.items()}
    per_pair = dict.fromkeys(more.get("languages", ("de", "th")), POOLED)
    report = {
        "models": {name: {"fingerprint": "x", "steps": more.get("steps", 8)} for name in values},
        "tasks": {"retrieval": {name: {"mean": mean, "per_pair": per_pair} for name, mean in means.items()}},
        "settings": {"retrieval": more.get("settings", {"max_pairs": 30})},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "evaluation.json").write_text(json.dumps(report))


def test_the_command_chooses_the_lowest_held_out_loss(family: Path, compare: Callable[..., str]) -> None:
    printed = compare("--json", family / "c.json")
    assert "Chosen: deep, which has the lowest heldout of step 8, 0.6250. Without this figure" in printed
    assert "not considered: late. Not at their last step: late." in printed
    found = json.loads((family / "c.json").read_text())
    assert found["chosen"] == "deep"
    assert found["differs"]["student.layers"] == {"deep": 4, "flat": 2, "late": 1}
    assert found["students"]["deep"]["best_heldout"] == 0.5
    assert found["students"]["flat"]["loss"] == 0.75
    # from the start at 999 s to the last report at 1017 s; "late" from 2000 s to 2006 s
    assert [round(found["students"][name]["training_hours"] * 3600) for name in ("deep", "late")] == [18, 6]
    assert found["students"]["late"]["device_hours"] == found["students"]["late"]["training_hours"], "one device"
    assert " 18 s 0.005 " in printed
    page = (family / "compare.html").read_text()
    assert "deep" in page
    assert "late" in page


def test_the_chosen_recipe_is_that_of_the_student_alone(family: Path, compare: Callable[..., str]) -> None:
    file = family / "chosen.yaml"
    compare("--write", file)
    assert load_recipe(file, []) == load_recipe(family / "recipe.yaml", []).members()["deep"]
    head = file.read_text().partition("\nteacher:")[0]
    assert all(line.startswith("# ") for line in head.split("\n"))
    assert f"The student deep of {family}" in head
    file.write_text("mine")
    with pytest.raises(UserError, match="exists and is not replaced"):
        compare("--write", file)
    assert file.read_text() == "mine"
    compare("--write", file, "--overwrite")
    assert load_recipe(file, []).student.layers == 4


def test_another_teacher_layer_is_not_chosen_by_the_held_out_loss(family: Path, compare: Callable[..., str]) -> None:
    change_recipe(family, "flat", "relations.teacher_layer=2")
    about = RunPaths(family, "flat").description
    about.write_text(json.dumps({**json.loads(about.read_text()), "matched_layers": [[2, 2]]}))
    printed = chosen(family)
    assert "(relations.teacher_layer not the same for all), so they do not tell which student is better" in printed
    assert "None is chosen by the held-out loss" in printed
    students = "--student=deep --student=flat --student=late"
    command = f"python -m pipeline evaluate {family} {students} --tasks retrieval --output {family}/evaluation, then"
    assert command in printed
    file = family / "chosen.yaml"
    with pytest.raises(UserError, match="None is chosen"):
        compare("--write", file)
    assert not file.exists()
    assert "None is chosen" in (family / "compare.html").read_text()
    insisted = chosen(family, "heldout")
    assert "Chosen: deep" in insisted
    assert "Warning: The held-out losses measure different things" in insisted
    evaluate(family / "evaluation", {f"{family}/students/{x}/student": (0.8, 0.8) for x in ("deep", "flat")})
    assert "Choose by an evaluated figure: --by retrieval, --by retrieval.values." in chosen(family)


def test_a_student_is_chosen_by_what_it_can_do(family: Path) -> None:
    models = {"elsewhere/family/students/deep/student": (0.8, 0.7), f"{family}/students/flat/student": (0.75, 0.9)}
    others = {"some/teacher": (0.99, 0.99), "family/students/late/student@3": (1.0, 1.0)}
    evaluate(family / "evaluation", {**models, **others})
    by_output, by_values = chosen(family, "retrieval"), chosen(family, "retrieval.values")
    assert "Chosen: deep, which has the highest retrieval of step 8, 0.8000." in by_output
    assert "Without this figure, and so not considered: late." in by_output
    assert "Chosen: flat, which has the highest retrieval.values of step 8, 0.9000." in by_values
    assert "0.8000 0.7000 finished" in by_output
    assert "0.7500 0.9000 ended at step 4" in by_output, "the checkpoint of step 8 has the weights of step 4"
    evaluate(family / "evaluation", models, steps=2)
    assert "0.8000 (2) 0.7000 (2) finished" in chosen(family), "evaluated after another number of steps"
    with pytest.raises(UserError, match=r"--by retrieve: no such figure of these students; did you mean `retrieval`"):
        chosen(family, "retrieve")


def test_evaluations_of_each_student_and_in_given_directories(family: Path) -> None:
    """The directory of one student may have the figures of others too: those that read the same teacher layer."""
    models = {f"{family}/students/{name}/student": (value, 0.7) for name, value in (("deep", 0.8), ("flat", 0.75))}
    evaluate(family / "students" / "deep" / "evaluation", models)
    export = family.parent / "exports" / "late"
    export.mkdir(parents=True)
    recipe = load_recipe(family / "recipe.yaml", []).members()["late"]
    (export / "lineage.json").write_text(json.dumps({"student": "late", "recipe": as_tree(recipe)}))
    evaluate(family.parent / "scores", {str(export): (0.9, 0.9)})
    assert "Chosen: late" in chosen(family, "retrieval", family.parent / "scores")
    without = chosen(family, "retrieval")
    assert "Chosen: deep" in without
    assert "Without this figure, and so not considered: late." in without
    with pytest.raises(UserError, match=r"evaluation\.json not found"):
        chosen(family, None, family.parent)


@pytest.mark.parametrize("other", [{"settings": {"max_pairs": 3}}, {"languages": ("de",)}])
def test_figures_of_different_evaluations_are_not_compared(family: Path, other: dict[str, Any]) -> None:
    evaluate(family / "students" / "deep", {f"{family}/students/deep/student": (0.8, 0.7)})
    evaluate(family / "students" / "flat", {f"{family}/students/flat/student": (0.75, 0.7)}, **other)
    printed = chosen(family, "retrieval")
    assert "Warning: `retrieval` was measured with different settings or languages" in printed
    assert "and so not comparable: retrieval, retrieval.values. Evaluate all students in one command" in printed
    measures = measures_of(read_students(family))
    assert "and so not comparable: retrieval," in render_comparison(read_students(family), measures[1:], "")


def test_figures_of_one_evaluation_have_no_such_note(family: Path) -> None:
    evaluate(family / "evaluation", {f"{family}/students/{name}/student": (0.8, 0.7) for name in ("deep", "flat")})
    assert "not comparable" not in chosen(family, "retrieval")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"tasks": {"retrieval": 3}}',
        '{"tasks": {"retrieval": {"x": {}}}}',
        '{"models": {"family/students/deep/student": {}}, "tasks": {"sts": {"family/students/deep/student": {"mean": NaN}}}}',
        '{"models": {"family/students/deep/student": {}}, "tasks": {"sts": {"family/students/deep/student": {"mean": "x"}}}}',
    ],
)
def test_a_file_that_is_no_evaluation_is_named(family: Path, content: str) -> None:
    (family / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"family/evaluation\.json"):
        chosen(family)


def test_runs_of_the_demo_are_compared_by_its_retrieval(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    after = runs[0] / "retrieval" / "after.json"
    after.write_text(after.read_text().replace("0.875", "0.885"))
    students = read_all(runs)
    hours, device_hours = training_hours(students[0].paths, students[0].points) or (0.0, 0.0)
    assert device_hours == 2 * hours == pytest.approx(2 * 103 / 3600), (
        "two ranks; the pause before the restart is left out"
    )
    assert choose(students, measures_of(students), "retrieval")[0] == 0
    (runs[0] / "demo_training.json").write_text(json.dumps({"steps": 4}))
    assert choose(students, measures_of(students), "retrieval")[0] == 1, "the first run continued after its demo"


def test_a_diverged_student_is_not_chosen(family: Path) -> None:
    state = family / "checkpoints" / "step-00000008" / "deep" / "state.json"
    ended = {"step": 6, "reason": "diverged: 8 steps in a row were not finite"}
    state.write_text(json.dumps({"step": 8, "ended": ended}))
    assert "Chosen: flat" in chosen(family)
    models = {f"{family}/students/{name}/student": (score, 0.5) for name, score in (("deep", 0.9), ("flat", 0.8))}
    evaluate(family / "evaluation", models)
    assert "Chosen: flat" in (printed := chosen(family, "retrieval"))
    assert "Without this figure, and so not considered: late. Diverged, and so not considered: deep." in printed
    evaluate(family / "evaluation", dict(list(models.items())[:1]))
    with pytest.raises(UserError, match="no student has a finite figure yet"):
        chosen(family, "retrieval")


def test_only_what_can_be_exported_is_to_be_evaluated_first(family: Path) -> None:
    change_recipe(family, "flat", "relations.heads=6")
    assert "--student=deep --student=flat --student=late" in chosen(family)
    shutil.rmtree(family / "checkpoints-2")
    assert "--student=deep --student=flat --tasks" in chosen(family)
    state = family / "checkpoints" / "step-00000008" / "deep" / "state.json"
    state.write_text(json.dumps({"step": 8, "ended": {"step": 6, "reason": "diverged: not finite"}}))
    assert f"evaluate {family} --student=flat --tasks" in chosen(family)
    shutil.rmtree(family / "checkpoints")
    assert "Wait for the first checkpoint" in chosen(family)


def test_the_best_checkpoint_counts_only_where_it_is_kept(family: Path) -> None:
    (family / "checkpoints" / "step-00000008" / "flat" / "state.json").write_text(
        json.dumps({"step": 8, "ended": None})
    )
    write_metrics(RunPaths(family, "flat"), {"step": 4, "heldout/mean": 0.4}, {"step": 8, "heldout/mean": 0.7})
    assert "Chosen: deep, which has the lowest heldout of step 8, 0.6250" in chosen(family)
    for name in ("deep", "flat", "late"):
        change_recipe(family, name, "checkpoint.keep_best=heldout")
    assert "Chosen: flat, which has the lowest heldout of step 4, 0.4000" in chosen(family)


def test_before_the_first_evaluation_none_is_chosen(family: Path) -> None:
    for name in ("deep", "flat", "late"):
        write_metrics(RunPaths(family, name), {"step": 1, "loss/total": 1.0, "heldout/mean": math.nan})
    assert "None is chosen: no student has a finite held-out loss yet." in chosen(family)
    with pytest.raises(UserError, match="no student has a finite figure yet"):
        chosen(family, "heldout")


def test_several_runs_are_compared_by_their_names(family: Path, tmp_path: Path, compare: Callable[..., str]) -> None:
    alone = make_run(tmp_path / "alone")
    (alone / "recipe.yaml").write_text((family / "students" / "deep" / "recipe.yaml").read_text())
    copied = tmp_path / "other" / "family"
    shutil.copytree(family, copied)
    printed = compare(alone, "--output", tmp_path / "page.html")
    assert "family/deep family/flat family/late alone" in printed
    assert (tmp_path / "page.html").is_file()
    assert not (family / "compare.html").exists()
    assert [student.name for student in read_all([family, copied])][::3] == [f"{family}/deep", f"{copied}/deep"]
    with pytest.raises(UserError, match="a run is named twice"):
        compare(family / "." / "")


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        main(["compare", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"recipe\.yaml is missing: .* is not a run directory"):
        main(["compare", str(tmp_path)])
