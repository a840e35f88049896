"""The cluster and the runs of the Slurm tests. They skip without Slurm or root; SLURM_TESTS=require makes that a failure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.dist.runs import train
from tests.slurm.cluster import Cluster, why_impossible
from tests.slurm.jobs import Training


@pytest.fixture(scope="session")
def slurm_here() -> None:
    """Skips or fails the test where no cluster can be made."""
    if reason := why_impossible():
        if os.environ.get("SLURM_TESTS") == "require":
            pytest.fail(f"SLURM_TESTS=require, but {reason}")
        pytest.skip(f"no Slurm cluster here: {reason}")


@pytest.fixture(scope="session")
def cluster(slurm_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with real slurmd under a real slurmctld."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site_env(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's settings as a user would write them: nodes of two CPUs per task and no GPU."""
    path = tmp_path_factory.mktemp("site") / "site.env"
    lines = [f"PYTHON={sys.executable}", "export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MINILMV2_VERBOSE=1"]
    for stage in ("PREPARE", "MERGE", "TRAIN", "EVALUATE"):
        lines.append(f"{stage}_SBATCH=(--cpus-per-task=2 --gpus-per-node=0)")
    path.write_text("\n".join([*lines, ""]))
    return path


@pytest.fixture(scope="session")
def training(cluster: Cluster, site_env: Path, tiny_recipe: Path, fp32_config: Path) -> Training:
    return Training(cluster, site_env, tiny_recipe, fp32_config)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, fp32_config: Path) -> Path:
    """The uninterrupted single process, without Slurm, that jobs are compared with."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train("python", 1, run_dir, ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe)])
    return run_dir


@pytest.fixture(scope="session")
def two_node_run(tmp_path_factory: pytest.TempPathFactory, training: Training) -> Path:
    """The uninterrupted run of one rank on each node, started by srun itself, that disturbed jobs are compared with."""
    run_dir = tmp_path_factory.mktemp("two-nodes") / "run"
    job = training.submit_without_launcher(run_dir, "--nodes=2")
    assert job.wait_end() == "COMPLETED", job.log
    return run_dir


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are submitted from the root of the repository, from whatever directory pytest was started."""
    monkeypatch.chdir(REPO)
