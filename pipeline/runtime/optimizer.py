"""Optimizer settings of a recipe, the learning rate of a step, and the parameter groups for weight decay.

The learning rate is a pure function of the step. It needs no state in a checkpoint and cannot drift from the step count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pipeline.errors import UserError
from pipeline.recipe.ranges import check_ranges

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's two moments, under torch's names


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. The defaults are the paper's for base-size teachers."""

    lr: float = 6e-4  # the highest learning rate, reached after the warm-up
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # Adam's
    eps: float = 1e-6  # Adam's
    weight_decay: float = 0.01  # of matrices; biases and norm weights are not decayed
    warmup_steps: int = 4000  # steps from 0 to the highest rate
    decay: Literal["linear", "cosine", "wsd", "constant"] = "linear"  # to 0; wsd: warm-up, stable rate, decay
    decay_share: float = 0.1  # of `decay: wsd`: share of the run's steps, at its end, in which the rate falls linearly
    gradient_clipping: float = 1.0  # global L2 norm; 0 turns it off

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0:
            raise UserError(f"optimizer.lr ({self.lr}) and optimizer.eps ({self.eps}) must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}; it must be two numbers in [0, 1)")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.gradient_clipping < 0:
            raise UserError("optimizer.warmup_steps, weight_decay and gradient_clipping must not be negative")
        if self.gradient_clipping == float("inf"):
            self.gradient_clipping = 0.0  # no limit
        # a smaller eps is 0 in fp32, and 0 / 0 where a gradient is 0
        limits = {
            "lr": (0, 1e3),
            "eps": (1e-30, 1e3),
            "weight_decay": (0, 1e3),
            "warmup_steps": (0, 10**12),
            "decay_share": (0, 1),
        }
        check_ranges(self, "optimizer", {**limits, "gradient_clipping": (0, 1e30)})


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`: linear warm-up, then `config.decay`.

    After the warm-up `linear` falls on a line and `cosine` on half a wave, to 0 after the last step. `wsd` (warm-up, stable,
    decay: arXiv 2404.06395) stays at the highest rate and falls on a line in the last `decay_share` of the steps.
    A warm-up that is at least as long as the run does not end within it, as in `transformers`' schedulers.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.decay == "constant":
        return config.lr
    after_warmup = max(1, steps - config.warmup_steps)
    if config.decay == "wsd":
        return config.lr * min(1.0, max(0, steps - step) / max(1, min(after_warmup, round(config.decay_share * steps))))
    left = max(0.0, (steps - step) / after_warmup)
    return config.lr * (left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


def parameter_groups(trained: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices with weight decay; biases and LayerNorm weights (1-D parameters) without."""
    decayed = [parameter for parameter in trained.values() if parameter.dim() > 1]
    plain = [parameter for parameter in trained.values() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
