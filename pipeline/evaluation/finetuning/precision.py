"""The precision of a fine-tuning's forward: autocast, and the loss scale that fp16 gradients need.

In: the setting `precision` and the device. Out: `ForwardPrecision`. Weights, gradients and optimizer are fp32 in every case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.errors import UserError
from pipeline.runtime import gpus
from pipeline.runtime.device_facts import device_name
from pipeline.runtime.ds_config import DTYPES

FIRST_SCALE = 2.0**16  # as in ds_configs; it is halved after a step whose gradient is not finite
LOWEST_SCALE = 1.0  # below it the gradient is not finite for another reason


@dataclass(frozen=True)
class ForwardPrecision:
    """A precision on one device."""

    name: Literal["fp32", "bf16", "fp16"]
    device: torch.device

    def __str__(self) -> str:
        scale = " with a loss scale" if self.name == "fp16" else ""
        return f"{self.name}{scale} on {device_name(self.device)}"

    def autocast(self) -> torch.autocast:
        """The context of a forward."""
        is_half = self.name != "fp32"
        return torch.autocast(self.device.type, DTYPES[self.name] if is_half else None, enabled=is_half)

    def scaler(self) -> torch.amp.GradScaler:
        """A dynamic loss scale for fp16, whose small gradients would be zero without one; does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, init_scale=FIRST_SCALE, enabled=self.name == "fp16")


def forward_precision(asked: str, section: str, device: torch.device) -> ForwardPrecision:
    """The precision to compute in. `auto`: bf16 on GPUs that have it, fp16 on other GPUs, fp32 on CPUs.

    Args:
        asked: the setting `precision`
        section: the name of the task's settings, for messages
    Raises:
        UserError: bf16 on a GPU that emulates it
    """
    has_bf16 = device.type != "cuda" or gpus.has_bf16(device)
    if asked == "bf16" and not has_bf16:
        raise UserError(
            f"{section}.precision is bf16, which {device_name(device)} does not have: use --set {section}.precision=fp16 (or fp32)"
        )
    if asked == "auto":
        asked = "fp32" if device.type != "cuda" else "bf16" if has_bf16 else "fp16"
    return ForwardPrecision(asked, device)  # type: ignore[arg-type]
