"""Which students of a family an attempt trains: names and steps on disk decide, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.training.groups import Group, choose_group
from tests.unit.printed import setting_in

STEPS = 10


def recipe(*names: str) -> Recipe:
    return Recipe(steps=STEPS, students={name: {} for name in names} or None)


def add(run_dir: Path, directory: str, step: int, *names: str, **state: Any) -> None:
    for name in names:
        path = run_dir / directory / f"step-{step:08d}" / name
        path.mkdir(parents=True)
        (path / "state.json").write_text(json.dumps(state))
        (path / "weight-00000-of-00001.safetensors").touch()
        (run_dir / "students" / name).mkdir(parents=True, exist_ok=True)


def test_a_family_begins(tmp_path: Path) -> None:
    assert choose_group(tmp_path, recipe("a", "b"), False) == Group(1, ["a", "b"], {}, [])
    assert choose_group(tmp_path, recipe(), False) == Group(1, [""], {}, [])


def test_a_family_continues_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    add(tmp_path, "checkpoints", 4, "a", "b", "c")
    assert choose_group(tmp_path, recipe("c", "a", "b"), False) == Group(1, ["c", "a", "b"], {}, [])
    with pytest.raises(UserError, match=r"at step 4 of 10 and trains b too.*--allow-change"):
        choose_group(tmp_path, recipe("c", "a"), False)
    assert choose_group(tmp_path, recipe("c", "a"), True) == Group(1, ["c", "a"], {}, ["b"])
    with pytest.raises(UserError, match=r"d, e would begin as many steps late.*without them first"):
        choose_group(tmp_path, recipe("a", "b", "c", "d", "e"), True)
    with pytest.raises(
        UserError, match=r"renamed would begin as many steps late"
    ):  # and not train from step 0 beside them
        choose_group(tmp_path, recipe("renamed"), True)
    (tmp_path / "checkpoints" / "step-00000004" / ".ipynb_checkpoints").mkdir()
    assert choose_group(tmp_path, recipe("c", "a", "b"), False).removed == []
    with pytest.raises(UserError, match=r"begun with the students a, b, c, and this recipe has no `students`"):
        choose_group(tmp_path, recipe(), True)


def test_a_student_is_added_to_a_finished_family(tmp_path: Path) -> None:
    add(tmp_path, "checkpoints", STEPS, "a", "b")
    first = str(tmp_path / "checkpoints" / "step-00000010")
    finished = {"a": f"{first}/a", "b": f"{first}/b"}
    assert choose_group(tmp_path, recipe("a", "b"), False) == Group(1, ["a", "b"], {}, [])
    assert choose_group(tmp_path, recipe("a"), False) == Group(1, ["a"], {}, [])
    assert choose_group(tmp_path, recipe("a", "c", "b"), False) == Group(2, ["c"], finished, [])
    (tmp_path / "checkpoints-2").mkdir()  # killed before its first checkpoint
    assert choose_group(tmp_path, recipe("a", "c", "b"), False) == Group(2, ["c"], finished, [])
    add(tmp_path, "checkpoints-2", 3, "c")
    assert choose_group(tmp_path, recipe("a", "c", "b"), False) == Group(2, ["c"], finished, [])
    assert choose_group(tmp_path, recipe("a", "b"), False) == Group(1, ["a", "b"], {}, [])
    with pytest.raises(UserError, match=r"d would begin as many steps late.*without it first"):
        choose_group(tmp_path, recipe("a", "c", "d"), False)
    add(tmp_path, "checkpoints-2", STEPS, "c")
    assert choose_group(tmp_path, recipe("c", "d"), False).number == 3
    longer = recipe("a", "b", "c")
    longer.steps = 20
    with pytest.raises(UserError, match=r"begun at different times.*a, b at step 10.*c at step 10") as error:
        choose_group(tmp_path, longer, False)
    longer.steps = int(setting_in(str(error.value), "steps=").removeprefix("steps="))
    choose_group(tmp_path, longer, False)


def test_a_family_in_which_every_student_has_ended_is_finished(tmp_path: Path) -> None:
    add(tmp_path, "checkpoints", 6, "a", "b", ended={"step": 4, "reason": "x"})
    assert choose_group(tmp_path, recipe("a", "b", "c"), False).number == 2
    (tmp_path / "checkpoints" / "step-00000006" / "b" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="as many steps late"):
        choose_group(tmp_path, recipe("a", "b", "c"), False)


@pytest.mark.parametrize("text", ["", "[", "[]", "3"])
def test_a_state_that_cannot_be_read_ends_no_student_of_a_family(tmp_path: Path, text: str) -> None:
    add(tmp_path, "checkpoints", 6, "a")
    (tmp_path / "checkpoints" / "step-00000006" / "a" / "state.json").write_text(text)
    assert choose_group(tmp_path, recipe("a"), False) == Group(1, ["a"], {}, [])


def test_a_run_with_one_student_is_no_family(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert choose_group(tmp_path, recipe(), False) == Group(1, [""], {}, [])
    with pytest.raises(UserError, match="begun with one student, without a name"):
        choose_group(tmp_path, recipe("a"), True)
