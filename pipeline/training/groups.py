"""Which students of a recipe an attempt trains, and where their checkpoints are.

In: a run directory and a recipe. Out: a `Group`. Students that are begun together are one group, with one directory of
checkpoints, and all of them are at the same step. Students that are added to a finished run are the next group: they are
trained from step 0, as they would be alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.runtime.checkpoint_files import (
    MANIFEST,
    checkpoint_path,
    committed_steps,
    later_groups,
    names_by_student,
    read_text,
    readable_state,
)
from pipeline.runtime.run_paths import RunPaths, students_of


@dataclass(frozen=True)
class Group:
    """The students that an attempt trains. `number` is that of `RunPaths.group`.

    `finished` are the recipe's other students, which have all their steps: name -> the directory with its `state.json`.
    `removed` are students of this group that the recipe no longer has.
    """

    number: int
    students: list[str]
    finished: dict[str, str]
    removed: list[str]


@dataclass(frozen=True)
class _Found:
    """The newest checkpoint of a group on disk."""

    number: int
    directory: Path
    step: int
    students: list[str]
    ended: bool  # every student has ended before its last step

    def is_finished(self, steps: int) -> bool:
        return self.step >= steps or self.ended


def choose_group(run_dir: Path, recipe: Recipe, allow_change: bool) -> Group:
    """The group that an attempt trains. Reads names and states, and verifies nothing: the resume does.

    Raises:
        UserError: the directory was begun with one student and the recipe has several, or the reverse; students were added
            to or, without `allow_change`, removed from a run that is not finished
    """
    names = list(recipe.members())
    _check_kind(run_dir, recipe)
    if recipe.students is None:
        return Group(1, names, {}, [])
    found = [group for number in (1, *later_groups(run_dir)) if (group := _newest(run_dir, number)) is not None]
    group_of = {name: group for group in found for name in group.students if name in names}
    new = [name for name in names if name not in group_of]
    unfinished = [group for group in found if not group.is_finished(recipe.steps)]
    if not new:
        unfinished = [group for group in unfinished if set(group.students) & set(names)]
    _check_groups(run_dir, recipe.steps, new, unfinished)
    finished = {name: str(g.directory / name) for name, g in group_of.items() if g.is_finished(recipe.steps)}
    if new:
        return Group(1 + max((group.number for group in found), default=0), new, finished, [])
    chosen = unfinished[0] if unfinished else group_of[names[0]]
    removed = [name for name in chosen.students if name not in names] if unfinished else []
    if removed and not allow_change:
        raise UserError(
            f"{run_dir} is at step {chosen.step} of {recipe.steps} and trains {', '.join(removed)} too, which the recipe no "
            "longer has. Put it back, choose another --run-dir, or add --allow-change to continue without it (the next "
            "checkpoints do not contain it)"
        )
    students = [name for name in names if name in chosen.students]
    return Group(chosen.number, students, {n: p for n, p in finished.items() if n not in students}, removed)


def _check_kind(run_dir: Path, recipe: Recipe) -> None:
    names, is_single = students_of(run_dir), RunPaths(run_dir).description.is_file()
    if recipe.students is None and names:
        raise UserError(
            f"{run_dir} was begun with the students {', '.join(names)}, and this recipe has no `students`. Put them back, or "
            "choose another --run-dir"
        )
    if recipe.students is not None and is_single:
        raise UserError(
            f"{run_dir} was begun with one student, without a name, and this recipe has `students`. Choose another --run-dir"
        )


def _check_groups(run_dir: Path, steps: int, new: Sequence[str], unfinished: Sequence[_Found]) -> None:
    if new and unfinished:
        raise UserError(
            f"{run_dir} is at step {unfinished[0].step} of {steps}, and {', '.join(new)} would begin as many steps late. Train "
            f"without {'it' if len(new) == 1 else 'them'} first and add {'it' if len(new) == 1 else 'them'} when the run is "
            "finished, or choose another --run-dir"
        )
    if len(unfinished) > 1:
        groups = "; ".join(f"{', '.join(g.students)} at step {g.step} in {g.directory.parent}" for g in unfinished)
        raise UserError(
            f"{run_dir} has students that were begun at different times and are not finished at step {steps}: {groups}. "
            f"Set steps back ({shlex.join(['--set', f'steps={max(g.step for g in unfinished)}'])}), or take those of one group"
        )


def _newest(run_dir: Path, number: int) -> _Found | None:
    directory = RunPaths(run_dir, group=number).checkpoints
    steps = committed_steps(directory)
    if not steps:
        return None
    checkpoint = checkpoint_path(directory, steps[-1])
    students = _students_of(checkpoint)
    ended = bool(students) and all(readable_state(checkpoint / student).get("ended") for student in students)
    return _Found(number, checkpoint, steps[-1], students, ended)


def _students_of(checkpoint: Path) -> list[str]:
    """Names in the manifest; where that cannot be read, which the resume reports, of directories with tensors."""
    try:
        names = names_by_student(json.loads(read_text(checkpoint / MANIFEST))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        names = {path.parent.name: [] for path in checkpoint.glob("*/*.safetensors")}
    return sorted(filter(None, names))
