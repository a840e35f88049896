"""Ranks that srun starts without a launcher: train.py reads Slurm's environment. These tests need no cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline.doctor.machine import device_findings
from pipeline.errors import UserError
from pipeline.evaluation.ranks import alone
from pipeline.runtime import gpus
from pipeline.runtime.allotment import allotted_gpus
from pipeline.runtime.dist import read_launch

TASK = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
}


@pytest.fixture
def environment(no_launcher: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No variables of a launcher, and a fake `scontrol`."""
    fake = tmp_path / "scontrol"
    fake.write_text(
        '#!/bin/sh\n[ "$3" = hostnames ] && echo "${FIRST_NODE}" && echo n2 || echo "NodeName=x NodeAddr=10.0.0.7"\n'
    )
    fake.chmod(0o755)
    no_launcher.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    no_launcher.setenv("FIRST_NODE", "localhost")
    return no_launcher


def start(environment: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**TASK, **changes}.items():
        environment.setenv(name, value)


def test_rank_size_and_first_node(environment: pytest.MonkeyPatch) -> None:
    start(environment)
    launch = read_launch()
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 8, 1)
    assert os.environ["MASTER_ADDR"] == "localhost"
    assert 15000 <= int(os.environ["MASTER_PORT"]) < 30000


def test_an_address_replaces_a_name_that_does_not_resolve(environment: pytest.MonkeyPatch) -> None:
    start(environment, FIRST_NODE="no-such-host.invalid")
    read_launch()
    assert os.environ["MASTER_ADDR"] == "10.0.0.7"


def test_without_scontrol_the_message_names_the_variable_to_set(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start(environment, PATH=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="Set MASTER_ADDR"):
        read_launch()


def test_one_node_needs_no_scontrol(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start(environment, PATH=str(tmp_path / "empty"), SLURM_STEP_NUM_NODES="1")
    read_launch()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_every_attempt_has_another_port(environment: pytest.MonkeyPatch) -> None:
    ports = set()
    for attempt in range(20):
        start(environment, SLURM_RESTART_COUNT=str(attempt))
        read_launch()
        ports.add(os.environ.pop("MASTER_PORT"))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            os.environ.pop(name)
    assert len(ports) == 20


def test_a_batch_script_without_srun_is_one_process(environment: pytest.MonkeyPatch) -> None:
    """SLURM_NTASKS is then what srun could start, and SLURM_PROCID is 0."""
    start(environment, SLURM_PROCID="0")
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_ID"):
        environment.delenv(name)
    assert read_launch().world_size == 1


def test_a_launcher_under_srun_overrides_slurm(environment: pytest.MonkeyPatch) -> None:
    start(environment, RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="12345")
    assert read_launch().world_size == 2


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ({"SLURM_STEP_ID": "2", "SLURM_STEP_GPUS": "0,1", "SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"SLURM_STEP_ID": "2", "SLURM_STEP_GPUS": "3", "SLURM_GPUS_ON_NODE": "8"}, 1),  # --gpus-per-task=1
        ({"SLURM_STEP_ID": "2", "SLURM_STEP_GPUS": "0-3,6"}, 5),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_GPUS": "0,1,2,3,4,5,6,7"}, 8),  # a batch script
        ({"SLURM_JOB_GPUS": "0,1"}, 2),
        ({"SLURM_STEP_ID": "2", "SLURM_JOB_GPUS": "0,1"}, 0),  # a step without GPUs in a job with GPUs
        ({"SLURM_STEP_ID": "2", "SLURM_GPUS_ON_NODE": "0"}, 0),
        ({}, 0),
    ],
)
def test_gpus_that_slurm_has_allotted(slurm: dict[str, str], expected: int) -> None:
    assert allotted_gpus(slurm) == expected


def test_no_cpu_rank_on_allotted_gpus(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_available", lambda: False)
    start(environment, SLURM_STEP_GPUS="0,1", CUDA_VISIBLE_DEVICES="")
    with pytest.raises(UserError, match=r"has allotted 2 .*sees none.*export ALLOW_CPU_RANKS=1") as error:
        read_launch()
    assert "build of torch for CPUs" in str(error.value) or "CUDA_VISIBLE_DEVICES is empty" in str(error.value)
    with pytest.raises(UserError, match="has allotted 2"):
        alone()  # an evaluation without a launcher
    environment.setenv("ALLOW_CPU_RANKS", "1")
    assert read_launch().device.type == alone().device.type == "cpu"


def test_doctor_fails_where_torch_finds_no_allotted_gpu(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_available", lambda: False)
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    start(environment, SLURM_STEP_GPUS="0")
    assert next(finding.status for finding in device_findings()) == "fail"


def test_a_task_that_sees_only_its_own_gpu(environment: pytest.MonkeyPatch) -> None:
    """--gpus-per-task=1 or --gpu-bind: cuda:0 for every local rank, and DeepSpeed reads LOCAL_RANK."""
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 1)
    environment.setattr(gpus, "check_usable", lambda device: None)
    start(environment, SLURM_STEP_GPUS="1", SLURM_GPUS_ON_NODE="4")
    launch = read_launch()
    assert (launch.device, launch.local_rank, launch.rank) == (torch.device("cuda", 0), 0, 5)
    assert os.environ["LOCAL_RANK"] == "0"
