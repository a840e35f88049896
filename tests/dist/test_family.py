"""Students trained together end as they do alone, bit for bit: weights, moments, losses, loss scales, held-out losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.config import load_recipe
from pipeline.errors import EXIT_DIVERGED, EXIT_USER
from pipeline.runtime.checkpoint import read_model_weights
from pipeline.runtime.checkpoint_files import committed_steps
from pipeline.runtime.run_paths import RunPaths, students_of
from tests.dist.family import DEEP, PAIRS, SETTINGS, STUDENTS, WILD, Family, overrides_of, state_of
from tests.faults.sweeps.lab import Lab, logged_values

COMBINATIONS = [
    (1, "fp32", 1), (2, "bf16", 2), (3, "fp16", 1), (2, "fp16", 2), (3, "fp32", 2), (1, "fp16", 2), (3, "bf16", 1),
]  # fmt: skip
DEVICE_WITH_FP16 = [{"kind": "fp16"}]


@pytest.fixture
def family(lab: Lab) -> Family:
    return Family(lab.directory, lab.server, lab.recipe)


def check_equal_to_alone(family: Family, run_dir: Path, name: str, alone: Path, group: int = 1) -> None:
    assert state_of(run_dir, name, group) == state_of(alone), name
    assert logged_values(RunPaths(run_dir, name).files) == logged_values(alone), name


@pytest.mark.parametrize(("stage", "precision", "ranks"), COMBINATIONS)
def test_a_family_is_trained_as_each_student_alone(stage: int, precision: str, ranks: int, family: Family) -> None:
    """With dropout and two micro-batches per step and rank."""
    family.precision = precision
    settings = {**SETTINGS, "micro_batch_per_gpu": 4 // ranks}
    if (stage, precision) == (3, "bf16"):
        settings |= {"teacher_options.placement": "zero3", "documents": "separate"}
    device = DEVICE_WITH_FP16 if precision == "fp16" else []
    run_dir = family.together(ranks, settings, stage, device)
    assert students_of(run_dir) == list(STUDENTS)
    for name in STUDENTS:
        check_equal_to_alone(family, run_dir, name, family.alone(name, ranks, settings, stage, device))
    if precision == "fp16":
        assert 0 < state_of(run_dir, "deep")["skipped_steps"] < SETTINGS["steps"]
    assert not (run_dir / "metrics.jsonl").exists()
    assert {path.name for path in run_dir.iterdir()} <= {path.name for path in named_paths(run_dir)}


def named_paths(run_dir: Path) -> list[Path]:
    paths = RunPaths(run_dir)
    return [*(path for path in vars(paths).values() if isinstance(path, Path)), paths.restarts, run_dir / "students"]


def test_a_nan_in_one_student_of_a_family_skips_no_step_of_the_others(family: Family) -> None:
    fault = {"kind": "nan", "steps": [2, 3], "rank": 1, "student": "deep"}
    run_dir = family.together(2, SETTINGS, 2, [fault])
    alone = family.alone("deep", 2, SETTINGS, 2, [{**fault, "student": ""}])
    check_equal_to_alone(family, run_dir, "deep", alone)
    assert state_of(run_dir, "deep")["skipped_steps"] == 2
    for name in ("wide", "pairs"):
        check_equal_to_alone(family, run_dir, name, family.alone(name, 2, SETTINGS))


def test_a_spike_in_one_student_of_a_family_is_skipped_by_this_student(family: Family) -> None:
    """Its rows are in this student's file; the others know nothing of it."""
    settings = {**SETTINGS, "guard.spikes": "skip", "guard.spike_window": 20, "guard.spike_sigmas": 10}
    fault = {"kind": "spike", "steps": [4], "student": "wide"}
    run_dir = family.together(1, settings, 2, [fault])
    alone = family.alone("wide", 1, settings, 2, [{**fault, "student": ""}])
    check_equal_to_alone(family, run_dir, "wide", alone)
    assert state_of(run_dir, "wide")["skipped_steps"] == 1
    (entry,) = [json.loads(line) for line in RunPaths(run_dir, "wide").spikes.read_text().splitlines()]
    assert (entry["step"], entry["skipped"]) == (4, True)
    for name in ("deep", "pairs"):
        assert not RunPaths(run_dir, name).spikes.exists()
        check_equal_to_alone(family, run_dir, name, family.alone(name, 1, settings))


