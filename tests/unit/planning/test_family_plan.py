"""The plan of several students with one teacher: composed of the plans of the students' own runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.config import load_recipe
from pipeline.errors import EXIT_USER, exit_code_of
from pipeline.planning.devices import DEVICES, Hardware
from pipeline.planning.family import FamilyPlanner
from pipeline.planning.memory import GIB, Trained, memory_of
from pipeline.planning.plan import Plan, Planner, with_recomputed_activations
from pipeline.planning.trace import PassCost
from tests.conftest import REPO

RECIPE = REPO / "recipes" / "xlmr_large_family.yaml"
SHALLOW = "relations.teacher_layer=4"  # cheaper to trace
SMALL = [SHALLOW, "students.12x384.student.layers=3", "students.6x384.student.layers=2"]
LARGER_LAST = ["students.12x384.student.layers=2", "students.6x384.student.layers=6"]


def family(*overrides: str, stage: int = 2, gpu: str = "a100-80") -> FamilyPlanner:
    ds = REPO / "ds_configs" / f"zero{stage}.json"
    return FamilyPlanner(load_recipe(RECIPE, [*SMALL, *overrides]), RECIPE, ds, Hardware(DEVICES[gpu]))


def part_sums(plans: list[Plan]) -> dict[str, float]:
    return {part: sum(plan.step.parts[part] for plan in plans) for part in plans[0].step.parts}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_family_of_one_is_planned_as_that_student_alone(stage: int) -> None:
    one = family("students=null", stage=stage).recipe
    members = dataclasses.replace(one, students={"only": {}})
    planners = [kind(recipe, RECIPE, family(stage=stage).ds_path, Hardware(DEVICES["a100-80"]))
                for kind, recipe in ((FamilyPlanner, members), (Planner, one))]  # fmt: skip
    of_family, alone = (planner.plan(2, 4) for planner in planners)
    assert of_family.memory.moment == f"{alone.memory.moment} of only"
    of_family.memory.moment = alone.memory.moment
    assert of_family == alone
    assert planners[0].parameters == planners[1].parameters


def test_the_teacher_runs_once_and_the_students_add_up() -> None:
    planner = family()
    plan, alone = planner.plan(1, 8), list(planner.plans_alone(1, 8).values())
    sums = part_sums(alone)
    for part in ("student", "loss", "communication", "optimizer"):
        assert plan.step.parts[part] == pytest.approx(sums[part]), part
    for part in ("teacher", "data"):
        assert plan.step.parts[part] == pytest.approx(alone[0].step.parts[part]), part
    assert plan.step.total < 0.95 * sum(sums.values())
    teacher_flops = 8 * planner.alone["6x384"].costs(alone[1].setting)[0].flops
    assert 8 * (sum(one.step.flops for one in alone) - plan.step.flops) == pytest.approx(teacher_flops)
    assert plan.checkpoint_bytes == sum(one.checkpoint_bytes for one in alone)
    assert plan.evaluation_s < sum(one.evaluation_s for one in alone)
    assert plan.run_s < sum(one.run_s for one in alone)


@pytest.mark.parametrize(
    ("changes", "layers", "is_complete"),
    [
        ([], [4], False),
        (["students.6x384.relations.teacher_layer=7"], [4, 7], False),
        (["students.6x384.relations.tail=relation"], [4], True),
    ],
)
def test_the_teacher_is_cut_above_the_highest_layer_that_is_read(
    changes: list[str], layers: list[int], is_complete: bool
) -> None:
    planner = family(*changes)
    assert planner.teacher.layers == layers
    assert planner.teacher.with_output == is_complete
    plan, alone = planner.plan(1, 8), planner.plans_alone(1, 8).values()
    assert planner.parameters["teacher"] == max(p.encoders.teacher_parameters for p in planner.alone.values())
    assert plan.memory.parts["teacher"] == max(one.memory.parts["teacher"] for one in alone)
    assert plan.step.parts["teacher"] == pytest.approx(max(one.step.parts["teacher"] for one in alone), rel=0.05)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_memory_is_at_most_that_of_the_students_and_one_teacher(stage: int, accumulation: int) -> None:
    planner = family(f"micro_batch_per_gpu={32 // accumulation}", stage=stage)
    plan, alone = planner.plan(1, 8), list(planner.plans_alone(1, 8).values())
    teacher, fixed = alone[0].memory.parts["teacher"], int(1.2 * GIB)
    assert plan.memory.total <= sum(one.memory.total for one in alone) - teacher - fixed
    assert plan.memory.total > max(one.memory.total for one in alone)
    assert plan.memory.parts["optimizer"] == sum(one.memory.parts["optimizer"] for one in alone)
    assert plan.memory.parts["teacher"] == teacher


def test_activations_are_those_of_one_student_and_what_the_next_ones_read() -> None:
    """Students take turns: with more of them only what each owns is added. Q, K and V are freed before the last backward."""
    one = "{student: {layers: 3}}"
    planners = [family(f"students={{{', '.join(f'{n}: {one}' for n in 'abcdef'[:size])}}}") for size in (1, 2, 6)]
    plans = [planner.plan(1, 8) for planner in planners]
    teacher, student = planners[0].alone["a"].costs(plans[0].setting)
    assert [plan.memory.moment for plan in plans] == ["loss of a", "backward of a", "backward of a"]
    activations = [plan.memory.parts["activations"] for plan in plans]
    assert activations[1] == activations[2] == teacher.kept_bytes + student.backward.peak_bytes
    assert activations[0] == teacher.kept_bytes + student.forward.peak_bytes
    of_students = [plan.memory.parts["student"] + plan.memory.parts["optimizer"] for plan in plans]
    assert of_students == [of_students[0], 2 * of_students[0], 6 * of_students[0]]


def test_students_of_different_sizes_are_counted_in_their_order() -> None:
    """The large student's backward is larger by the teacher's Q, K and V where a small one still reads them."""
    large, small = "large: {student: {layers: 6}}", "small: {student: {layers: 1}}"
    first, last = (
        family(f"students={{{order}}}").plan(1, 8).memory for order in (f"{large}, {small}", f"{small}, {large}")
    )
    assert (first.moment, last.moment) == ("backward of large", "loss of large")
    assert first.total > last.total


def test_a_partitioned_teacher_is_gathered_once() -> None:
    planner = family("teacher_options.placement=zero3")
    gathers = [c for c in planner.plan(1, 8).collectives if c.what == "teacher parameters"]
    assert len(gathers) == 1
    assert gathers == [c for c in planner.alone["6x384"].plan(1, 8).collectives if c.what == "teacher parameters"]


def test_a_partitioned_teacher_is_partitioned_for_every_student() -> None:
    """Only the first student's plan has the teacher's traffic. Its memory is the same in every student's turn."""
    planner = family("teacher_options.placement=zero3", *LARGER_LAST)
    plan, alone = planner.plan(1, 8), list(planner.plans_alone(1, 8).values())
    assert plan.memory.moment.endswith("6x384"), "the largest moment is in the turn of the second student"
    assert [plan.memory.parts["teacher"]] * 2 == [one.memory.parts["teacher"] for one in alone]


