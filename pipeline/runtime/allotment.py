"""Compares the GPUs that Slurm has allotted to this process, or that this machine has, with those that torch sees.

In: Slurm's environment, the driver's device file. Out: their number, a warning, or a `UserError` where torch sees none of them
although it should: such a run would train on CPUs, hundreds of times slower, and leave its GPUs idle.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.runtime import gpus

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
    """Raise a `UserError` where torch sees no GPU although Slurm has allotted some, or cannot use those that are here.

    Whether each rank has one of its own is checked in dist.py.
    """
    if gpus.available() or os.environ.get(ALLOW) == "1":
        return
    allotted, host = allotted_gpus(), socket.gethostname()
    if allotted:
        problem = f"Slurm has allotted {allotted} GPU(s) on {host} to this job, and torch {torch.__version__} sees none"
    elif _is_broken():
        problem = f"{host} has a GPU, and torch {torch.__version__} cannot use it"
    else:
        return
    raise UserError(f"{problem}: {why_unseen()}. To train on CPUs nevertheless: export {ALLOW}=1")


def why_unseen() -> str:
    """The likely cause why torch sees no GPU, and its fix."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _is_built_for_cpus():
        return "this is a build of torch for CPUs; install the one for your driver's CUDA (pytorch.org)"
    if visible is not None and not visible.strip(" ,"):
        return "CUDA_VISIBLE_DEVICES is empty; run `unset CUDA_VISIBLE_DEVICES` in the job's environment"
    if not NVIDIA_DRIVER.exists():
        return "the driver's device file /dev/nvidiactl does not exist; does `nvidia-smi` work, in the container too (--nv)?"
    reason = gpus.why_unavailable() or "torch gives no reason"
    return f"{reason.rstrip('.')} (torch is built for CUDA {torch.version.cuda}, CUDA_VISIBLE_DEVICES is {visible!r}). {gpus.remedy(reason)}"


def unused_gpu_warning() -> str | None:
    """A warning for any machine whose GPU torch does not see, unless CUDA_VISIBLE_DEVICES is empty on purpose."""
    if gpus.available() or not NVIDIA_DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    return f"this machine has a GPU and torch {torch.__version__} sees none, so this runs on CPUs: {why_unseen()}"


def _is_broken() -> bool:
    """Whether the driver shows a GPU that this build of torch is meant for and cannot use.

    Not where a process simply has no GPU: without the driver's library (a container), or without permission for any device (a
    job for CPUs on a node with GPUs). There a run on CPUs is what was asked for.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _is_built_for_cpus() or visible == "" or not NVIDIA_DRIVER.exists():
        return False
    reason = gpus.why_unavailable() or ""
    return not reason.startswith(gpus.NO_DRIVER) and (not reason.startswith(gpus.NO_GPU) or visible is not None)


def _is_built_for_cpus() -> bool:
    return torch.version.cuda is None and torch.version.hip is None


def _num_listed(listed: str) -> int:
    """The number of GPUs in a list such as `0,1` or `0-3,7`."""
    num = 0
    for part in filter(None, (part.strip() for part in listed.split(","))):
        first, _, last = part.partition("-")
        is_range = first.isdecimal() and last.isdecimal()
        num += int(last) - int(first) + 1 if is_range else 1
    return num
