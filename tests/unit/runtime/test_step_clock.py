"""Seconds per part of a step, and figures that are read later. What needs CUDA events has not run without a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline.runtime.deferred_numbers import DeferredNumbers
from pipeline.runtime.step_clock import StepClock

CPU = torch.device("cpu")


def test_the_parts_are_those_between_the_marks() -> None:
    clock = StepClock(CPU)
    clock.mark("teacher")  # outside a step: an evaluation
    clock.begin_step()
    for part, seconds in (("teacher", 0.02), ("student", 0.05), ("teacher", 0.03)):
        time.sleep(seconds)
        clock.mark(part)
    read = clock.end_step()
    clock.mark("student")  # after the step
    found = read()
    assert found.keys() == {"teacher", "student"}
    assert found["teacher"] >= 0.05
    assert found["student"] >= 0.05
    assert read() == found


def test_a_step_begins_without_the_marks_of_the_one_before() -> None:
    clock = StepClock(CPU)
    clock.begin_step()
    clock.mark("loss")
    clock.begin_step()
    assert clock.end_step()() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_figures_are_those_of_the_tensor(dtype: torch.dtype) -> None:
    values_N = torch.tensor([1.5, float("nan"), 2.0**32], dtype=dtype)
    read = DeferredNumbers(values_N).read()
    assert (read[0], read[2]) == (1.5, 2.0**32)
    assert read[1] != read[1]