def test_the_teachers_forward_is_counted_with_the_largest_student() -> None:
    """Under ZeRO-3 the student of the turn has its gathered parameters, whether it is the first or the last one."""
    for changes in ([], LARGER_LAST):
        planner = family(*changes, stage=3)
        students = {}
        for name, one in planner.alone.items():
            setting = one.setting(1, 8)
            students[name] = Trained(one.encoders, one.costs(setting)[1], setting)
        teacher = PassCost(peak_bytes=2**45, kept_bytes=1)
        turns = [students, dict(reversed(students.items()))]
        first, last = (memory_of(teacher, each, planner.hardware.assumptions) for each in turns)
        assert first.moment == last.moment == "teacher's forward"
        assert first == last


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], "--set student.checkpointing=true"),
        (["student.checkpointing=true"], ""),
        (
            ["student.checkpointing=true", "students.6x384.student.checkpointing=false"],
            "--set students.6x384.student.checkpointing=true",
        ),
        (
            ["students.6x384.student.checkpointing=false"],
            "--set student.checkpointing=true --set students.6x384.student.checkpointing=true",
        ),
        (["students.6x384.student.checkpointing=true"], "--set student.checkpointing=true"),
        (["students.12x384.student.checkpointing=true", "students.6x384.student.checkpointing=true"], ""),
        (["students=null"], "--set student.checkpointing=true"),
    ],
)
def test_options_with_which_every_student_recomputes(changes: list[str], expected: str) -> None:
    options, changed = with_recomputed_activations(load_recipe(RECIPE, [*SMALL, *changes]))
    assert options == expected
    pasted = load_recipe(RECIPE, [*SMALL, *changes, *options.split()[1::2]])
    assert pasted.members() == changed.members()
    assert all(member.student.checkpointing for member in pasted.members().values())


