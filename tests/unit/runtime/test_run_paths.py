"""Which students a run directory has, and which one a command is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.runtime.run_paths import RunPaths, is_run_directory, one_student, students_of
from pipeline.training.student_start import read_start
from tests.unit.made_up_run import make_family, make_run


def test_files_of_one_student_of_a_family(tmp_path):
    alone, one, added = RunPaths(tmp_path), RunPaths(tmp_path, "small"), RunPaths(tmp_path, "late", group=2)
    assert one.metrics == tmp_path / "students" / "small" / "metrics.jsonl"
    assert (one.files, alone.files) == (tmp_path / "students" / "small", tmp_path)
    assert one.tensorboard == tmp_path / "tensorboard" / "small"
    assert one.checkpoints == alone.checkpoints == tmp_path / "checkpoints"
    assert added.checkpoints == tmp_path / "checkpoints-2"
    assert one.done == alone.done
    assert one.log(0) == alone.log(0)


@pytest.mark.parametrize("recipe", [None, "students: {b: {}, c: {}, a: {}}", "students: 3", "{", "[]", ""])
def test_students_of_a_family_are_in_the_order_of_its_recipe(tmp_path, recipe):
    assert students_of(tmp_path) == []
    for name in ("a", "b", "c", "removed"):
        (tmp_path / "students" / name).mkdir(parents=True)
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    names = ["b", "c", "a", "removed"] if recipe and "{b" in recipe else ["a", "b", "c", "removed"]
    assert students_of(tmp_path) == names


def test_a_command_about_one_student_of_a_family_needs_its_name(tmp_path):
    assert one_student(tmp_path, None) == ""
    with pytest.raises(UserError, match=r"has one student, without a name, and none called x\. Leave --student out"):
        one_student(tmp_path, "x")
    for name in ("small", "large"):
        (tmp_path / "students" / name).mkdir(parents=True)
    assert one_student(tmp_path, "small") == "small"
    with pytest.raises(UserError, match=r"has the students large, small\. Add --student large"):
        one_student(tmp_path, None)
    with pytest.raises(UserError, match=r"and none called \.\./small"):
        one_student(tmp_path, "../small")


@pytest.mark.parametrize(
    "words",
    [
        "export NAME --output OUT",
        "evaluate NAME --tasks speed --output OUT",
        "report NAME",
        "compare NAME",
        "card EXPORT NAME",
    ],
)
def test_the_directory_of_a_student_is_no_run_directory(tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch):
    run_dir = make_family(tmp_path / "run")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "lineage.json").write_text("{}")
    message = f"deep is a student of the run {run_dir}, and no run directory. Name {run_dir} --student deep; "
    places = {"OUT": str(tmp_path / "out"), "EXPORT": str(tmp_path / "export")}
    monkeypatch.chdir(run_dir)
    for name in (run_dir / "students" / "deep", Path("students/deep")):
        with pytest.raises(UserError) as caught:
            main([{**places, "NAME": str(name)}.get(word, word) for word in words.split()])
        assert message in str(caught.value)
        with pytest.raises(UserError) as caught:
            read_start(str(name))
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_in_a_directory_called_students_is_one(tmp_path: Path):
    assert is_run_directory(make_run(tmp_path / "students" / "ours"))
