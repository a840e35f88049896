"""Training jobs on a real cluster finish despite preemption, time limits and dead nodes; bugs fail them."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from pipeline.runtime.checkpoint_files import committed_steps
from tests.dist.runs import curve, metrics, train
from tests.slurm.cluster import KILL_WAIT_S
from tests.slurm.jobs import Job, Training, same_weights

pytestmark = pytest.mark.timeout(3600)  # cores are often shared; every wait has its own limit
NUM_PREEMPTIONS = int(os.environ.get("SLURM_PREEMPTIONS", "5"))
STEPS = 12  # of the tiny recipe


@pytest.fixture(scope="module")
def time_limited_job(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Submitted before the other tests, because its first attempt sleeps until shortly before its time limit."""
    run_dir = tmp_path_factory.mktemp("limit") / "run"
    extra = (
        "--set",
        "guard.deadline_margin_s=1",
    )  # newer Slurm tells ranks the end of the job; this test is about the signal
    return training.submit(run_dir, "--time=1", "--signal=B:USR1@45", extra=extra, SLOW_STEP_S="6", SLOW_ATTEMPTS="1")


@pytest.mark.usefixtures("time_limited_job")
def test_two_nodes_with_two_ranks_give_the_losses_of_one_process(
    training: Training, plain_run: Path, tmp_path: Path
) -> None:
    """The (fake) GPUs give the ranks per node, as on a real cluster. Training them on CPUs must be allowed explicitly."""
    asked = ("--nodes=2", "--gpus-per-node=2")
    rejected = training.submit(tmp_path / "rejected", *asked, PROCESSES_PER_NODE="")
    job = training.submit(tmp_path / "run", *asked, PROCESSES_PER_NODE="", ALLOW_CPU_RANKS="1")
    assert rejected.wait_end() == "FAILED"
    assert "Slurm has allotted 2 GPU(s)" in (rejected.run_dir / "FAILED").read_text()
    assert rejected.facts()["JobName"] == "rejected-train"
    assert job.wait_end() == "COMPLETED", job.log
    assert curve(job.run_dir) == pytest.approx(curve(plain_run), rel=1e-5)
    assert curve(job.run_dir, "heldout/mean") == pytest.approx(curve(plain_run, "heldout/mean"), rel=1e-5)
    assert set(job.node_logs(0)) == {"n1", "n2"}
    for hint in ("2 process(es) on each of 2 node(s): n[1-2]", "tensorboard --logdir", "tail -F", "touch", "scancel"):
        assert hint in job.log


def test_srun_alone_starts_ranks_on_two_nodes(two_node_run: Path, plain_run: Path) -> None:
    """One task per rank and no launcher: train.py finds rank, world size and the first node in Slurm's environment."""
    assert curve(two_node_run) == pytest.approx(curve(plain_run), rel=1e-5)


def test_preempted_requeued_and_finished_bit_for_bit(training: Training, two_node_run: Path, tmp_path: Path) -> None:
    job = training.submit(tmp_path / "run", "--nodes=2", SLOW_STEP_S="1", SLOW_ATTEMPTS="1")
    job.wait_step(attempt=0, step=2)
    job.preempt()
    assert job.wait_end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert "USR1 received" in job.log
    assert curve(job.run_dir) == curve(two_node_run)
    assert same_weights(job.run_dir, two_node_run)


def test_preemption_by_a_more_urgent_job(training: Training, plain_run: Path, tmp_path: Path) -> None:
    """Slurm's own preemption sends TERM to the ranks, not to the batch script, and allows a grace time."""
    job = training.submit(tmp_path / "run", SLOW_STEP_S="1", SLOW_ATTEMPTS="1")
    job.wait_step(attempt=0, step=2)
    urgent = training.cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out", "--wrap=hostname"
    )
    assert training.cluster.wait_state(urgent, "COMPLETED", "FAILED") == "COMPLETED"
    assert job.wait_end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert "signal SIGTERM" in job.log
    assert same_weights(job.run_dir, plain_run)


