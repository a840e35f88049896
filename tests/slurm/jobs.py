"""Submit training jobs as a user does, disturb them, and read their results."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pipeline.runtime.checkpoint import read_model_weights
from tests.slurm.cluster import Cluster

SCRIPT = "slurm/distill_xlmr.sh"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
FAULTS = Path(__file__).parent / "faults"


@dataclass
class Training:
    """The inputs of `sbatch slurm/distill_xlmr.sh` for the tiny student on the test cluster."""

    cluster: Cluster
    site_env: Path
    recipe: Path
    ds_json: Path

    def submit(self, run_dir: Path, *options: str, extra: tuple[str, ...] = (), **environment: str) -> Job:
        """One job on CPUs, by default with one process per node. `options` are those of sbatch."""
        small = ["--gpus-per-node=0", "--cpus-per-task=2", f"--output={run_dir}.out"]
        environment = {"SITE_ENV": str(self.site_env), "PROCESSES_PER_NODE": "1", **environment}
        environment["PYTHONPATH"] = str(FAULTS)
        arguments = [str(self.recipe), str(self.ds_json), str(run_dir), *extra]
        number = self.cluster.submit(*small, *options, SCRIPT, *arguments, **environment)
        return Job(self.cluster, number, run_dir)

    def submit_without_launcher(self, run_dir: Path, *options: str) -> Job:
        """`srun python pipeline/train.py`, one task per rank, without a launcher."""
        arguments = ["--deepspeed", str(self.ds_json), "--recipe", str(self.recipe), "--run-dir", str(run_dir)]
        command = shlex.join(["srun", sys.executable, "pipeline/train.py", *arguments])
        number = self.cluster.submit(*options, f"--output={run_dir}.out", f"--wrap={command}", OMP_NUM_THREADS="1")
        return Job(self.cluster, number, run_dir)


@dataclass
class Job:
    cluster: Cluster
    number: str
    run_dir: Path
    restart_delay_s: int = 3

    @property
    def log(self) -> str:
        """The batch log of all attempts of the job."""
        path = self.run_dir.with_name(self.run_dir.name + ".out")
        return path.read_text() if path.exists() else ""

    def node_logs(self, attempt: int) -> dict[str, str]:
        """Node -> the output of its ranks in one attempt of the job."""
        prefix = f"job{self.number}-attempt{attempt}-"
        paths = (self.run_dir / "logs").glob(f"{prefix}*.log")
        return {path.stem.removeprefix(prefix): path.read_text() for path in paths}

    def facts(self) -> dict[str, str]:
        return self.cluster.describe("job", self.number)

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def state(self) -> str:
        """The job's state. Also shortens the two minutes that Slurm makes a requeued job wait, to `restart_delay_s`.

        Not to zero: a node rejects a job that it killed within the same second, and may kill the new attempt.
        """
        facts = self.facts()
        if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
            begins = datetime.fromisoformat(facts["EligibleTime"])
            if begins > datetime.now() + timedelta(seconds=self.restart_delay_s + 2):
                soon = f"StartTime=now+{self.restart_delay_s}seconds"
                self.cluster.attempt("scontrol", "update", f"jobid={self.number}", soon)
        return facts["JobState"]

    def wait_end(self) -> str:
        """Wait for the final state of the job, and return it."""
        self.cluster.wait_for(lambda: self.state() in FINAL, f"end of job {self.number}")
        return self.state()

    def wait_step(self, attempt: int, step: int) -> None:
        """Wait until attempt `attempt` has finished step `step` or a later one."""

        def reached() -> bool:
            assert self.state() not in FINAL, f"the job ended before step {step} of attempt {attempt}:\n{self.log}"
            return any(done >= step for log in self.node_logs(attempt).values() for done in steps_in(log))

        self.cluster.wait_for(reached, f"step {step} in attempt {attempt} of job {self.number}")

    def wait_until_saved(self, attempt: int) -> None:
        """Wait until the batch script has logged that attempt `attempt` stopped on request."""
        self.cluster.wait_for(
            lambda: self.log.count("stopped on request") > attempt, f"save of attempt {attempt} of job {self.number}"
        )

    def preempt(self) -> None:
        """Send USR1 to the batch script, as Slurm does before a time limit."""
        self.cluster.run("scancel", "--signal=USR1", "--batch", self.number)


def steps_in(log: str) -> list[int]:
    """Steps that a rank reported as finished, in order."""
    return [int(number) for number in re.findall(r"^step (\d+) of \d+  loss", log, re.MULTILINE)]


def same_weights(a: Path, b: Path) -> bool:
    """Whether all weights are equal bit for bit, trained and untrained."""
    (one, _), (two, _) = read_model_weights(a), read_model_weights(b)
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
