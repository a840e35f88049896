"""A training process that tests of one session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.training_process import TrainingProcess


@pytest.fixture(scope="session")
def training() -> Iterator[TrainingProcess]:
    with TrainingProcess() as process:
        yield process
