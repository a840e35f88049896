"""DeepSpeed's dynamic loss scaler with its state on the device.

In: DeepSpeed's scaler as configured, and for each step a tensor that says whether it overflowed. Out: the same scales, step
by step, as tensors: the host never waits for a verdict.
"""

from __future__ import annotations

from typing import Any

import torch

LARGEST = 2.0**127  # the next power of two is infinite in fp32, and an infinite scale never falls again


class DeviceLossScaler:
    """Takes the place of DeepSpeed's `DynamicLossScaler` in its optimizer. Each update makes new tensors.

    In one case the two differ. At `min_loss_scale` DeepSpeed raises at the next overflow. Here the scale stays, the step is
    skipped, and `guard.max_bad_steps` ends the run with the rows of its last batch.
    """

    dynamic = True

    def __init__(self, configured: Any, device: torch.device):
        """
        Args:
            configured: DeepSpeed's scaler, whose settings and state are taken over
        """
        self._factor, self._window = float(configured.scale_factor), int(configured.scale_window)
        self._minimum, self._hysteresis = float(configured.min_scale), int(configured.delayed_shift)
        self._is_consecutive = bool(configured.consecutive_hysteresis)

        def counter(value: float) -> torch.Tensor:
            return torch.full((), int(value), dtype=torch.int64, device=device)

        self.cur_scale = torch.full((), float(configured.cur_scale), dtype=torch.float32, device=device)
        self.cur_iter = counter(configured.cur_iter)
        self.last_overflow_iter = counter(configured.last_overflow_iter)
        self.cur_hysteresis = counter(configured.cur_hysteresis)

    @property
    def loss_scale(self) -> torch.Tensor:
        return self.cur_scale

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.cur_scale

    def update_scale(self, overflow: torch.Tensor) -> None:
        """Halve the scale after an overflow once the hysteresis is used up; double it after `window` steps without one."""
        falls = overflow if self._hysteresis == 1 else overflow & (self.cur_hysteresis == 1)
        stable = self.cur_iter - self.last_overflow_iter - 1
        rises = ~overflow & (stable > 0) & (stable % self._window == 0)
        refills = ~overflow if self._is_consecutive else rises
        lower = (self.cur_scale / self._factor).clamp(min=self._minimum)
        higher = (self.cur_scale * self._factor).clamp(max=LARGEST)
        self.cur_scale = torch.where(falls, lower, torch.where(rises, higher, self.cur_scale))
        used = self.cur_hysteresis - (overflow & ~falls).long()
        self.cur_hysteresis = torch.where(refills, self._hysteresis, used)
        self.last_overflow_iter = torch.where(overflow, self.cur_iter, self.last_overflow_iter)
        self.cur_iter = self.cur_iter + 1
