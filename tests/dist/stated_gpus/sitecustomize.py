"""In every rank: torch.cuda's answers about GPUs, for a machine without one. First on PYTHONPATH, so Python imports it.

CUDA_VISIBLE_DEVICES names the GPUs that a process sees, and thereby their UUIDs. Without it, there is one.
"""

import os

if "SLURM_PROCID" in os.environ or "RANK" in os.environ:
    from types import SimpleNamespace

    import torch

    from pipeline.runtime import gpus

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    about = [
        SimpleNamespace(name="NVIDIA H100", major=9, minor=0, uuid=f"uuid-of-{number}", total_memory=80 << 30)
        for number in visible
    ]
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(visible)
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: about[device.index]
    gpus.sum_of_ones = lambda device, num: float(num)
