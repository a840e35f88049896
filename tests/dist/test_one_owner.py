"""With real ranks: two starts in one run directory, readers of a run that prunes, and signals that save."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.runtime.checkpoint import committed_steps, read_model_weights
from tests.dist.runs import end_group
from tests.faults.sweeps.lab import Lab

SLOW = {"kind": "pause", "seconds": 0.05}


def names_in(run_dir: Path) -> set[str]:
    """The files, without those that the running run is about to rename."""
    return {path.name for path in run_dir.iterdir() if path.suffix != ".tmp"}


def test_a_second_start_is_rejected_on_all_ranks(lab: Lab, tmp_path: Path) -> None:
    run_dir, settings = lab.fresh("run"), {"steps": 200, "save_every": 2, "eval_every": 200}
    first = lab.begin(run_dir, 1, settings, faults=[SLOW])
    try:
        while not committed_steps(run_dir / "checkpoints"):
            assert first.poll() is None
            time.sleep(0.02)
        files = names_in(run_dir)
        words = [*lab.arguments(2, settings), "--run-dir", str(run_dir)]
        second = lab.server.start(2, words, tmp_path / "second.log")
        assert second.wait(60) == 2
        log = (tmp_path / "second.log").read_text()
        assert log.count(f"error: the run directory {run_dir} is in use by process {first.ranks[0]} on ") == 2, log
        assert names_in(run_dir) == files
        assert first.poll() is None
    finally:
        end_group(first)
        first.wait(20)
    assert lab.run(run_dir, 1, {**settings, "steps": max(committed_steps(run_dir / "checkpoints")) + 1}) == 0
    assert not list(run_dir.glob(".owner*"))


def test_a_running_run_can_be_read(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    job = lab.begin(run_dir, 1, {"steps": 100, "save_every": 1, "eval_every": 100, "checkpoint.keep": 1})
    try:
        while not committed_steps(run_dir / "checkpoints"):
            assert job.poll() is None
            time.sleep(0.02)
        while job.poll() is None:
            _, state = read_model_weights(run_dir)
            assert state["step"] >= 1
        assert job.wait(5) == 0
    finally:
        end_group(job)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU"])
def test_a_hangup_and_the_limit_of_cpu_time_save(name: str, lab: Lab) -> None:
    run_dir = lab.fresh("run")
    settings = {"steps": 20, "save_every": 20, "eval_every": 20}
    assert lab.run(run_dir, 1, settings, faults=[{"kind": "signal", "signal": name, "step": 5}]) == 0
    assert (run_dir / "PREEMPTED").exists()
    assert committed_steps(run_dir / "checkpoints") == [6]


def test_term_ends_a_rank_that_waits_for_the_others(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    alone = [{"kind": "elsewhere", "environment": {"WORLD_SIZE": "2"}}]
    job = lab.begin(run_dir, 1, {}, faults=alone)
    try:
        log = run_dir.with_suffix(".log")
        while "run directory" not in log.read_text():
            time.sleep(0.02)
        time.sleep(1.0)
        os.kill(job.ranks[0], signal.SIGTERM)
        assert job.wait(10) == 128 + signal.SIGTERM
    finally:
        end_group(job)
    assert not run_dir.exists()
