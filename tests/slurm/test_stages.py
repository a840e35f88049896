"""submit_all.sh on a real cluster: from text of four languages to an evaluated student, with one failure of a language."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import SAMPLES
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import FAULTS, Job, Training, same_weights

pytestmark = pytest.mark.timeout(3600)  # cores are often shared; every wait has its own limit
LANGUAGES = ["he", "hi", "sw", "tr"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    directory.mkdir()
    for language in LANGUAGES:
        shutil.copy(SAMPLES / "cc100" / f"{language}.txt.xz", directory)
    return directory


@pytest.fixture
def recipe(tmp_path: Path, tiny_recipe: Path, tiny_shards: Path) -> Path:
    """The tiny recipe with shards that do not exist yet."""
    path = tmp_path / "all_stages.yaml"
    path.write_text(tiny_recipe.read_text().replace(str(tiny_shards), str(tmp_path / "shards")))
    return path


def jobs_of(run_dir: Path) -> dict[str, str]:
    """Stage -> number of its newest job."""
    lines = (run_dir / "jobs.tsv").read_text().splitlines()
    return {stage: number for stage, number, _ in (line.split("\t") for line in lines)}


def wait_all(cluster: Cluster, run_dir: Path) -> dict[str, str]:
    """Stage -> state, after all jobs have ended."""
    numbers = jobs_of(run_dir)
    listed = f"--jobs={','.join(numbers.values())}"
    cluster.wait_for(lambda: not cluster.run("squeue", "--noheader", listed).strip(), "end of all stages", 400)
    states = {stage: cluster.state(number) for stage, number in numbers.items()}
    logs = "\n".join(path.read_text()[-1500:] for path in sorted((run_dir / "logs").glob("*.log")))
    print(f"{states}\n{logs}")
    return states


def test_text_to_evaluated_student(
    training: Training, tiny_tokenizer: Path, text: Path, recipe: Path, tmp_path: Path
) -> None:
    cluster, run_dir = training.cluster, tmp_path / "run"
    command = ["slurm/submit_all.sh", "--text", str(text), "--tokenizer", str(tiny_tokenizer), "--nodes", "2"]
    command += ["--shards", str(tmp_path / "shards"), "--recipe", str(recipe), "--ds", str(training.ds_json)]
    command += ["--run-dir", str(run_dir), "--evaluate"]
    command += [
        "--tasks retrieval --set retrieval.languages=[sw] --set retrieval.max_pairs=8 --set retrieval.max_length=64"
    ]
    environment = {"SITE_ENV": str(training.site_env), "PROCESSES_PER_NODE": "1"}

    complete = (text / "sw.txt.xz").read_bytes()
    (text / "sw.txt.xz").write_bytes(complete[: len(complete) // 2])  # an incomplete download
    cluster.run(*command, **environment)
    states = wait_all(cluster, run_dir)
    assert [states[stage] for stage in ("merge", "train", "evaluate")] == ["CANCELLED"] * 3
    status = cluster.run("slurm/submit_all.sh", "--status", str(run_dir), **environment)
    assert "FAILED: sw" in status
    assert "sw.txt.xz" in status, "the reason is shown too"
    assert status.count("never started") == 3
    assert {path.name for path in (tmp_path / "shards.parts").glob("*/manifest.json")} == {"manifest.json"}
    untouched = (tmp_path / "shards.parts" / "hi" / "manifest.json").stat().st_mtime_ns

    (text / "sw.txt.xz").write_bytes(complete)
    cluster.run(*command, **environment)
    states = wait_all(cluster, run_dir)
    assert set(states.values()) == {"COMPLETED"}
    assert (tmp_path / "shards.parts" / "hi" / "manifest.json").stat().st_mtime_ns == untouched
    assert (tmp_path / "shards" / "manifest.json").exists()
    assert (run_dir / "DONE").exists()
    assert (run_dir / "student" / "model.safetensors").exists()
    assert "retrieval" in json.loads((run_dir / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert list(run_dir.rglob("*.html")), "the report is missing"
    status = cluster.run("slurm/submit_all.sh", "--status", str(run_dir), **environment)
    assert "training: DONE" in status


def test_a_chain_of_jobs_where_requeueing_is_forbidden(
    cluster: Cluster, training: Training, plain_run: Path, tmp_path: Path
) -> None:
    """The first job is stopped and ends, the second resumes, the third finds a finished run."""
    run_dir = tmp_path / "run"
    command = ["slurm/submit_all.sh", "--from", "train", "--chain", "3", "--recipe", str(training.recipe)]
    command += ["--ds", str(training.ds_json), "--run-dir", str(run_dir)]
    environment = {"SITE_ENV": str(training.site_env), "PROCESSES_PER_NODE": "1", "PYTHONPATH": str(FAULTS)}
    cluster.run(*command, SLOW_STEP_S="1", **environment)
    lines = [line.split("\t") for line in (run_dir / "jobs.tsv").read_text().splitlines()]
    links = [Job(cluster, number, run_dir) for stage, number, _ in lines if stage == "train"]
    cluster.run("scancel", lines[-1][1])  # another test evaluates
    links[0].wait_step(attempt=0, step=2)
    links[0].preempt()
    assert [link.wait_end() for link in links] == ["COMPLETED"] * 3
    assert "ends; the next job" in (run_dir / "logs" / f"train-{links[0].number}.log").read_text()
    assert "is finished" in (run_dir / "logs" / f"train-{links[2].number}.log").read_text()
    assert same_weights(run_dir, plain_run)


def test_node_check_names_the_bad_node(
    cluster: Cluster, site_env: Path, tiny_recipe: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """First both nodes are fit. Then one has no shards. Then torch does not find the allotted GPUs."""

    def check(num_gpus: int = 0) -> str:
        log = tmp_path / f"check-{num_gpus}.log"
        options = ["--nodes=2", f"--gpus-per-node={num_gpus}", "--cpus-per-task=2", f"--output={log}"]
        environment = {"SITE_ENV": str(site_env), "PROCESSES_PER_NODE": "1", "MIN_FREE_GB": "0"}
        job = cluster.submit(*options, "slurm/node_check.sh", str(tiny_recipe), str(tmp_path / "run"), **environment)
        state = cluster.wait_state(job, "COMPLETED", "FAILED")
        return f"{state}\n{log.read_text()}"

    fit = check()
    assert fit.startswith("COMPLETED"), fit
    assert "all 2 nodes are fit" in fit
    cluster.on_node("n2", "mount", "-t", "tmpfs", "none", str(tiny_shards))
    try:
        bad = check()
    finally:
        cluster.on_node("n2", "umount", str(tiny_shards))
    assert bad.startswith("FAILED"), bad
    assert "BAD n2: DataError" in bad
    assert "BAD n1: DataError" not in bad
    no_gpus = check(num_gpus=2)
    assert no_gpus.startswith("FAILED"), no_gpus
    for node in ("n1", "n2"):
        assert f"BAD {node}: UserError: Slurm has allotted 2 GPU(s) on {node} to this job, and torch" in no_gpus


@pytest.mark.usefixtures("slurm_here")
def test_the_cluster_ends_with_its_owner(tmp_path: Path) -> None:
    """A host ends with all its processes when its pipe closes, as it does when the test session is killed."""
    with Cluster(tmp_path, num_nodes=1) as own:
        node = own.nodes["n1"]
        assert node.holder is not None
        assert node.holder.stdin is not None
        pids = [own.head.pid, node.pid]
        node.holder.stdin.close()
        own.wait_for(lambda: not Path(f"/proc/{pids[1]}").exists(), "end of the node")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
