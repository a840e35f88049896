"""Every part of `python -m benchmarks.gpu_check`, on a CPU with `--tiny`: no row fails, and each says what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.reproducibility import tensor_hashes
from pipeline.distillation.relations.backends import BACKENDS

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 1800  # two minutes on two idle cores
PHASES = ("batch", "teacher", "student forward", "loss", "backward", "optimizer")
Checked = tuple[dict[str, Any], str, Path]
pytestmark = pytest.mark.timeout(LIMIT_S + 60)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """The parts of the JSON, the Markdown, and the working directory of one complete check."""
    directory = tmp_path_factory.mktemp("gpu_check")
    output, work = directory / "results", directory / "work"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--tiny", "--output", str(output), "--work", str(work)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    (report,) = output.glob("*-gpu-tiny.json")
    return json.loads(report.read_text())["parts"], report.with_suffix(".md").read_text(), work


def table(checked: Checked, part: str, name: str) -> list[dict[str, Any]]:
    return [line["row"] for line in checked[0][part]["rows"] if line["table"] == name]


def test_every_part_is_complete_and_marked_as_no_figure(checked: Checked) -> None:
    parts, text, _ = checked
    assert {name: part["state"] for name, part in parts.items()} == {part.name: "complete" for part in PARTS}
    assert not [line for part in parts.values() for line in part["rows"] if line["failed"]]
    assert "tiny, CPU: no figure" in text
    assert all(f"## {part.title}" in text for part in PARTS)


def test_every_backend_is_compared_with_the_reference(checked: Checked) -> None:
    errors = table(checked, "relations", "Error of the gradient")
    assert {row["backend"] for row in errors} == set(BACKENDS)
    assert len(errors) == 5 * len(BACKENDS)
    for row in errors:
        if row["backend"] == "chunked":
            assert row["fp32 far"] <= 1e-6
            assert row["fp32 near"] <= 1e-5
            assert row["fp16 near"] > row["fp32 near"], "half precision rounds more"
    times = table(checked, "relations", "Time and memory of one relation")
    assert {row["backend"] for row in times} == {*BACKENDS, "naive", "naive, compiled"}
    assert all(row["ms"] > 0 for row in times if row["backend"] in ("chunked", "naive"))


def test_the_step_is_measured_by_phase_with_each_change(checked: Checked) -> None:
    rows = {row["variant"]: row for row in table(checked, "step", "Steps")}
    assert {"DeepSpeed's own engine", "AdamW fused: true", "AdamW fused: false", "guard.spikes: skip"} <= set(rows)
    assert {"teacher compiled", "student compiled", "as it is, again", "the naive method"} <= set(rows)
    assert {f"relation backend {backend}" for backend in BACKENDS} <= set(rows)
    for name in ("as it is", "DeepSpeed's own engine", "AdamW fused: true"):
        assert all(rows[name][f"{phase} ms"] > 0 for phase in PHASES), name
        assert max(rows[name][f"{phase} ms"] for phase in PHASES) < rows[name]["step ms"]
    (any_order,) = table(checked, "any-order", "Steps")
    assert any_order["step ms"] > 0


def test_a_plan_is_compared_with_that_step(checked: Checked) -> None:
    rows = {row["figure"]: row for row in table(checked, "plan", "Plan and measurement")}
    (step,) = [row for row in table(checked, "step", "Steps") if row["variant"] == "as it is"]
    assert rows["complete step, ms"]["measured"] == step["step ms"]
    assert rows["student, ms"]["measured"] == step["student forward ms"] + step["backward ms"]
    assert all(row["predicted"] > 0 for row in rows.values())


def test_runs_are_equal_in_every_bit_and_different_steps_are_not(checked: Checked) -> None:
    (row,) = table(checked, "reproducibility", "Equal in every bit")
    assert row["checkpoints"] == 2
    assert row["twice: the same"]
    assert row["resumed: the same"]
    first, last = sorted((checked[2] / "runs").glob("*-first/checkpoints/step-*"))
    hashes = [tensor_hashes(path) for path in (first, last)]
    assert hashes[0].keys() == hashes[1].keys()
    assert len(hashes[0]) >= 3, "weights and both moments"
    assert all(hashes[0][name] != hashes[1][name] for name in hashes[0])


def test_a_step_with_nan_changes_no_weight(checked: Checked) -> None:
    rows = table(checked, "faults", "NaN in the loss of one step")
    assert [row["ZeRO"] for row in rows] == [1, 2, 3, 2]
    for row in rows:
        assert (row["skipped"], row["weights unchanged"], row["next step skipped"]) == (True, True, False)
        assert row["trains again"]


def test_stages_launcher_and_quickstart_have_their_figures(checked: Checked) -> None:
    stages = table(checked, "zero", "Stages and precisions")
    assert {f"ZeRO-{stage}" for stage in (1, 2, 3)} <= {row["variant"] for row in stages if row["step ms"] > 0}
    (launcher,) = table(checked, "launcher", "By the launcher")
    assert launcher["tokens/s"] > 0
    assert launcher["last loss"] < launcher["first loss"]
    retrieval = table(checked, "quickstart", "Retrieval, mean over the languages")
    assert [row["pooling"] for row in retrieval] == ["output", "values", "last layer's input"]
    assert all(0 <= row[stage] <= 1 for row in retrieval for stage in ("teacher", "before", "after"))
