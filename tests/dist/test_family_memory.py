"""Memory of several students in one run, of real steps: as planned, below that of separate runs, and one loss at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_family import TOGETHER, Job, in_a_new_process, measure_bytes
from tests.conftest import REPO

LARGE, SMALL = "{student: {layers: 3}}", "{student: {layers: 1}, relations: {teacher_layer: 2}}"
SIZES = ["seq_len=64", "micro_batch_per_gpu=8", "student.hidden=48", f"students={{large: {LARGE}, small: {SMALL}}}"]


def job_at(stage: int, recipe: Path, directory: Path, *overrides: str) -> Job:
    """ds_configs without fp16 and with a bucket that is small next to these models."""
    config = json.loads((REPO / "ds_configs" / f"zero{stage}.json").read_text())
    del config["fp16"]
    config["zero_optimization"]["reduce_bucket_size"] = 50_000
    path = directory / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return Job(recipe, [*SIZES, *overrides], path)


@pytest.mark.parametrize(("stage", "accumulation"), [(1, 2), (2, 1), (3, 1)])
def test_family_memory_is_planned(stage: int, accumulation: int, tiny_recipe: Path, tmp_path: Path) -> None:
    job = job_at(stage, tiny_recipe, tmp_path, f"micro_batch_per_gpu={8 // accumulation}")
    found = in_a_new_process(measure_bytes, job, TOGETHER)
    assert found["planned"] / found["peak"] == pytest.approx(1, abs=0.15), found


def test_family_memory_is_at_most_the_students_and_one_teacher(tiny_recipe: Path, tmp_path: Path) -> None:
    job = job_at(2, tiny_recipe, tmp_path)
    alone = [in_a_new_process(measure_bytes, job, name) for name in job.students]
    together = in_a_new_process(measure_bytes, job, TOGETHER)
    teachers = sum(found["teacher"] for found in alone) - together["teacher"]
    assert together["teacher"] == max(found["teacher"] for found in alone)
    assert together["peak"] <= sum(found["peak"] for found in alone) - teachers
    assert together["peak"] > max(found["peak"] for found in alone)


def test_loss_memory_of_a_family_does_not_grow(tiny_recipe: Path, tmp_path: Path) -> None:
    job = job_at(2, tiny_recipe, tmp_path)
    losses = [in_a_new_process(measure_bytes, job.with_students(number), TOGETHER) for number in (1, 2, 4)]
    peaks = [found["loss"] for found in losses]
    assert peaks[0] > 0
    assert peaks == pytest.approx([peaks[0]] * 3, rel=0.01)
    assert losses[0]["before"] < losses[1]["before"] < losses[2]["before"]
