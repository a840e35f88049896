"""Tests with real ranks: which of them are long, a training process, a process that forks ranks, and a directory for runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.fork_server import ForkServer
from tests.dist.training_process import TrainingProcess
from tests.faults.sweeps.lab import Lab

# `make test` leaves these out, so that it takes less than half an hour. `make test-dist` and `make test-all` run them too.
LONG = {
    "test_compiled_run",
    "test_ends_of_ranks",
    "test_evaluate_ranks",
    "test_family",
    "test_family_memory",
    "test_fault_sweeps",
    "test_run_features",
    "test_run_identity",
    "test_train",
    "test_visible_gpus",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem in LONG:
            item.add_marker(pytest.mark.long)


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
