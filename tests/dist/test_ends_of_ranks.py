"""An error on one rank ends that rank immediately and with it the job, while the other ranks wait for it in a collective."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.command_line import VERBOSE
from pipeline.errors import EXIT_BUG, EXIT_USER
from tests.conftest import REPO
from tests.dist.fork_server import SECONDS_TO_FOLLOW
from tests.dist.runs import end_group, launcher, start, wait_for_line
from tests.faults.sweeps.lab import Lab, newest_step, same_student, wait_until

STEPS = {"steps": 6, "save_every": 2, "eval_every": 6, "checkpoint.keep": 10}
NO_FAREWELL = {"kind": "no farewell"}  # as with NCCL, where to leave can take as long as the others wait


def end_of(lab: Lab, run_dir: Path, faults: list[dict[str, Any]], **settings: Any) -> tuple[int, float, str]:
    """Exit code of a job with two ranks, seconds from the first error to its end, and what it printed."""
    log = run_dir.with_suffix(".log")
    job = lab.begin(run_dir, 2, {**STEPS, **settings}, faults=faults)
    try:
        assert wait_until(lambda: "injected" in log.read_text() or "ran out" in log.read_text())
        began = time.monotonic()
        code = job.wait(60)
        return code, time.monotonic() - began, log.read_text()
    finally:
        end_group(job)


@pytest.mark.parametrize("error", ["UserError", "AssertionError"])
def test_an_error_on_one_rank_ends_the_job(lab: Lab, error: str) -> None:
    run_dir = lab.fresh("run")
    faults = [{"kind": "error", "rank": 1, "step": 5, "error": error}, NO_FAREWELL]
    code, seconds, _ = end_of(lab, run_dir, faults)
    assert code == (EXIT_USER if error == "UserError" else EXIT_BUG)
    assert seconds < SECONDS_TO_FOLLOW, "no rank had to be killed"
    own_log = (run_dir / "logs" / "rank1.log").read_text()
    assert "injected: only here" in own_log
    assert ("Traceback" in own_log) == (error == "AssertionError")
    assert newest_step(run_dir) in (2, 4), "the save of step 4 began when that of step 2 had ended"
    assert not (run_dir / "DONE").exists()
    assert lab.run(run_dir, 2, STEPS) == 0, "the same command resumes"
    assert same_student(run_dir, lab.untouched(2, STEPS))


def test_memory_that_runs_out_on_one_rank_ends_the_job(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    faults = [{"kind": "out of memory", "rank": 1, "step": 5, "part": "student"}, NO_FAREWELL]
    code, seconds, log = end_of(lab, run_dir, faults, micro_batch_per_gpu=4)
    assert code == EXIT_USER
    assert seconds < SECONDS_TO_FOLLOW
    message = next(line for line in log.splitlines() if line.startswith("error: host memory ran out"))
    assert "in the student's forward, with 4 rows in a micro-batch, on rank 1" in message
    assert "you tried to allocate 1125899906842624 bytes" in message
    assert "--set micro_batch_per_gpu=2 " in message
    assert "--set student.checkpointing=true " in message
    assert newest_step(run_dir) in (2, 4), "the save of step 4 began when that of step 2 had ended"
    fixes = {"micro_batch_per_gpu": 2, "student.checkpointing": True}
    words = [*lab.arguments(2, {**STEPS, **fixes}), "--run-dir", str(run_dir), "--allow-change"]
    assert lab.server.start(2, words, run_dir.with_suffix(".log")).wait() == 0, "both printed fixes, pasted"
    assert (run_dir / "DONE").exists()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("teacher", "in the teacher's forward, with 4 rows"),
        ("loss", "in the relation loss, with 4 rows"),
        ("backward", "in backward, with 4 rows"),
        ("optimizer", "in the optimizer step, on rank 0"),
    ],
)
def test_the_part_is_named_and_the_attempt_is_no_crash(lab: Lab, part: str, words: str) -> None:
    """After three crashes a run resumes from the checkpoint before the newest. Trying smaller micro-batches must not do that."""
    run_dir = lab.fresh("run")
    settings = {**STEPS, "micro_batch_per_gpu": 4}
    assert lab.run(run_dir, 1, settings, faults=[{"kind": "out of memory", "step": 1, "part": part}]) == EXIT_USER
    log = run_dir.with_suffix(".log").read_text()
    assert f"error: host memory ran out {words}" in log
    assert "Traceback" not in log
    assert ("micro_batch_per_gpu" in log.split("error: ")[1]) == (part != "optimizer"), "only where it helps"
    assert json.loads((run_dir / "restarts.json").read_text())[-1]["ended"] == "OUT_OF_MEMORY"


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_a_launcher_ends_with_its_rank(kind: str, tiny_recipe: Path, fp32_config: Path, tmp_path: Path) -> None:
    """The launchers that users have. They end the other rank and report a failure."""
    faulty = {
        "PYTHONPATH": f"{REPO / 'tests' / 'slurm' / 'faults'}{os.pathsep}{REPO}",
        "BUG_RANK": "1",
        "BUG_STEP": "2",
    }
    words = ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe), "--run-dir", str(tmp_path / "run")]
    log = tmp_path / "log"
    job = start([*launcher(kind, 2), *words], log, **faulty)
    try:
        wait_for_line(log, "RuntimeError: an injected bug", job, timeout_s=200)
        began = time.monotonic()
        assert job.wait(60) != 0
        assert time.monotonic() - began < 20
    finally:
        end_group(job)
    assert "RuntimeError: an injected bug" in (tmp_path / "run" / "logs" / "rank1.log").read_text()


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_an_error_that_all_ranks_find_is_printed_once(
    kind: str, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    words = ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe), "--run-dir", str(tmp_path / "run")]
    log = tmp_path / "log"
    job = start([*launcher(kind, 2), *words, "--set", "no_such_key=1"], log, **{VERBOSE: ""})
    try:
        assert job.wait(200) != 0
    finally:
        end_group(job)
    assert log.read_text().count("unknown key `no_such_key`") == 1, log.read_text()


def test_every_rank_is_told_that_a_logger_cannot_be_opened(
    tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "trackio.py").write_text("def init(**about):\n    raise ConnectionError('nobody answers')\n")
    words = ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe), "--run-dir", str(tmp_path / "run")]
    words += ["--set", "metrics.loggers=[trackio]"]
    log = tmp_path / "log"
    job = start([*launcher("deepspeed", 2), *words], log, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPO}")
    try:
        assert job.wait(200) == EXIT_USER, log.read_text()
    finally:
        end_group(job)
    assert "error: `metrics.loggers`: trackio cannot be opened (ConnectionError: nobody answers)" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert json.loads((tmp_path / "run" / "restarts.json").read_text())[-1]["ended"] == "NOT_BEGUN"
