"""A checkpoint of a family is valid with all its students or not at all, and each student is read from its own directory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.runtime import checkpoint
from pipeline.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointReader,
    kept_steps,
    newest_valid,
    prune,
    read_model_weights,
)
from pipeline.runtime.checkpoint_files import (
    KINDS,
    MANIFEST,
    UNTRAINED_FILE,
    checkpoint_path,
    checkpoints_of,
    commit,
    committed_steps,
    corruption,
    fsync_and_hash,
    manifest_text,
)
from pipeline.runtime.checkpoint_writer import write_untrained
from pipeline.runtime.evaluations import StopConfig, best_evaluation, reason_to_stop

STUDENTS = {"small": 1.0, "large-2": 2.0}


def write(
    directory: Path,
    step: int,
    students: dict[str, float] = STUDENTS,
    state: Mapping[str, object] = MappingProxyType({}),
) -> Path:
    """A checkpoint of one parameter per student, committed by the product's own code."""
    partial = directory / f"step-{step:08d}.tmp"
    for student, value in students.items():
        (partial / student).mkdir(parents=True)
        for kind in KINDS:
            name = f"{kind}-00000-of-00001.safetensors"
            save_file({"weight:0": torch.full((6,), value + step)}, partial / student / name)
        save_file({"tail": torch.full((3,), value)}, partial / student / UNTRAINED_FILE)
        content = {"step": step, "parameters": {"weight": [2, 3]}, **state}
        (partial / student / "state.json").write_text(json.dumps(content))
    paths = [path for path in partial.rglob("*") if path.is_file()]
    commit(
        partial, checkpoint_path(directory, step), {p.relative_to(partial).as_posix(): fsync_and_hash(p) for p in paths}
    )
    return checkpoint_path(directory, step)


def test_each_student_of_a_family_is_read_from_its_directory(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 7)
    assert newest_valid(tmp_path) == (checkpoint, [])
    for student, value in STUDENTS.items():
        reader = CheckpointReader(checkpoint, student)
        assert reader.read("exp_avg", "weight", 1, 2).tolist() == [value + 7] * 2
        assert reader.untrained()["tail"].tolist() == [value] * 3
    for student in ("", "medium", "../step-00000007/small"):
        with pytest.raises(UserError, match=r"it has (large-2, small|small, large-2)"):
            CheckpointReader(checkpoint, student)


