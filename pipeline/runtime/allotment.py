"""Compares the GPUs that Slurm has allotted to this process with those that torch sees.

In: Slurm's environment. Out: their number, or a `UserError` where torch sees none of them: such a run would train on CPUs,
hundreds of times slower, and leave its GPUs idle.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.errors import UserError

ALLOW = "ALLOW_CPU_RANKS"  # 1 allows it, for a test on a GPU node, for example
NVIDIA_DRIVER = Path("/dev/nvidiactl")  # exists where the driver has found a GPU


def allotted_gpus(environment: Mapping[str, str] | None = None) -> int:
    """Number of GPUs of this node that Slurm gave to this step, or to the batch script; 0 outside of Slurm."""
    environment = os.environ if environment is None else environment
    if "SLURM_STEP_GPUS" in environment:
        return _num_listed(environment["SLURM_STEP_GPUS"])
    if environment.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        return int(environment["SLURM_GPUS_ON_NODE"])
    if "SLURM_STEP_ID" in environment:  # a step without GPUs inherits the variables of the job
        return 0
    return _num_listed(environment.get("SLURM_JOB_GPUS", ""))


def check_allotted_gpus() -> None:
    """Raise a `UserError` where Slurm has allotted GPUs and torch sees none. dist.py checks for too few GPUs."""
    allotted, seen = allotted_gpus(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen or not allotted or os.environ.get(ALLOW) == "1":
        return
    raise UserError(
        f"Slurm has allotted {allotted} GPU(s) on {socket.gethostname()} to this job, and torch {torch.__version__} sees "
        f"none: {why_unseen()}. To train on CPUs nevertheless: export {ALLOW}=1"
    )


def why_unseen() -> str:
    """The likely cause why torch sees no GPU, and its fix."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and torch.version.hip is None:
        return "this is a build of torch for CPUs; install the one for your driver's CUDA (pytorch.org)"
    if visible is not None and not visible.strip(" ,"):
        return "CUDA_VISIBLE_DEVICES is empty; run `unset CUDA_VISIBLE_DEVICES` in the job's environment"
    if not NVIDIA_DRIVER.exists():
        return "the driver's device file /dev/nvidiactl does not exist; does `nvidia-smi` work, in the container too (--nv)?"
    return f"torch is built for CUDA {torch.version.cuda}, CUDA_VISIBLE_DEVICES is {visible!r}; does `nvidia-smi` work here?"


def unused_gpu_warning() -> str | None:
    """A warning for any machine whose GPU torch does not see, unless CUDA_VISIBLE_DEVICES is empty on purpose."""
    if torch.cuda.is_available() or not NVIDIA_DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    return f"this machine has a GPU and torch {torch.__version__} sees none, so this runs on CPUs: {why_unseen()}"


def _num_listed(listed: str) -> int:
    """The number of GPUs in a list such as `0,1` or `0-3,7`."""
    num = 0
    for part in filter(None, (part.strip() for part in listed.split(","))):
        first, _, last = part.partition("-")
        is_range = first.isdecimal() and last.isdecimal()
        num += int(last) - int(first) + 1 if is_range else 1
    return num
