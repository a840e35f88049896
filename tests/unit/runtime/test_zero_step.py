"""When DeepSpeed's own step is kept. What ours computes: tests/dist/test_checkpoint.py and test_optimizer_step.py."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from pipeline.runtime.zero_step import TESTED_WITH, reason_for_deepspeeds_step


def zero_optimizer(**changes: Any) -> Any:
    """The attributes of DeepSpeed's optimizer that the decision reads."""
    adam = torch.optim.AdamW([torch.zeros(1)], fused=changes.pop("fused", True))
    return types.SimpleNamespace(averaged_gradients={}, cpu_offload=False, optimizer=adam, **changes)


def test_the_tested_deepspeed_gets_our_step() -> None:
    assert reason_for_deepspeeds_step(zero_optimizer(), TESTED_WITH, {}) is None


@pytest.mark.parametrize(
    ("zero", "version", "config", "words"),
    [
        (zero_optimizer(), "0.20.0", {}, "DeepSpeed is 0.20.0"),
        (types.SimpleNamespace(), TESTED_WITH, {}, "keeps its gradients elsewhere"),
        (zero_optimizer(fused=False), TESTED_WITH, {}, "fused"),
        (zero_optimizer(fused=None), TESTED_WITH, {}, "fused"),
        (zero_optimizer(), TESTED_WITH, {"wall_clock_breakdown": True}, "wall_clock_breakdown"),
    ],
)
def test_deepspeeds_step_is_kept_for_a_reason(zero: Any, version: str, config: dict[str, Any], words: str) -> None:
    reason = reason_for_deepspeeds_step(zero, version, config)
    assert reason is not None
    assert words in reason


def test_offload_keeps_deepspeeds_step() -> None:
    zero = zero_optimizer()
    zero.cpu_offload = True
    assert "offloaded" in str(reason_for_deepspeeds_step(zero, TESTED_WITH, {}))
