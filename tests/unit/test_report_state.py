"""The first lines of a report: running, finished, stopped or failed, why, what to do, and the time left."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from data_prep.ownership import LOCK_NAME, Owner, owned_directory
from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.report.state import (
    ENDED_EARLY,
    FAILED,
    FINISHED,
    RUNNING,
    SIGN_S,
    STOPPED,
    RunState,
    progress_facts,
    run_state,
)
from pipeline.runtime.run_paths import RunPaths

STEPS = 100


def points_of(step: int, seconds_per_step: float = 2.0, now_s: float | None = None) -> list[dict[str, float]]:
    end_s = time.time() if now_s is None else now_s
    return [
        {"step": at, "samples": at, "time_s": end_s - (step - at) * seconds_per_step, "loss/total": 1.0}
        for at in range(10, step + 1, 10)
    ]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    (tmp_path / "checkpoints" / "step-00000020").mkdir(parents=True)
    paths = RunPaths(tmp_path)
    paths.restarts.write_text(json.dumps([{"time_s": 0.0, "ended": None}]))
    return paths


def state_of(paths: RunPaths, step: int = 30, state: dict | None = None) -> RunState:
    return run_state(paths, points_of(step), STEPS, state or {})


def test_a_run_that_somebody_trains_is_running_and_has_an_end(paths: RunPaths) -> None:
    with owned_directory(paths.directory, "x"):
        state = state_of(paths)
    assert (state.name, state.left_s) == (RUNNING, pytest.approx(140.0))
    assert f"touch {paths.stop}" in state.fix
    assert progress_facts(points_of(30), STEPS, state) == {"step": "30 of 100", "time left": "140 s"}
    assert state_of(paths).name == FAILED, "its lock is gone"


def test_a_lock_of_another_machine_counts_while_its_owner_touches_it(paths: RunPaths) -> None:
    lock = paths.directory / LOCK_NAME
    lock.write_bytes(dataclasses.replace(Owner.myself(), machine="another", host="n7").text())
    assert "on n7" in state_of(paths).why
    old_s = time.time() - SIGN_S - 60
    os.utime(lock, (old_s, old_s))
    assert state_of(paths).name == FAILED
    lock.write_bytes(dataclasses.replace(Owner.myself(), started=1).text())
    assert state_of(paths).name == FAILED, "another process has its number"


def test_the_time_left_is_that_of_the_newest_start(paths: RunPaths) -> None:
    """A pause before a restart is no training time."""
    before, after = points_of(20, now_s=1000.0), points_of(40, 3.0, now_s=9000.0)[2:]
    paths.restarts.write_text(json.dumps([{"time_s": 900.0}, {"time_s": 8000.0}]))
    with owned_directory(paths.directory, "x"):
        assert run_state(paths, before + after, STEPS, {}).left_s == pytest.approx(180.0)
        assert run_state(paths, before + after[:1], STEPS, {}).left_s is None, "one report says nothing about the speed"
        assert run_state(paths, before + after, None, {}).left_s is None


def test_a_finished_run(paths: RunPaths) -> None:
    assert state_of(paths, STEPS) == RunState(FINISHED, "All 100 steps are done.")
    early = {"ended": {"step": 30, "reason": "no better held-out loss for 3 evaluations."}}
    assert state_of(paths, state=early) == RunState(
        ENDED_EARLY, "It ended at step 30: no better held-out loss for 3 evaluations."
    )


def test_a_stopped_run_says_why_and_how_to_resume(paths: RunPaths) -> None:
    paths.preempted.write_text("stopped on request (SIGTERM) after step 30\n")
    assert state_of(paths) == RunState(
        STOPPED,
        "Stopped on request (SIGTERM) after step 30.",
        "Start the same command again: it resumes from the checkpoint of step 20.",
    )
    (paths.checkpoints / "step-00000020").rmdir()
    assert "no checkpoint" in state_of(paths).fix


def test_a_failed_run_says_why_and_what_to_do(paths: RunPaths) -> None:
    paths.logs.mkdir()
    paths.log(0).write_text("step 30\nerror: no space left on device\n\n")
    state = state_of(paths)
    assert (state.name, state.why.endswith("error: no space left on device")) == (FAILED, True)
    assert str(paths.log(0)) in state.fix
    paths.restarts.write_text(json.dumps([{"time_s": 0.0, "ended": "OUT_OF_MEMORY"}]))
    assert state_of(paths).why == "Memory ran out."
    paths.failed.write_text("NCCL error\nmore\n")
    assert (state_of(paths).name, state_of(paths).why) == (FAILED, "NCCL error")
    paths.failed.unlink()
    paths.bad_batch.write_text(json.dumps({"step": 34, "loss": "nan", "rows": []}))
    assert "the loss of step 35 was not finite" in state_of(paths).why
    assert "optimizer.lr" in state_of(paths).fix


def test_the_line_is_text(paths: RunPaths) -> None:
    """Markers and logs are text from outside."""
    paths.failed.write_text("<script>x</script>\n")
    assert "<script" not in state_of(paths).html()
    assert '<p class="state failed"><b>failed</b> &lt;script' in state_of(paths).html()


def test_several_runs_are_for_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python -m pipeline compare"):
        main(["report", str(tmp_path / "a"), str(tmp_path / "b c")])
