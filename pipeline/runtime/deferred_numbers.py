"""Numbers of a step that the host reads later, so that it never waits for the device between two steps.

In: a tensor of figures on the device. Out: the same figures as Python numbers, once somebody asks for them.
"""

from __future__ import annotations

import torch


class DeferredNumbers:
    """A copy of `values_N` [N] that travels to pinned host memory while the device computes.

    `read` waits only for the work that was queued before this copy. The caller reads it one step later, when that work is
    done, or immediately where it has to report.
    """

    def __init__(self, values_N: torch.Tensor):
        self._arrived: torch.cuda.Event | None = None
        self._host_N = values_N
        if values_N.device.type == "cuda":
            self._host_N = torch.empty(values_N.shape, dtype=values_N.dtype, pin_memory=True)
            self._host_N.copy_(values_N, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The figures as Python numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host_N.tolist()
