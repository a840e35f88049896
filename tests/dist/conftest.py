"""Fixtures of tests with real ranks: a training process, a process that forks ranks, and a directory for their runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.fork_server import ForkServer
from tests.dist.training_process import TrainingProcess
from tests.faults.sweeps.lab import Lab


@pytest.fixture(scope="session")
def training() -> Iterator[TrainingProcess]:
    with TrainingProcess() as process:
        yield process


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture
def lab(server: ForkServer, tiny_recipe: Path, tmp_path: Path) -> Lab:
    return Lab(tmp_path, server, tiny_recipe)
