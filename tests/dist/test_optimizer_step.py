"""Our optimizer step of ZeRO-1 and -2 against DeepSpeed's own, under real ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

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