@pytest.mark.parametrize(("stage", "precision", "ranks"), [(2, "fp32", 1), (3, "fp16", 2)])
def test_a_family_that_is_stopped_and_killed_ends_as_each_student_alone(
    stage: int, precision: str, ranks: int, family: Family
) -> None:
    family.precision = precision
    device = DEVICE_WITH_FP16 if precision == "fp16" else []
    run_dir = family.fresh("interrupted")
    settings = {"students": STUDENTS, **SETTINGS}
    stop = {"kind": "signal", "signal": "SIGUSR1", "step": 1, "student": "wide"}
    kill = {"kind": "signal", "signal": "SIGKILL", "step": 4, "student": "pairs", "micro": 1}
    assert family.run(run_dir, ranks, settings, stage, [*device, stop]) == 0
    assert committed_steps(run_dir / "checkpoints") == [2]
    assert (run_dir / "PREEMPTED").exists()
    assert family.run(run_dir, ranks, settings, stage, [*device, kill]) != 0
    assert committed_steps(run_dir / "checkpoints") == [2, 3]
    assert family.run(run_dir, ranks, settings, stage, device) == 0
    for name in STUDENTS:
        check_equal_to_alone(family, run_dir, name, family.alone(name, ranks, SETTINGS, stage, device))


def test_a_student_is_added_to_and_removed_from_a_finished_family(family: Family) -> None:
    two = {name: STUDENTS[name] for name in ("deep", "wide")}
    run_dir = family.fresh("added")
    assert family.run(run_dir, 1, {"students": two, **SETTINGS}) == 0
    before = {name: state_of(run_dir, name) for name in two}
    stop = {"kind": "signal", "signal": "SIGUSR1", "step": 3}
    assert family.run(run_dir, 1, {"students": STUDENTS, **SETTINGS}, 2, [stop]) == 0
    assert committed_steps(run_dir / "checkpoints-2") == [3, 4]
    assert family.run(run_dir, 1, {"students": STUDENTS, **SETTINGS}) == 0
    assert "already has its 6 steps" not in run_dir.with_suffix(".log").read_text()
    check_equal_to_alone(family, run_dir, "pairs", family.alone("pairs", 1, SETTINGS), group=2)
    for name in two:
        assert state_of(run_dir, name) == before[name]
        check_equal_to_alone(family, run_dir, name, family.alone(name, 1, SETTINGS))
    assert students_of(run_dir) == list(STUDENTS)
    removed = {"students": {"pairs": PAIRS}, **SETTINGS}
    assert family.run(run_dir, 1, removed) == 0
    assert "already has its 6 steps" in run_dir.with_suffix(".log").read_text()
    assert {name: read_model_weights(run_dir, name)[1]["step"] for name in STUDENTS} == dict.fromkeys(STUDENTS, 6)
    changed = {"students": {**STUDENTS, "deep": {**DEEP, "optimizer": {"lr": 2e-3}}, "new": {}}, **SETTINGS}
    assert family.run(run_dir, 1, changed) == EXIT_USER  # a finished student with another rate
    assert "student deep, was begun with another recipe" in run_dir.with_suffix(".log").read_text()


def test_a_family_in_progress_rejects_more_students_and_loses_one_only_on_request(family: Family) -> None:
    run_dir = family.fresh("progress")
    stop = {"kind": "signal", "signal": "SIGUSR1", "step": 2}
    assert family.run(run_dir, 1, {"students": STUDENTS, **SETTINGS}, 2, [stop]) == 0
    log = run_dir.with_suffix(".log")
    assert family.run(run_dir, 1, {"students": {**STUDENTS, "late": {}}, **SETTINGS}) == EXIT_USER
    assert "late would begin as many steps late" in log.read_text()
    assert family.run(run_dir, 1, SETTINGS) == EXIT_USER
    assert "begun with the students deep, wide, pairs, and this recipe has no `students`" in log.read_text()
    two = {"students": {name: STUDENTS[name] for name in ("deep", "pairs")}, **SETTINGS}
    assert family.run(run_dir, 1, two) == EXIT_USER
    assert "trains wide too, which the recipe no longer has" in log.read_text()
    words = [*family.arguments(2, two), "--run-dir", str(run_dir), "--allow-change"]
    assert family.server.start(1, words, log).wait(240) == 0
    for name in ("deep", "pairs"):
        check_equal_to_alone(family, run_dir, name, family.alone(name, 1, SETTINGS))


