"""What is read of the students of a run, what differs between them, and the table at the end of a training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from data_prep.shards import UnreadableError
from pipeline.comparison import students as students_module
from pipeline.comparison.differences import differing_keys, heldout_differences
from pipeline.comparison.students import paths_of, read_students
from pipeline.comparison.table import comparison_lines
from pipeline.config import load_recipe
from pipeline.provenance import POOLING, START_CONFIG, START_WEIGHTS
from pipeline.runtime.run_paths import RunPaths
from tests.unit.made_up_run import BERT, change_recipe, make_family, make_run, write_metrics


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return make_family(tmp_path / "family")


# -- what a run directory says about its students


def test_students_of_a_family_are_read_with_their_states(family: Path) -> None:
    deep, flat, late = read_students(family)
    assert [student.name for student in (deep, flat, late)] == ["deep", "flat", "late"]
    assert deep.best == (4, 0.5)
    assert deep.heldout == [(0, 3.0), (4, 0.5), (8, 0.625)]
    assert [student.step for student in (deep, flat, late)] == [8, 4, 3]
    assert deep.status == "finished"
    assert flat.status == "ended at step 4: no better held-out loss for 1 evaluation"
    assert late.status == "not finished, 3 of 8 steps"
    assert late.paths.group == 2
    assert late.state["step"] == 2
    assert paths_of(family, "deep").group == 1
    assert deep.recipe == load_recipe(family / "recipe.yaml", []).members()["deep"]


def test_a_run_with_one_student_is_one_row(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "alone")
    (student,) = read_students(run_dir)
    assert (student.name, student.step, student.best) == ("alone", 8, (8, 0.625))
    text = "\n".join(comparison_lines(run_dir))
    assert "alone" in text
    assert "differ" not in text


def test_the_size_is_that_of_the_complete_student(family: Path) -> None:
    deep, flat, _ = read_students(family)
    model = BertModel(BertConfig(**{**BERT, "num_hidden_layers": 4}), add_pooling_layer=False)
    assert deep.size is not None
    assert flat.size is not None
    assert deep.size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert deep.size.megabytes == deep.size.parameters * 4 / 1e6
    per_layer = 2 * 128 * (12 * 48 * 48 + 2 * 128 * 48)  # six products of matrices, and the two of attention
    assert deep.size.forward_flops == 4 * per_layer
    assert flat.size.forward_flops == 2 * per_layer


def test_of_equal_losses_the_later_is_best_and_a_nan_never(family: Path) -> None:
    paths = RunPaths(family, "deep")
    losses = {0: 2.0, 2: 1.5, 4: 1.5, 6: math.nan, 8: 1.75}
    write_metrics(paths, *({"step": step, "heldout/mean": loss} for step, loss in losses.items()))
    assert read_students(family)[0].best == (4, 1.5)


def test_a_diverged_run_says_so_until_it_has_gone_further(family: Path) -> None:
    paths = RunPaths(family, "late")
    paths.bad_batch.write_text(json.dumps({"step": 5, "loss": "nan", "rows": []}))
    assert read_students(family)[2].status == "diverged at step 6", "steps are counted from 1"
    write_metrics(paths, {"step": 7, "loss/total": 1.0})
    assert read_students(family)[2].status == "not finished, 7 of 8 steps"


def test_markers_say_why_a_run_is_not_finished(family: Path) -> None:
    for marker, status in (("PREEMPTED", "stopped on request"), ("FAILED", "failed")):
        (family / marker).write_text("")
        assert read_students(family)[2].status == f"{status}, 3 of 8 steps"
        (family / marker).unlink()


# -- what differs


def test_only_keys_that_differ_are_named(family: Path) -> None:
    students = read_students(family)
    assert differing_keys(students) == {"student.layers": [4, 2, 1], "optimizer.lr": [1e-3, 6e-4, 2e-3]}
    assert differing_keys(students[:1]) == {}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("teacher_layer=2", "relations.teacher_layer"),
        ("heads=6", "relations.heads"),
        ("pairs={q-q: 1, k-k: 2, v-v: 1}", "relations.pairs"),
        ("tail=mse", None),  # the held-out loss has no tail
        ("student_layer=1", None),  # the same layer of the teacher, learned by another layer
    ],
)
def test_held_out_losses_compare_only_where_they_measure_the_same(family: Path, change: str, key: str | None) -> None:
    change_recipe(family, "flat", f"relations.{change}")
    about = RunPaths(family, "flat").description
    about.write_text(json.dumps({**json.loads(about.read_text()), "matched_layers": None}))
    assert heldout_differences(read_students(family)) == ([key] if key else [])


def test_the_start_and_the_pooling_of_a_student_are_no_part_of_its_teacher(family: Path) -> None:
    teacher = {"teacher weights": "a" * 32, "tokenizer tokenizer.json": "b" * 64}
    start = {**dict.fromkeys((START_WEIGHTS, START_CONFIG), "c" * 32), POOLING: "mean"}
    for name, more in (("deep", {}), ("flat", start), ("late", {START_WEIGHTS: "d" * 32})):
        about = RunPaths(family, name).description
        about.write_text(json.dumps({**json.loads(about.read_text()), "identity": {**teacher, **more}}))
    assert heldout_differences(read_students(family)) == []
    about.write_text(json.dumps({**json.loads(about.read_text()), "identity": {**teacher, "teacher weights": "e"}}))
    assert heldout_differences(read_students(family)) == ["teacher"]


def test_the_last_layer_is_compared_by_its_number(family: Path) -> None:
    change_recipe(family, "flat", "relations.teacher_layer=null")
    assert heldout_differences(read_students(family)) == []


# -- the table at the end of training


def test_the_table_has_loss_size_and_speed_of_every_student(family: Path) -> None:
    lines = comparison_lines(family)
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["student.layers"] == ["student.layers", "4", "2", "1"]
    assert rows["deep"][:6] == ["deep", "8", "0.3750", "0.6250", "0.5000", "(4)"]
    assert rows["deep"][6:] == ["0.1", "1", "0.0409", "1,000", "finished"]


@pytest.mark.parametrize(
    ("name", "content", "is_compared"),
    [
        ("metrics.jsonl", None, True),
        ("metrics.jsonl", "", True),
        ("metrics.jsonl", "3}\n", False),
        ("run.json", "{", False),
        ("recipe.yaml", None, False),
        ("student_config.json", "[]", False),
        ("student_config.json", None, True),
        ("bad_batch.json", "{}", True),
    ],
)
def test_a_missing_or_corrupt_file_does_not_end_a_finished_run(
    family: Path, name: str, content: str | None, is_compared: bool
) -> None:
    path = family / "students" / "deep" / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    lines = comparison_lines(family)
    if is_compared:
        assert lines[0] == "what differs:"
        assert sum(line.split()[:1] == ["deep"] for line in lines) == 1
    else:
        (warning,) = lines
        assert warning.startswith("warning: the students cannot be compared: ")
        assert name in warning


def test_a_directory_that_cannot_be_read_does_not_end_a_finished_run(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(directory: Path) -> list[int]:
        raise UnreadableError(f"{directory} cannot be read: Input/output error")

    monkeypatch.setattr(students_module, "committed_steps", unreadable)
    (warning,) = comparison_lines(family)
    assert warning.startswith("warning: the students cannot be compared: ")
    assert "checkpoints cannot be read: Input/output error" in warning
