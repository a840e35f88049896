"""Which students a run directory has, and which one a command is about."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.runtime.run_paths import RunPaths, one_student, students_of


def test_files_of_one_student_of_a_family(tmp_path):
    alone, one, added = RunPaths(tmp_path), RunPaths(tmp_path, "small"), RunPaths(tmp_path, "late", group=2)
    assert one.metrics == tmp_path / "students" / "small" / "metrics.jsonl"
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
