"""Time, memory, kernel launches and host reads of an action on the device.

In: a function. Out: medians in milliseconds, MiB, counts. On a GPU by CUDA events and torch's profiler, otherwise by the clock.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Action = Callable[[], Any]
HOST_READ = "aten::_local_scalar_dense"  # behind item(), float(tensor), bool(tensor)
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # of a blocking copy, of an event


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def on_gpu() -> bool:
    return device().type == "cuda"


def half_precision() -> torch.dtype:
    """fp16 on a GPU; bf16 on a CPU, which has few fp16 kernels."""
    return torch.float16 if on_gpu() else torch.bfloat16


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Return what deleted models held: DeepSpeed's engines refer to themselves."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


class Moment:
    """A point in the device's work, marked without waiting for it."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu() else None
        if self._event:
            self._event.record()
        self._clock_s = time.perf_counter()

    def ms_until(self, later: Moment) -> float:
        """Milliseconds on the device. Call it after `synchronize()`."""
        if self._event and later._event:
            return self._event.elapsed_time(later._event)
        return 1e3 * (later._clock_s - self._clock_s)


def median_ms(action: Action, repeats: int = 10, warm_up: int = 3) -> float:
    """Median time of one call on the device."""
    for _ in range(warm_up):
        action()
    synchronize()
    moments = [Moment()]
    for _ in range(repeats):
        action()
        moments.append(Moment())
    synchronize()
    return statistics.median(one.ms_until(other) for one, other in itertools.pairwise(moments))


def added_peak_mib(action: Action) -> float | None:
    """Most memory that was allocated above what was there before; None on a CPU."""
    if not on_gpu():
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def profiled(action: Action) -> dict[str, float | int | None]:
    """Kernels and copies on the device, its busy milliseconds, host reads and waits of one call. The GPU's are None on a CPU."""
    synchronize()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu() else [])
    with profile(activities=activities) as profiler:
        action()
        synchronize()
    events = profiler.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in on_device if not getattr(event, "is_user_annotation", False)]  # else names of ranges
    waits = sum(event.name in WAITS for event in events)
    return {
        "kernels": len(kernels) if on_gpu() else None,
        "busy ms": sum(event.time_range.elapsed_us() for event in kernels) / 1e3 if on_gpu() else None,
        "host reads": sum(event.name == HOST_READ for event in events),
        "waits": waits if on_gpu() else None,
    }