def test_a_family_and_a_run_with_one_student_do_not_share_a_directory(family: Family) -> None:
    run_dir = shutil.copytree(family.alone("deep", 1, SETTINGS), family.fresh("single"))
    assert family.run(run_dir, 1, {"students": STUDENTS, **SETTINGS}) == EXIT_USER
    assert "begun with one student, without a name" in run_dir.with_suffix(".log").read_text()


def test_one_checkpoint_of_a_family_is_committed_or_none(family: Family) -> None:
    """A kill while the second student's files are written leaves no checkpoint of that step for any student."""
    run_dir = family.fresh("killed")
    settings = {"students": STUDENTS, **SETTINGS, "checkpoint.keep": 3}
    kill = {"kind": "at call", "save": 6, "operation": "fsync", "call": 7}
    assert family.run(run_dir, 1, settings, 2, [kill]) != 0
    assert committed_steps(run_dir / "checkpoints") == [3]
    assert family.run(run_dir, 1, settings) == 0
    for name in STUDENTS:
        check_equal_to_alone(family, run_dir, name, family.alone(name, 1, {**SETTINGS, "checkpoint.keep": 3}))
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_a_family_trains_on_when_one_student_diverges(family: Family) -> None:
    """The diverged student ends, which a resume knows: it is not trained again. Where it is the only one the run ends."""
    nan = {"kind": "nan", "steps": list(range(6)), "student": "deep"}
    settings = {**SETTINGS, "guard.max_bad_steps": 2}
    run_dir = family.together(1, settings, 2, [nan])
    ended = state_of(run_dir, "deep")["ended"]
    assert ended["step"] == 2
    assert "2 steps in a row were not finite" in ended["reason"]
    assert "deep after step 2: diverged" in (run_dir / "DONE").read_text()
    resumed = family.fresh("resumed")
    stop = {"kind": "signal", "signal": "SIGUSR1", "step": 3, "student": "wide"}
    assert family.run(resumed, 1, {"students": STUDENTS, **settings}, 2, [nan, stop]) == 0
    assert family.run(resumed, 1, {"students": STUDENTS, **settings}) == 0  # its steps would be finite now
    ours, theirs = state_of(resumed, "deep"), state_of(run_dir, "deep")
    assert ours.pop("ended")["step"] == theirs.pop("ended")["step"] == 2  # the reason names a file of each run
    assert ours == theirs
    for name in ("wide", "pairs"):
        for directory in (run_dir, resumed):
            check_equal_to_alone(family, directory, name, family.alone(name, 1, settings))
    only = family.fresh("only")
    assert family.run(only, 1, {"students": {"deep": DEEP}, **settings}, 2, [nan]) == EXIT_DIVERGED


def test_weights_that_are_not_finite_end_the_run_of_the_family(family: Family) -> None:
    """No gradient makes them so: a fault of the machine. The error names the student, and older checkpoints stay."""
    broken = {"kind": "broken weights", "step": 4}
    run_dir = family.fresh("broken")
    assert family.run(run_dir, 1, {"students": STUDENTS, **SETTINGS}, 2, [broken]) == EXIT_DIVERGED
    assert "the weights of deep: " in run_dir.with_suffix(".log").read_text()
    assert committed_steps(run_dir / "checkpoints") == [3]


def test_the_best_checkpoint_of_a_family_is_kept_and_exported_by_name(family: Family) -> None:
    """One student is best early, the other at the end; alone the first keeps the same checkpoint."""
    settings = {"steps": 12, "eval_every": 2, "save_every": 12, "checkpoint.keep": 1, "checkpoint.keep_best": "heldout"}
    run_dir = family.fresh("best")
    assert family.run(run_dir, 1, {"students": {"wild": WILD, "calm": PAIRS}, **settings}) == 0
    alone = family.untouched(1, {**settings, **overrides_of(WILD)})
    best = {}
    for directory, name in ((run_dir, "wild"), (run_dir, "calm"), (alone, "")):
        step = -min((loss, -step) for step, loss in state_of(directory, name)["evaluations"])[1]
        assert read_model_weights(directory, name, "best")[1]["step"] == step
        best[directory, name] = step
    assert best[run_dir, "wild"] == best[alone, ""] < 12
    assert set(committed_steps(run_dir / "checkpoints")) == {best[run_dir, "wild"], best[run_dir, "calm"], 12}
    assert committed_steps(alone / "checkpoints") == [best[alone, ""], 12]


