"""Every stage in a container, on nodes without any other Python: both kinds of lines in slurm/site.example.env."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SAMPLES
from tests.slurm.cluster import Cluster
from tests.slurm.containers import KINDS, container_lines, hosts_of, is_real, load_pyxis, move_python_into_image
from tests.slurm.jobs import FAULTS, Job

pytestmark = [pytest.mark.timeout(3600), pytest.mark.usefixtures("slurm_here")]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images") / "minilmv2.sif"


@pytest.fixture(scope="module")
def bare_cluster(slurm_here: None, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A login node and two nodes on which Python exists only in the image. A signal reaches only the first process of a task."""
    directory = tmp_path_factory.mktemp("bare-cluster")
    load_pyxis(directory)
    with Cluster(directory, track="pgid") as cluster:
        for host in hosts_of(cluster):
            move_python_into_image(host, image)
        yield cluster


def site_settings(kind: str, image: Path, directory: Path, shared: Path) -> Path:
    """A site.env as a user would write it, with this kind of container."""
    lines = container_lines(kind, Path(os.environ["PYXIS_IMAGE"]) if is_real(kind) else image, shared)
    lines += [
        f"{stage}_SBATCH=(--cpus-per-task=2 --gpus-per-node=0)" for stage in ("PREPARE", "MERGE", "TRAIN", "EVALUATE")
    ]
    lines.append("export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MINILMV2_VERBOSE=1")  # a line for every step
    path = directory / f"{kind}.env"
    path.write_text("\n".join([*lines, ""]))
    return path


@pytest.mark.parametrize("python", ["python", "python3", sys.executable])
def test_a_script_that_calls_the_nodes_own_python_fails(python: str, bare_cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = bare_cluster.submit(f"--output={log}", f"--wrap={python} -c 'print(1 + 1)'")
    assert bare_cluster.wait_state(job, "COMPLETED", "FAILED") == "FAILED"
    assert re.search("not found|No such file|Permission denied", log.read_text()), log.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_in_a_container(
    kind: str,
    bare_cluster: Cluster,
    image: Path,
    tiny_recipe: Path,
    tiny_shards: Path,
    tiny_tokenizer: Path,
    fp32_config: Path,
    tmp_path: Path,
) -> None:
    """Text to evaluated student on two nodes, with one preemption: the ranks save, and the job is requeued and resumes."""
    text, shards, run_dir, recipe = (tmp_path / name for name in ("text", "shards", "run", "all_stages.yaml"))
    text.mkdir()
    for language in ("he", "hi", "sw", "tr"):
        shutil.copy(SAMPLES / "cc100" / f"{language}.txt.xz", text)
    recipe.write_text(tiny_recipe.read_text().replace(str(tiny_shards), str(shards)))
    settings = site_settings(kind, image, tmp_path, tiny_recipe.parents[1])
    environment = {"SITE_ENV": str(settings), "PROCESSES_PER_NODE": "1", "PYTHONPATH": str(FAULTS)}
    environment |= {"SLOW_STEP_S": "1", "SLOW_ATTEMPTS": "1"}
    command = ["slurm/submit_all.sh", "--text", str(text), "--tokenizer", str(tiny_tokenizer), "--nodes", "2"]
    command += ["--shards", str(shards), "--recipe", str(recipe), "--ds", str(fp32_config), "--run-dir", str(run_dir)]
    sets = ("retrieval.languages=[sw]", "retrieval.max_pairs=8", "retrieval.max_length=64")
    command += ["--evaluate", " ".join(["--tasks retrieval", *(f"--set {item}" for item in sets)])]
    bare_cluster.run(*command, **environment)

    lines = [line.split("\t") for line in (run_dir / "jobs.tsv").read_text().splitlines()]
    jobs = {stage: Job(bare_cluster, number, run_dir) for stage, number, _ in lines}
    jobs["train"].wait_step(attempt=0, step=2)
    jobs["train"].preempt()
    states = {stage: job.wait_end() for stage, job in jobs.items()}
    logs = "\n".join(path.read_text()[-1500:] for path in sorted((run_dir / "logs").glob("*.log")))
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{logs}"
    assert jobs["train"].restarts == 1
    assert "stopped on request" in (run_dir / "logs" / f"train-{jobs['train'].number}.log").read_text()
    assert "retrieval" in json.loads((run_dir / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert (run_dir / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_nodes_are_checked_in_a_container(
    kind: str, bare_cluster: Cluster, image: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    settings, log = site_settings(kind, image, tmp_path, tiny_recipe.parents[1]), tmp_path / "log"
    options = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", f"--output={log}"]
    environment = {"SITE_ENV": str(settings), "PROCESSES_PER_NODE": "1", "MIN_FREE_GB": "0"}
    run_dir = str(tmp_path / "run")
    job = bare_cluster.submit(*options, "slurm/node_check.sh", str(tiny_recipe), run_dir, **environment)
    assert bare_cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert "all 2 nodes are fit" in log.read_text()