def test_preemption_before_the_process_group_exists(training: Training, two_node_run: Path, tmp_path: Path) -> None:
    """A rank that waits for the others has nothing to save and ends by TERM. The run has not failed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/PREEMPTED").write_text("left by an earlier job\n")
    job = training.submit(tmp_path / "run", "--nodes=2", LATE_RANK="1", LATE_S="300")
    training.cluster.wait_for(lambda: "recipe " in job.node_logs(0).get("n1", ""), "the first rank's start")
    time.sleep(3)  # from its first line until it waits
    urgent = training.cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out", "--wrap=hostname"
    )
    assert training.cluster.wait_state(urgent, "COMPLETED", "FAILED") == "COMPLETED"
    assert job.wait_end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert "left by an earlier job" not in job.log
    assert not (job.run_dir / "FAILED").exists()
    assert same_weights(job.run_dir, two_node_run)


def test_a_node_loses_power(training: Training, two_node_run: Path, tmp_path: Path) -> None:
    """Slurm requeues the job, and the job resumes from the last complete checkpoint."""
    job = training.submit(tmp_path / "run", "--nodes=2", SLOW_STEP_S="1", SLOW_ATTEMPTS="1")
    job.wait_step(attempt=0, step=5)
    # Files are committed after the log line of the next step.
    training.cluster.wait_for(lambda: 4 in committed_steps(job.run_dir / "checkpoints"), "checkpoint of step 4")
    # On a rebooted node, Slurm kills what it believes to be left of the job, including the new attempt.
    job.restart_delay_s = KILL_WAIT_S + 2
    training.cluster.lose_power("n2")
    training.cluster.wait_for(lambda: "DOWN" in training.cluster.node_state("n2"), "n2 DOWN")
    training.cluster.boot("n2")
    assert job.wait_end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert "checkpoints/step-00000004" in job.node_logs(1)["n1"]
    assert same_weights(job.run_dir, two_node_run)


def test_a_bug_in_one_rank_fails_the_job(training: Training, tmp_path: Path) -> None:
    """The job is not requeued, nothing hangs, and the batch log ends with the cause, not with the errors of the other rank."""
    job = training.submit(tmp_path / "run", "--nodes=2", BUG_RANK="1", BUG_STEP="5")
    assert job.wait_end() == "FAILED", job.log
    assert job.restarts == 0
    last_lines = job.log.rstrip().splitlines()[-2:]
    assert any("RuntimeError: an injected bug" in line for line in last_lines), job.log
    assert "an injected bug" in (job.run_dir / "FAILED").read_text()
    assert not (job.run_dir / "DONE").exists()


def test_many_preemptions_in_a_row_lose_no_step(training: Training, plain_run: Path, tmp_path: Path) -> None:
    """Every attempt resumes exactly where the one before it was stopped. The last one reaches MAX_RESTARTS.

    There are five preemptions by default; SLURM_PREEMPTIONS=20 makes them twenty.
    """
    steps = max(STEPS, 3 * NUM_PREEMPTIONS)
    extra = () if steps == STEPS else ("--set", f"steps={steps}")
    if extra:
        plain_run = tmp_path / "plain"
        arguments = ["--deepspeed", str(training.ds_json), "--recipe", str(training.recipe), *extra]
        train("python", 1, plain_run, arguments)
    run_dir = tmp_path / "run"
    job = training.submit(run_dir, extra=extra, SLOW_STEP_S="1.5", MAX_RESTARTS=str(NUM_PREEMPTIONS - 1))
    saved = 0
    for attempt in range(NUM_PREEMPTIONS):
        job.wait_step(attempt, saved + 1)
        job.preempt()
        job.wait_until_saved(attempt)
        if attempt:
            assert f"checkpoints/step-{saved:08d}" in job.node_logs(attempt)["n1"], (
                "resumed from another step than it was stopped at"
            )
        saved = committed_steps(run_dir / "checkpoints")[-1]
        assert job.log.count("stopped on request") == attempt + 1
        assert f"after step {saved}" in job.log
    assert job.wait_end() == "FAILED", job.log
    assert job.restarts == NUM_PREEMPTIONS - 1
    assert f"MAX_RESTARTS is {NUM_PREEMPTIONS - 1}: not requeued" in job.log
    assert [row["step"] for row in metrics(run_dir) if "loss/total" in row] == list(range(1, saved + 1))
    again = training.submit(run_dir, extra=extra)
    assert again.wait_end() == "COMPLETED", again.log
    assert curve(run_dir) == curve(plain_run)
    assert same_weights(run_dir, plain_run)


def test_time_limit_of_the_job(time_limited_job: Job, plain_run: Path) -> None:
    """The early signal saves and requeues the job before the time limit kills it."""
    job = time_limited_job
    assert job.wait_end() == "COMPLETED", job.log
    assert job.restarts >= 1
    assert "USR1 received" in job.log
    assert re.search(r"stopped on request \(.*\) after step \d+", job.log)
    assert same_weights(job.run_dir, plain_run)


def test_two_jobs_for_one_run_directory(training: Training, plain_run: Path, tmp_path: Path) -> None:
    """Each has its own node. The second is rejected and names the owner; the first finishes as without the second."""
    first = training.submit(tmp_path / "run", "--nodelist=n1", SLOW_STEP_S="4")
    first.wait_step(attempt=0, step=2)
    its_log = tmp_path / "second.out"
    second = training.submit(tmp_path / "run", "--nodelist=n2", f"--output={its_log}")
    assert second.wait_end() == "FAILED", its_log.read_text()
    assert re.search(r"the run directory .* is in use by process \d+ on \S+, since 2", its_log.read_text())
    assert second.restarts == 0
    assert not (first.run_dir / "FAILED").exists(), "the run has not failed"
    assert first.wait_end() == "COMPLETED", first.log
    assert same_weights(first.run_dir, plain_run)
    assert curve(first.run_dir) == curve(plain_run)


def test_a_finished_run_is_continued_or_kept(training: Training, plain_run: Path, tmp_path: Path) -> None:
    """As with pipeline/train.py: two more steps are trained, the same steps are finished already, another seed is rejected."""
    run_dir = Path(shutil.copytree(plain_run, tmp_path / "run"))
    more = training.submit(run_dir, extra=("--set", "steps=14"))
    assert more.wait_end() == "COMPLETED", more.log
    assert max(curve(run_dir)) == 14
    assert (run_dir / "DONE").read_text() == "done: 14 steps\n"
    again = training.submit(run_dir, extra=("--set", "steps=14"))
    assert again.wait_end() == "COMPLETED", again.log
    assert "is finished: done: 14 steps" in again.log
    other = training.submit(run_dir, extra=("--set", "steps=14", "--set", "seed=7"))
    assert other.wait_end() == "FAILED", other.log
    assert "seed: 0 -> 7" in (run_dir / "FAILED").read_text()
    assert (run_dir / "DONE").exists(), "the marker of the fourteen steps is kept"


def test_a_stop_file_ends_the_job(training: Training, tmp_path: Path) -> None:
    job = training.submit(tmp_path / "run", SLOW_STEP_S="1")
    job.wait_step(attempt=0, step=1)
    (job.run_dir / "STOP").touch()
    assert job.wait_end() == "COMPLETED", job.log
    assert job.restarts == 0
    assert "the next job with this run directory resumes" in job.log


def test_a_cancelled_job_is_not_requeued(training: Training, tmp_path: Path) -> None:
    """It saves if it has time, and is not started again."""
    job = training.submit(tmp_path / "run", SLOW_STEP_S="0.5")
    job.wait_step(attempt=0, step=1)
    training.cluster.end([job.number])
    assert job.facts()["JobState"] == "CANCELLED"
    assert job.restarts == 0
    assert (job.run_dir / "PREEMPTED").exists(), f"it had {KILL_WAIT_S} s to save"
