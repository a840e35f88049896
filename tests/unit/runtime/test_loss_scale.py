"""The loss scaler on the device against DeepSpeed's: the same scale and counters after every step."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.loss_scale import LARGEST, DeviceLossScaler

STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
settings = st.fixed_dictionaries(
    {
        "init_scale": st.sampled_from([1.0, 4.0, 2.0**16, 2.0**32]),
        "scale_window": st.integers(1, 4),
        "min_scale": st.sampled_from([1, 2, 2**10]),
        "delayed_shift": st.integers(1, 3),
        "consecutive_hysteresis": st.booleans(),
    }
)


def state(scaler: Any) -> list[float]:
    return [float(getattr(scaler, name)) for name in STATE]


@given(settings=settings, overflows=st.lists(st.booleans(), max_size=40))
def test_scales_are_deepspeeds(settings: dict[str, Any], overflows: list[bool]) -> None:
    theirs = DynamicLossScaler(**settings, raise_error_at_min_scale=False)
    ours = DeviceLossScaler(theirs, torch.device("cpu"))
    assert state(ours) == state(theirs)
    for overflow in overflows:
        with patch.object(loss_scaler.dist, "get_rank", lambda: 1):  # rank 0 logs
            theirs.update_scale(overflow)
        ours.update_scale(torch.tensor(overflow))
        assert state(ours) == state(theirs)
        loss = torch.tensor(0.75)
        assert torch.equal(ours.scale_loss(loss), theirs.scale_loss(loss))


def test_the_scale_stays_finite_and_falls_again() -> None:
    """Gradients that are exactly zero never overflow: the scale doubles until fp32 ends."""
    settings = {"scale_window": 1, "min_scale": 1, "delayed_shift": 1, "consecutive_hysteresis": False}
    scaler = DeviceLossScaler(DynamicLossScaler(init_scale=2.0**120, **settings), torch.device("cpu"))
    for _ in range(20):
        scaler.update_scale(torch.tensor(False))
    assert float(scaler.cur_scale) == LARGEST
    scaler.update_scale(torch.tensor(True))
    assert float(scaler.cur_scale) == LARGEST / 2