def test_the_last_evaluation_is_saved_also_where_a_stop_request_falls_in_the_last_step(family: Family) -> None:
    run_dir = family.fresh("last")
    stop = {"kind": "signal", "signal": "SIGUSR1", "step": 5}
    assert family.run(run_dir, 1, {**SETTINGS, "checkpoint.keep_best": "heldout"}, 2, [stop]) == 0
    assert (run_dir / "DONE").exists()
    assert [step for step, _ in state_of(run_dir)["evaluations"]] == [3, 6]


def test_a_family_stops_each_student_that_no_longer_gets_better(family: Family) -> None:
    """Early stopping ends a student as it does alone; the others are trained to the end."""
    settings = {
        "steps": 12,
        "eval_every": 1,
        "save_every": 4,
        "stop_when.no_better_for": 3,
        "relations.backend": "chunked",
    }
    run_dir = family.fresh("early")
    assert family.run(run_dir, 1, {"students": {"wild": WILD, "calm": PAIRS}, **settings}) == 0
    alone = family.untouched(1, {**settings, **overrides_of(WILD)})
    ours, theirs = state_of(run_dir, "wild"), state_of(alone)
    assert ours.pop("step") == 12
    assert theirs.pop("step") == theirs["ended"]["step"] < 12
    assert ours == theirs
    done = (alone / "DONE").read_text()
    assert done.startswith(f"done: {theirs['ended']['step']} steps; ended after step ")
    assert "no lower held-out loss in 3 evaluations" in done
    assert state_of(run_dir, "calm")["ended"] is None
    assert logged_values(run_dir / "students" / "wild") == logged_values(alone)


def test_a_run_that_has_stopped_early_stays_so_until_its_recipe_changes(family: Family) -> None:
    """However often it is started, which is no crash. With more patience it continues, as if it had had that patience."""
    settings = {"steps": 12, "eval_every": 1, "save_every": 4, "relations.backend": "chunked", **overrides_of(WILD)}
    run_dir = family.fresh("stopped")
    patient, impatient = {"stop_when.no_better_for": 6}, {"stop_when.no_better_for": 2}
    assert family.run(run_dir, 1, {**settings, **impatient}) == 0
    stopped = state_of(run_dir)
    for _ in range(4):  # after three crashes in a row an older checkpoint would be taken
        assert family.run(run_dir, 1, {**settings, **impatient}) == 0
        assert f"is done: {stopped['step']} steps; ended after step" in run_dir.with_suffix(".log").read_text()
    assert state_of(run_dir) == stopped
    assert family.run(run_dir, 1, {**settings, **patient}) == 0
    longer = family.untouched(1, {**settings, **patient})
    assert state_of(longer)["step"] > stopped["step"]
    assert state_of(run_dir) == state_of(longer)


def test_an_early_stop_that_was_found_after_a_stop_request_is_saved(family: Family) -> None:
    """The evaluation is left to the next start, which ends the student; more students may then be added."""
    settings = {"steps": 12, "eval_every": 1, "save_every": 12, "relations.backend": "chunked"}
    early = {**settings, "stop_when.no_better_for": 2}
    at = state_of(family.untouched(1, {**early, **overrides_of(WILD)}))["ended"]["step"]
    run_dir = family.fresh("left")
    stop = {"kind": "signal", "signal": "SIGUSR1", "step": at - 1}
    assert family.run(run_dir, 1, {"students": {"wild": WILD}, **early}, 2, [stop]) == 0
    assert (run_dir / "PREEMPTED").exists()
    assert family.run(run_dir, 1, {"students": {"wild": WILD}, **early}) == 0
    assert (run_dir / "DONE").exists()
    assert state_of(run_dir, "wild")["ended"]["step"] == at
    assert family.run(run_dir, 1, {"students": {"wild": WILD, "late": PAIRS}, **early}) == 0
    assert state_of(run_dir, "late", group=2)["step"] == 12


