"""Submit training jobs as a user does, disturb them, and read what they left behind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.checkpoint import read_model_weights
from tests.conftest import REPO
from tests.slurm.cluster import Cluster

SCRIPT = "slurm/distill_xlmr.sh"
FAULTS = Path(__file__).parent / "faults"


@dataclass
class Training:
    """What `sbatch slurm/distill_xlmr.sh` needs to train the tiny student on the cluster."""

    cluster: Cluster
    site_env: Path
    recipe: Path
    ds_json: Path

    def submit(self, run_dir: Path, *options: str, extra: tuple[str, ...] = (), **environment: str) -> Job:
        """One job on CPUs, one process per node unless said otherwise; `options` are sbatch's."""
        small = ["--gpus-per-node=0", "--cpus-per-task=2", f"--output={run_dir}.out"]
        environment = {"SITE_ENV": str(self.site_env), "PROCESSES_PER_NODE": "1", **environment}
        environment["PYTHONPATH"] = f"{FAULTS}:{REPO}"
        arguments = [str(self.recipe), str(self.ds_json), str(run_dir), *extra]
        number = self.cluster.submit(*small, *options, SCRIPT, *arguments, **environment)
        return Job(self.cluster, number, run_dir)


@dataclass
class Job:
    cluster: Cluster
    number: str
    run_dir: Path

    @property
    def log(self) -> str:
        """The batch log: one screen about the job, over all its lives."""
        path = self.run_dir.with_name(self.run_dir.name + ".out")
        return path.read_text() if path.exists() else ""

    def node_logs(self, life: int) -> dict[str, str]:
        """Node -> what its ranks said in one life of the job."""
        prefix = f"job{self.number}-life{life}-"
        paths = (self.run_dir / "logs").glob(f"{prefix}*.log")
        return {path.stem.removeprefix(prefix): path.read_text() for path in paths}

    def facts(self) -> dict[str, str]:
        return self.cluster.describe("job", self.number)

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def wait_end(self) -> str:
        """The state in which the job ended for good."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.cluster.wait_state(self.number, *final)

    def wait_step(self, life: int, step: int) -> None:
        """Until life `life` has finished a step numbered `step` or higher."""

        def reached() -> bool:
            if self.facts()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"):
                raise AssertionError(f"the job ended before step {step} of life {life}:\n{self.log}")
            return any(done >= step for log in self.node_logs(life).values() for done in steps_in(log))

        self.cluster.wait_for(reached, f"step {step} in life {life} of job {self.number}")

    def preempt(self) -> None:
        """What Slurm does ahead of a time limit: USR1 to the batch script."""
        self.cluster.run("scancel", "--signal=USR1", "--batch", self.number)

    def wait_life(self, life: int) -> None:
        self.cluster.wait_for(lambda: self.restarts >= life, f"life {life} of job {self.number}")


def steps_in(log: str) -> list[int]:
    """Steps that a rank reported as finished, in order."""
    return [int(number) for number in re.findall(r"^step (\d+)/\d+  loss", log, re.MULTILINE)]


def same_weights(a: Path, b: Path) -> bool:
    """Bit for bit, trained and carried along."""
    (one, _), (two, _) = read_model_weights(a), read_model_weights(b)
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
