"""Our optimizer step of ZeRO-1 and -2 against DeepSpeed's own, under real ranks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPO
from tests.dist.ranks import run_ranks
from tests.dist.test_checkpoint import PRECISIONS, WORKER

STEPS = 8
CASES = list(itertools.product((1, 2), PRECISIONS, (1, 2)))  # stage, precision, micro-batches per step


def name(stage: int, precision: str, accumulation: int, own: bool) -> str:
    return f"{stage} {precision} {accumulation} {'ours' if own else 'DeepSpeed'}"


@pytest.fixture(scope="module", params=[1, 2])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The same runs with both steps; one micro-batch has a NaN."""
    base = tmp_path_factory.mktemp(f"step{request.param}")
    runs = [
        {
            "name": name(*case, own),
            "stage": case[0],
            "precision": case[1],
            "accumulation": case[2],
            "deepspeeds_step": not own,
            # Where its scale doubles, DeepSpeed divides that step's gradient by the new scale: compared without such steps.
            "window": 100,
            "steps": STEPS,
            "poison": [2],
            "directory": str(base / "unused"),
        }
        for case in CASES
        for own in (True, False)
    ]
    return run_ranks(WORKER, request.param, {"runs": runs}, base / "launch")


@pytest.mark.parametrize(("stage", "precision", "accumulation"), CASES)
def test_it_is_deepspeeds(reports: list[Any], stage: int, precision: str, accumulation: int) -> None:
    """Skipped steps and loss scales are equal. Losses agree to rounding: AdamW is fused, and clipping is one division."""
    for report in reports:
        ours, theirs = (report[name(stage, precision, accumulation, own)] for own in (True, False))
        assert 2 in ours["skipped"]
        assert ours["unharmed"]
        assert theirs["unharmed"]
        finite = [step for step in ours["losses"] if step != "2"]
        assert len(finite) == STEPS - 1
        assert ours["skipped"] == theirs["skipped"]
        assert ours["scales"] == theirs["scales"]
        of_ours, of_theirs = ([run["losses"][step] for step in finite] for run in (ours, theirs))
        assert of_ours == pytest.approx(of_theirs, rel=1e-5 if precision == "fp32" else 1e-2)


def test_the_host_reads_nothing(reports: list[Any]) -> None:
    """Forward, backward and step together, in each of the steps."""
    for report in reports:
        for case in CASES:
            assert report[name(*case, True)]["reads"] == [0] * STEPS, case
            assert min(report[name(*case, False)]["reads"]) > 0, "the counter counts nothing"


def test_deepspeeds_step_is_announced(reports: list[Any]) -> None:
    for report in reports:
        for case in CASES:
            assert report[name(*case, True)]["warnings"] == []
            (warning,) = report[name(*case, False)]["warnings"]
            assert "DeepSpeed's own" in warning
            assert "`optimizer.params.fused` is not true" in warning


def test_launches_of_the_large_students_step() -> None:
    """187 tensors: one operation for many of them, and no read in backward and step."""
    code = "import json; from benchmarks.bench_step import count_operations; print(json.dumps(count_operations()))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True, check=True
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["trained_tensors"] == 187
    assert counts["optimizer_launches"] <= 100
    assert counts["host_reads_of_engine"] == 0