def test_a_dry_run_of_a_family_describes_each_student_and_leaves_nothing(family: Family) -> None:
    run_dir = family.fresh("dry")
    words = [*family.arguments(2, {"students": STUDENTS, **SETTINGS}), "--run-dir", str(run_dir), "--dry-run"]
    log = run_dir.with_suffix(".log")
    assert family.server.start(2, words, log).wait(240) == 0
    lines = log.read_text().splitlines()
    for name, layers in (("deep", "3 layers x 24"), ("wide", "2 layers x 48"), ("pairs", "2 layers x 12")):
        assert any(line.strip().startswith(f"student {name} ") and layers in line for line in lines), name
        assert any(line.strip().startswith(f"loss {name} ") and "gradient norm" in line for line in lines), name
    assert sum(line.strip().startswith("batch ") for line in lines) == 1
    assert not run_dir.exists()


def test_a_student_is_added_beside_one_that_started_from_an_encoder(family: Family) -> None:
    """The finished student's encoder is its own; and its checkpoint is verified before anything is trained beside it."""
    teacher = load_recipe(family.recipe, []).teacher
    copy = {"student": {"layers": 4, "hidden": 48, "heads": 4, "ffn": 96, "init": teacher}}
    run_dir = family.fresh("encoder")
    assert family.run(run_dir, 1, {"students": {"copy": copy, "deep": DEEP}, **SETTINGS}) == 0
    three = {"copy": copy, "deep": DEEP, "pairs": PAIRS}
    assert family.run(run_dir, 1, {"students": three, **SETTINGS}) == 0
    check_equal_to_alone(family, run_dir, "pairs", family.alone("pairs", 1, SETTINGS), group=2)
    assert family.run(run_dir, 1, {"students": three, **SETTINGS}) == 0
    state = run_dir / "checkpoints" / "step-00000006" / "copy" / "state.json"
    state.write_text(state.read_text()[:-1])
    assert family.run(run_dir, 1, {"students": {**three, "late": {}}, **SETTINGS}) == EXIT_USER
    log = run_dir.with_suffix(".log").read_text()
    assert "student copy is finished, but its last checkpoint is not valid" in log
    assert "Traceback" not in log
    assert not (run_dir / "students" / "late").exists()


def test_a_student_of_a_family_that_cannot_be_trained_is_named_before_anything_is_written(family: Family) -> None:
    run_dir = family.fresh("rejected")
    narrow = {"student": {"layers": 2, "hidden": 24, "heads": 4}, "relations": {"tail": "mse"}}
    for student, message in (
        (narrow, "`relations.tail: mse` needs equal widths, not 48 (teacher) and 24 (student)"),
        ({"relations": {"teacher_layer": 9}}, "there is no layer 9 in the teacher"),
        ({"relations": {"heads": 7}}, "7 relation heads"),
    ):
        assert family.run(run_dir, 1, {"students": {"deep": DEEP, "odd": student}, **SETTINGS}) == EXIT_USER
        log = " ".join(run_dir.with_suffix(".log").read_text().split())
        assert f"error: students.odd: {message}" in log
        assert not run_dir.exists()


def test_ranks_with_other_students_of_a_family_are_named(family: Family) -> None:
    """One node has an older copy of the recipe."""
    faults = []
    for rank, names in enumerate((("deep", "pairs"), ("deep",))):
        directory = family.directory / f"node{rank}"
        directory.mkdir()
        students = json.dumps({name: STUDENTS[name] for name in names})
        (directory / "family.yaml").write_text(f"{family.recipe.read_text()}\nstudents: {students}\n")
        faults.append({"kind": "elsewhere", "rank": rank, "directory": str(directory)})
    run_dir = family.fresh("nodes")
    words = [*family.arguments(2, SETTINGS), "--run-dir", str(run_dir)]
    words[words.index("--recipe") + 1] = "family.yaml"
    log = run_dir.with_suffix(".log")
    assert family.server.start(2, words, log, faults=faults).wait(240) == EXIT_USER
    assert "students of the recipe" in log.read_text()
