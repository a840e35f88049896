"""Real ranks of pipeline/train.py that each see one GPU: their own, or by mistake the same. The GPUs are stated.

Ranks that pass the check continue to NCCL, and there torch ends them.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import EXIT_USER
from tests.conftest import REPO
from tests.dist.ports import free_port
from tests.dist.runs import end_group, launcher, start

# What a build of torch for CPUs says, and what one for CUDA says on a machine without a GPU.
NO_NCCL = (
    "device_id cuda:0 does not match the current compilation's accelerator support|NCCL is only supported with GPUs"
)
STATED = Path(__file__).parent / "stated_gpus"
ENVIRONMENT = {"PYTHONPATH": f"{STATED}{os.pathsep}{REPO}", "DS_ACCELERATOR": "cpu"}


def task(rank: int, visible: str) -> dict[str, str]:
    """The environment of one of two tasks that `srun --gpus-per-task=1` or `--gpu-bind=single:1` starts on one node."""
    slurm = {"PROCID": rank, "LOCALID": rank, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1, "STEP_NODELIST": "n1"}
    return {**{f"SLURM_{name}": str(value) for name, value in slurm.items()}, "CUDA_VISIBLE_DEVICES": visible}


def run_tasks(visible: list[str], words: list[str], tmp_path: Path) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two tasks."""
    port, logs = str(free_port()), [tmp_path / f"task{rank}.log" for rank in range(2)]
    tasks = [
        start([*launcher("python"), *words], log, **ENVIRONMENT, **task(rank, visible[rank]), MASTER_PORT=port)
        for rank, log in enumerate(logs)
    ]
    try:
        return [one.wait(120) for one in tasks], [log.read_text() for log in logs]
    finally:
        for one in tasks:
            end_group(one)


@pytest.fixture
def words(tiny_recipe: Path, fp32_config: Path, tmp_path: Path) -> list[str]:
    return ["--deepspeed", str(fp32_config), "--recipe", str(tiny_recipe), "--run-dir", str(tmp_path / "run")]


def test_each_slurm_task_sees_its_own_gpu(words: list[str], tmp_path: Path) -> None:
    _, outputs = run_tasks(["0", "1"], words, tmp_path)
    assert re.search(NO_NCCL, outputs[0]), "rank 1 has met it"
    for output in outputs:
        assert "same GPU" not in output
        assert "no GPU of its own" not in output


def test_two_slurm_tasks_on_one_gpu(words: list[str], tmp_path: Path) -> None:
    codes, outputs = run_tasks(["3", "3"], words, tmp_path)
    assert codes == [EXIT_USER, EXIT_USER]
    for output in outputs:
        assert "error: rank 0 and rank 1 use the same GPU: NVIDIA H100 on" in output
        assert "uuid-of-3; each of them sees 1" in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists(), "a rejected run leaves no files"


def test_torchrun_starts_more_ranks_than_there_are_gpus(words: list[str], tmp_path: Path) -> None:
    log = tmp_path / "torchrun.log"
    job = start([*launcher("torchrun", 2), *words], log, **ENVIRONMENT)
    try:
        job.wait(180)
    except subprocess.TimeoutExpired:
        pytest.fail(log.read_text())
    finally:
        end_group(job)
    assert "error: rank 0 and rank 1 use the same GPU: NVIDIA H100 on" in log.read_text()
    assert not (tmp_path / "run").exists()
