"""Training jobs on a real cluster: to the end, through preemption, time limits, dead nodes and bugs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.runs import curve, metrics
from tests.slurm.jobs import Training, same_weights, steps_in


def test_two_nodes_with_two_ranks_give_the_losses_of_one_process(
    training: Training, plain_run: Path, tmp_path: Path
) -> None:
    """Ranks per node are counted from the (pretended) GPUs, as on a real cluster."""
    job = training.submit(tmp_path / "run", "--nodes=2", "--gpus-per-node=2", PROCESSES_PER_NODE="")
    assert job.wait_end() == "COMPLETED", job.log
    assert curve(job.run_dir) == pytest.approx(curve(plain_run), rel=1e-5)
    assert curve(job.run_dir, "heldout/mean") == pytest.approx(curve(plain_run, "heldout/mean"), rel=1e-5)
    assert set(job.node_logs(0)) == {"n1", "n2"}
    for hint in ("2 process(es) on each of 2 node(s): n[1-2]", "tensorboard --logdir", "tail -F", "touch", "scancel"):
        assert hint in job.log


def test_a_bug_in_one_rank_fails_the_job(training: Training, tmp_path: Path) -> None:
    """Not requeued, nothing hangs, and the batch log ends with the cause, not with what the other rank made of it."""
    job = training.submit(tmp_path / "run", "--nodes=2", BUG_RANK="1", BUG_STEP="5")
    assert job.wait_end() == "FAILED", job.log
    assert job.restarts == 0
    last_lines = job.log.rstrip().splitlines()[-4:]
    assert any("RuntimeError: a bug put here on purpose" in line for line in last_lines), job.log
    assert "a bug put here on purpose" in (job.run_dir / "FAILED").read_text()
    assert not (job.run_dir / "DONE").exists()