def rewrite_manifest(checkpoint: Path, change: Callable[[dict], None]) -> None:
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    change(files)
    (checkpoint / MANIFEST).write_text(manifest_text(files))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a student's directory is missing": (lambda c: shutil.rmtree(c / "small"), "is missing"),
    "a student's file is missing": (lambda c: (c / "small" / "state.json").unlink(), "state.json is missing"),
    "a student is not listed": (lambda c: shutil.copytree(c / "small", c / "third"), "third/.* is not in the manifest"),
    "a student's file is not listed": (
        lambda c: shutil.copy(c / "small" / UNTRAINED_FILE, c / "small" / "carried.safetensors"),
        "small/carried.safetensors is not in the manifest",
    ),
    "files of two students are swapped": (
        lambda c: ((c / "small").rename(c / "x"), (c / "large-2").rename(c / "small"), (c / "x").rename(c / "large-2")),
        "does not have the sha256|bytes",
    ),
    "a flipped bit": (lambda c: flip(c / "large-2" / "weight-00000-of-00001.safetensors"), "does not have the sha256"),
    "files of one student besides": (
        lambda c: rewrite_manifest(c, lambda files: files.update({"state.json": files["small/state.json"]})),
        "files of a run with one student and of one with several",
    ),
    "a manifest without a student's state": (
        lambda c: rewrite_manifest(c, lambda files: files.pop("small/state.json")),
        "does not list just the files",
    ),
    "a name outside": (
        lambda c: rewrite_manifest(c, lambda files: files.update({"../small/state.json": files["small/state.json"]})),
        "which no checkpoint has",
    ),
    "an empty manifest": (lambda c: rewrite_manifest(c, lambda files: files.clear()), "does not list just the files"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_a_corrupt_checkpoint_of_a_family_is_passed_over(tmp_path: Path, change: str) -> None:
    older, newer = write(tmp_path, 100), write(tmp_path, 200)
    act, message = CHANGES[change]
    act(newer)
    found, (problem,) = newest_valid(tmp_path)
    assert found == older
    assert re.search(message, problem), problem


def test_a_state_of_another_step_in_one_student_of_a_family(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 200, state={"step": 100})
    assert corruption(checkpoint) in (
        "small/state.json belongs to another step",
        "large-2/state.json belongs to another step",
    )


def test_untrained_weights_of_a_family_are_linked_per_student(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write(tmp_path, step)
    partial = tmp_path / "step-00000400.x.tmp"
    for student, value in STUDENTS.items():
        (partial / student).mkdir(parents=True)
        tail = {"tail": torch.full((3,), value)}
        entry = write_untrained(partial, 400, tail, CheckpointConfig(keep=2), student)
        linked = partial / student / UNTRAINED_FILE
        assert entry == fsync_and_hash(linked)
        assert linked.samefile(tmp_path / "step-00000200" / student / UNTRAINED_FILE)


def test_the_best_step_of_a_family_is_kept(tmp_path: Path) -> None:
    for step in range(100, 700, 100):
        write(tmp_path, step)
    prune(tmp_path, CheckpointConfig(keep=2), 600, best={200, 300})
    assert committed_steps(tmp_path) == [200, 300, 500, 600]


def test_a_step_of_a_family_is_read_by_number_and_as_the_best(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    evaluations = [[1, 0.5], [2, 0.3], [3, 0.3], [4, float("nan")]]
    for step in (2, 3, 5):
        write(directory, step, state={"evaluations": evaluations[:step]})
    assert read_model_weights(tmp_path, "small")[0]["weight"].tolist() == [[6.0] * 3] * 2
    assert read_model_weights(tmp_path, "large-2", 2)[0]["weight"].tolist() == [[4.0] * 3] * 2
    assert read_model_weights(tmp_path, "small", "best")[1]["step"] == 3  # the later one of equal losses
    with pytest.raises(
        UserError, match=r"the checkpoint of step 4 was not kept in .* it has the steps 2, 3, 5\. Name one"
    ):
        read_model_weights(tmp_path, "small", 4)
    shutil.rmtree(directory / "step-00000003")
    with pytest.raises(UserError, match=r"best held-out loss, 0\.3000 at step 3, was not kept.*keep_best: heldout"):
        read_model_weights(tmp_path, "small", "best")
    flip(directory / "step-00000002" / "large-2" / "state.json")
    with pytest.raises(UserError, match="step-00000002 is not valid"):
        read_model_weights(tmp_path, "small", 2)
    write(tmp_path / "other" / "checkpoints", 1)
    with pytest.raises(UserError, match="knows no held-out evaluation"):
        read_model_weights(tmp_path / "other", "small", "best")


@pytest.mark.parametrize(
    ("state", "key"),
    [
        *(({"evaluations": found}, "evaluations") for found in (None, {}, 3, [1], [[1, "x"]], [[1]], [[1, 0.5, 2]])),
        *(({"evaluations": [[step, 0.5]]}, "evaluations") for step in (-1, 1.0, True, None, "1")),
        *(({"evaluations": [[2, loss]]}, "evaluations") for loss in (None, True, [], 10**400)),
        *(({"ended": found}, "ended") for found in ({}, [], 0, "", "late", {"step": 3}, {"reason": "x"})),
        *(({"ended": {"step": step, "reason": "x"}}, "ended") for step in (-1, 1.0, True, None)),
        ({"ended": {"step": 3, "reason": None}}, "ended"),
    ],
)
def test_evaluations_and_end_of_another_kind_are_corrupt(tmp_path: Path, state: dict[str, object], key: str) -> None:
    """All hashes are right, as in a file that another program wrote."""
    write(tmp_path, 3)
    assert f"state.json is not one of this code: `{key}`" in str(corruption(write(tmp_path, 7, state=state)))
    assert newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 3)


def test_evaluations_and_end_of_this_code_are_valid(tmp_path: Path) -> None:
    """Losses that are no numbers too; and `null` and nothing at all, as in checkpoints of earlier versions."""
    evaluations = [[1, 0.5], [2, float("nan")], [3, float("inf")]]
    states: list[dict[str, object]] = [{}, {"evaluations": [], "ended": None}]
    states += [{"evaluations": evaluations, "ended": {"step": 3, "reason": "no lower loss"}}]
    for step, state in enumerate(states):
        assert corruption(write(tmp_path, step, state=state)) is None


@pytest.mark.parametrize(("config", "others", "milestones"), [
    (CheckpointConfig(keep=3), 3, 0), (CheckpointConfig(keep=2, keep_every=5), 2, 4),
    (CheckpointConfig(keep=2, keep_every=5, keep_best="heldout"), 5, 4),
])  # fmt: skip
def test_the_number_of_kept_checkpoints(config: CheckpointConfig, others: int, milestones: int) -> None:
    """Three students with different best steps, none of which is kept for another reason."""
    kept = {*kept_steps(list(range(1, 25)), config), *([1, 2, 3] if config.keep_best else [])}
    assert (config.num_newest_and_best(3), config.num_milestones(24)) == (others, milestones)
    assert len(kept) == others + milestones


@pytest.mark.parametrize(
    ("step", "verified"), [(None, [3]), (3, [3]), (2, [2]), ("best", [3, 2]), ("last is best", [3])]
)
def test_no_checkpoint_of_a_family_is_hashed_in_vain(
    tmp_path: Path, step: int | str | None, verified: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"last is best": 3}.get(str(step), 2)
    for saved in (1, 2, 3):
        write(
            tmp_path / "checkpoints",
            saved,
            state={"evaluations": [[saved, float(abs(saved - best))] for saved in (1, 2, 3)]},
        )
    found: list[int] = []
    monkeypatch.setattr(checkpoint, "corruption", lambda path: found.append(int(path.name[-8:])) or corruption(path))
    which = "best" if isinstance(step, str) else step
    assert checkpoint.read_model_weights(tmp_path, "small", which)[1]["step"] == verified[-1]
    assert found == verified


def test_students_added_to_a_finished_family_have_checkpoints_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 9)
    write(tmp_path / "checkpoints-2", 3, {"late": 5.0})
    write(tmp_path / "checkpoints-x", 3, {"small": 5.0})
    (tmp_path / "checkpoints-3").mkdir()
    assert checkpoints_of(tmp_path, "late").name == "checkpoints-2"
    assert checkpoints_of(tmp_path, "small").name == "checkpoints"
    assert checkpoints_of(tmp_path, "unknown").name == "checkpoints"
    assert read_model_weights(tmp_path, "late")[1]["step"] == 3


NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "best", "stops_after"),
    [
        ([], None, None),
        ([3.0], 1, None),
        ([3.0, 2.0, 1.0, 0.5], 4, None),
        ([3.0, 2.0, 2.5, 2.1, 1.0], 5, 4),  # it would have become better
        ([3.0, 2.0, 2.0], 3, None),
        ([3.0, 2.0, 2.0, 2.0], 4, 4),  # equal is no better, and the best is the latest of equal ones
        ([NAN, NAN, NAN], None, 3),
        ([NAN, 1.0, NAN, NAN], 2, 4),
        ([1.0, float("inf"), 2.0], 1, 3),
    ],
)
def test_best_and_last_evaluation_of_a_student(losses: list[float], best: int | None, stops_after: int | None) -> None:
    evaluations = [(number, loss) for number, loss in enumerate(losses, start=1)]
    found = best_evaluation(evaluations)
    assert (found and found[0]) == best
    stops = [n for n in range(1, len(losses) + 1) if reason_to_stop(evaluations[:n], StopConfig(no_better_for=2))]
    assert (stops[0] if stops else None) == stops_after
    assert reason_to_stop(evaluations, StopConfig()) is None
