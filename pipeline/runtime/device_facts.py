"""What a report says about the device of this process: its name, and its memory at the peak."""

from __future__ import annotations

import platform
import resource

import torch


def device_name(device: torch.device) -> str:
    """The name that the driver gives to a GPU, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def peak_memory_bytes(device: torch.device) -> int:
    """The peak of this process so far: reserved on its GPU, or resident in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