def test_recomputing_is_a_remedy_where_a_student_does_not(capsys: pytest.CaptureFixture) -> None:
    words = ["micro_batch_per_gpu=512", "student.checkpointing=true", "students.12x384.student.checkpointing=false"]
    sets = [word for change in words for word in ("--set", change)]
    with_it = family(words[0], words[1], "global_batch=4096").plan(1, 8).memory.total / GIB
    code, error = planned(capsys, *sets, "--set", "global_batch=4096", "--memory-gib", f"{with_it + 0.01:.3f}")
    assert code == EXIT_USER
    assert "--set students.12x384.student.checkpointing=true (a third more work)" in error


def planned(capsys: pytest.CaptureFixture, *words: str, gpu: str = "a100-80") -> tuple[int, str]:
    ds = str(REPO / "ds_configs" / "zero2.json")
    small = [word for change in SMALL for word in ("--set", change)]
    arguments = ["plan", "--recipe", str(RECIPE), "--deepspeed", ds, "--gpu", gpu, *small, *words]
    code = exit_code_of(lambda: main(arguments))
    output = capsys.readouterr()
    return code, output.err or output.out


def test_report_and_figures_compare_with_separate_runs(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, text = planned(capsys, "--json", str(file))
    assert code == 0
    figures: dict[str, Any] = json.loads(file.read_text())
    alone = figures["students"]
    assert list(alone) == ["12x384", "6x384"]
    assert figures["separate_s"] == pytest.approx(sum(plan["run_s"] for plan in alone.values()))
    assert figures["ratio"] == pytest.approx(figures["plan"]["run_s"] / figures["separate_s"])
    assert "## 2 students: one run for each, and this run" in text
    assert f"this run takes {figures['ratio']:.2f} of the time of the 2 runs together" in text
    for name, plan in alone.items():
        (row,) = [line.split("|") for line in text.splitlines() if line.startswith(f"| {name} alone")]
        assert float(row[2]) == pytest.approx(plan["memory"]["total"] / GIB, abs=0.005)
        assert float(row[3]) == pytest.approx(plan["step"]["total"] * 1e3, abs=0.05)


def test_a_run_with_one_student_has_no_such_section(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, text = planned(capsys, "--set", "students=null", "--json", str(file))
    assert code == 0
    assert "alone" not in text
    assert not {"students", "separate_s", "ratio"} & set(json.loads(file.read_text()))


def test_a_problem_of_one_student_names_it(capsys: pytest.CaptureFixture) -> None:
    code, error = planned(capsys, "--set", "students.6x384.relations.teacher_layer=25")
    assert code == EXIT_USER
    assert "students.6x384: there is no layer 25 in the teacher" in error


def test_a_family_that_fits_only_as_separate_runs(capsys: pytest.CaptureFixture) -> None:
    alone = max(plan.memory.total for plan in family().plans_alone(1, 8).values()) / GIB
    code, error = planned(capsys, "--memory-gib", f"{alone + 0.01:.3f}")
    assert code == EXIT_USER
    assert "one run for each student" in error
