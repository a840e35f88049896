"""`compare`, `report` and the table of a real run with several students: the figures are those of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.comparison.students import read_students
from pipeline.comparison.table import comparison_lines
from pipeline.config import load_recipe
from pipeline.distillation.models.student import SENTENCE_PROJECTION
from pipeline.report.compare import table_lines
from pipeline.runtime.checkpoint import read_model_weights
from tests.dist.family import DEEP, PAIRS, SETTINGS, STUDENTS, WILD, state_of
from tests.faults.sweeps.lab import Lab

LATE = {**DEEP, "optimizer": {"lr": 2e-3, "warmup_steps": 5}}


def test_the_figures_of_a_real_family_are_those_of_its_files(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """One student ends early, one is added later and stopped on the way."""
    run_dir = lab.fresh("compared")
    settings = {
        **SETTINGS,
        "steps": 12,
        "eval_every": 1,
        "save_every": 4,
        "stop_when.no_better_for": 3,
        "metrics.log_every": 1,
        "checkpoint.keep_best": "heldout",
    }
    two = {"wild": WILD, "calm": PAIRS}
    assert lab.run(run_dir, 1, {"students": two, **settings}) == 0
    last = "\n".join([*comparison_lines(run_dir), "done: 12 steps"])
    assert last in run_dir.with_suffix(".log").read_text(), "the last lines of the training"
    stop = {"kind": "signal", "signal": "SIGUSR1", "step": 3}
    assert lab.run(run_dir, 1, {"students": {**two, "late": LATE}, **settings}, 2, [stop]) == 0
    students = {student.name: student for student in read_students(run_dir)}
    assert list(students) == ["wild", "calm", "late"]
    for name, student in students.items():
        weights, state = read_model_weights(run_dir, name)
        assert student.size is not None
        weights.pop(SENTENCE_PROJECTION, None)  # no part of the encoder
        assert student.size.parameters == sum(tensor.numel() for tensor in weights.values())
        assert student.heldout[0][0] == 0
        assert student.trained == [tuple(evaluation) for evaluation in state["evaluations"]]
        assert student.best is not None
        assert read_model_weights(run_dir, name, "best")[1]["step"] == student.best[0]
        assert student.step == (state["ended"]["step"] if state["ended"] else state["step"])
    assert students["wild"].status.endswith("no lower held-out loss in 3 evaluations (stop_when.no_better_for)")
    assert students["calm"].status == "finished"
    assert students["late"].status == "stopped on request, 4 of 12 steps"
    file = run_dir / "chosen.yaml"
    main(["compare", str(run_dir), "--by", "heldout", "--write", str(file), "--json", str(run_dir / "c.json")])
    printed = capsys.readouterr().out
    assert "\n".join(table_lines(read_students(run_dir), [])) in printed
    chosen = json.loads((run_dir / "c.json").read_text())["chosen"]
    lowest = min(students.values(), key=lambda student: (student.best or (0, 9.0))[1])
    assert chosen == lowest.name
    assert load_recipe(file, []) == load_recipe(run_dir / "recipe.yaml", []).members()[chosen]
    main(["report", str(run_dir)])
    assert "Student late" in (run_dir / "report.html").read_text()


def test_a_diverged_student_of_a_real_family_is_named_and_not_chosen(lab: Lab) -> None:
    nan = {"kind": "nan", "steps": list(range(6)), "student": "deep"}
    run_dir = lab.fresh("diverged")
    assert lab.run(run_dir, 1, {"students": STUDENTS, **SETTINGS, "guard.max_bad_steps": 2}, 2, [nan]) == 0
    assert state_of(run_dir, "deep")["ended"]["step"] == 2
    deep, *others = read_students(run_dir)
    assert deep.status.startswith("ended at step 2: diverged: 2 steps in a row were not finite")
    assert deep.is_diverged
    assert not any(student.is_diverged for student in others)


def test_a_diverged_run_with_one_student_says_so(lab: Lab) -> None:
    nan = {"kind": "nan", "steps": list(range(6))}
    run_dir = lab.fresh("diverged alone")
    assert lab.run(run_dir, 1, {**SETTINGS, "guard.max_bad_steps": 2, "metrics.log_every": 1}, 2, [nan]) == 3
    (student,) = read_students(run_dir)
    assert student.status == "diverged at step 2"


def test_a_continued_run_has_no_longer_diverged(lab: Lab, tmp_path: Path) -> None:
    run_dir = lab.fresh("continued")
    nan = {"kind": "nan", "steps": [2, 3]}
    settings = {**SETTINGS, "guard.max_bad_steps": 2, "metrics.log_every": 1, "save_every": 1}
    assert lab.run(run_dir, 1, settings, 2, [nan]) == 3
    assert read_students(run_dir)[0].is_diverged
    assert lab.run(run_dir, 1, settings) == 0
    (student,) = read_students(run_dir)
    assert (student.status, student.is_diverged) == ("finished", False)
