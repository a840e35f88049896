"""The GPUs that this process sees, and whether torch can compute on them. All questions to torch.cuda about devices are here.

In: torch.cuda's answers and errors. Out: numbers, `Gpu`, or a `UserError` that says why a GPU cannot be used and what to do.
"""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import dataclass

import torch

from pipeline.errors import UserError

BF16_SINCE = (8, 0)  # compute capability; torch also says yes to V100 and T4, where bf16 is emulated and slow
NO_DRIVER = "Found no NVIDIA driver"  # torch.cuda.init where libcuda is missing
NO_GPU = "No CUDA GPUs are available"  # torch.cuda.init where the driver works and shows no GPU
# What CUDA and torch say, in lower case, and what to do about it.
_REMEDIES = {
    "driver on your system is too old": "Update the driver, or install the build of torch for the CUDA that `nvidia-smi` "
    "shows (pytorch.org)",
    "no kernel image is available": "Install a build of torch for this GPU (pytorch.org)",
    "busy or unavailable": "Another process holds the GPU, or it is in exclusive mode, or its MIG mode has no instance: "
    "`nvidia-smi` shows which. End that process, `nvidia-smi --compute-mode=DEFAULT`, or choose another GPU by "
    "CUDA_VISIBLE_DEVICES",
    "out of memory": "Other processes fill the GPU's memory: `nvidia-smi` shows them. End them, or choose another GPU by "
    "CUDA_VISIBLE_DEVICES",
    "system not yet initialized": "The fabric manager of this node does not run: `systemctl start nvidia-fabricmanager`",
    "unsupported display driver": "The driver's kernel module and its libraries have different versions: restart the node "
    "after a driver update, and in a container use the host's libraries",
    "no cuda gpus are available": "CUDA_VISIBLE_DEVICES must name GPUs that `nvidia-smi --list-gpus` lists",
}
_OTHER_REMEDY = (
    "Does `nvidia-smi` work on this node? `dmesg | grep -i xid` shows faults of a GPU; exclude a defective node"
)
_ERRORS = (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError)  # torch's, of a GPU that cannot be used


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver describes it. `uuid` is the same for every process that uses the GPU."""

    name: str
    capability: tuple[int, int]
    uuid: str
    memory_bytes: int


def available() -> bool:
    """Whether torch sees a GPU. Torch's warning about a driver that it cannot use is left to `why_unavailable`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="CUDA initialization")
        return torch.cuda.is_available()


def count() -> int:
    """The number of GPUs that torch sees in this process."""
    return torch.cuda.device_count() if available() else 0


def describe(device: torch.device) -> Gpu:
    """Name, capability, UUID and memory of one GPU. It needs no memory there."""
    about = torch.cuda.get_device_properties(device)
    return Gpu(about.name, (about.major, about.minor), str(about.uuid), about.total_memory)


def has_bf16(device: torch.device) -> bool:
    """Whether the GPU computes in bf16 itself."""
    return torch.cuda.get_device_capability(device) >= BF16_SINCE


def why_unavailable() -> str | None:
    """What torch says about its GPUs, in one line; None where it can initialise CUDA."""
    try:
        torch.cuda.init()
    except _ERRORS as error:
        return " ".join(str(error).split())
    return None


def remedy(reason: str) -> str:
    """What to do about an error of CUDA or torch that says that a GPU cannot be used."""
    return next((text for words, text in _REMEDIES.items() if words in reason.lower()), _OTHER_REMEDY)


def check_usable(device: torch.device) -> None:
    """Compute on a GPU, which makes it this process's current one. Raises `UserError` where that fails."""
    try:
        torch.cuda.set_device(device)
        total = sum_of_ones(device, 1024)
    except _ERRORS as error:
        reason = str(error).partition("\n")[0]  # the other lines are about debugging kernels
    else:
        if total == 1024:
            return
        reason = f"the sum of 1024 ones is {total:g}"
    raise UserError(
        f"torch {torch.__version__} cannot compute on {device} of {socket.gethostname()}{_name_of(device)}: {reason}. "
        f"{remedy(reason)}"
    )


def sum_of_ones(device: torch.device, num: int) -> float:
    """A sum that the device has to compute and the host waits for."""
    return float(torch.ones(num, device=device).sum())


def _name_of(device: torch.device) -> str:
    """For a message about a GPU that may not answer: its name and capability, and those that this torch is built for."""
    try:
        gpu, built_for = describe(device), " ".join(torch.cuda.get_arch_list())
    except _ERRORS:
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return f" ({gpu.name}, sm_{gpu.capability[0]}{gpu.capability[1]}; torch is built for {built_for}; CUDA_VISIBLE_DEVICES is {visible})"
