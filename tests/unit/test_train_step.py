"""One optimizer step of the trainer, with an engine that records what it is given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.runtime import dist
from tests.mutants.probes import batches, stepper_of


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    dist.shut_down()


def drawn(seed: int, step: int, rank: int) -> list[float]:
    """The random numbers of a step's three micro-batches, from which dropout makes its masks."""
    stepper = stepper_of(rank, world_size=2, seed=seed)
    stepper.train_step(step, batches())
    return stepper.parts.engine.random


def test_dropout_differs_by_rank_step_and_seed() -> None:
    first = drawn(seed=0, step=3, rank=0)
    assert len(set(first)) == len(first), "every micro-batch has its own masks"
    for other in (drawn(0, 3, 1), drawn(0, 4, 0), drawn(1, 3, 0)):
        assert not set(first) & set(other)
    torch.manual_seed(99)
    assert drawn(seed=0, step=3, rank=0) == first, "a resumed run drops the same elements as the uninterrupted one"


def test_micro_batches_have_equal_weights() -> None:
    """The gradient of a step is the mean of its micro-batches' gradients."""
    stepper = stepper_of(rank=0)
    stepper.train_step(0, batches())
    layer = stepper.parts.engine.layer
    of_step, layer.weight.grad = layer.weight.grad, None
    for input_ids_BL, _ in batches():
        stepper.parts.engine.backward(stepper.parts.engine(input_ids_BL)[0])
    assert torch.allclose(of_step, layer.weight.grad, atol=1e-7)
