"""The sweeps of `make faults` in small: real ranks, killed, frozen, poisoned, out of disk; every promise must be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.fork_server import ForkServer
from tests.faults.sweeps.__main__ import FIGURES
from tests.faults.sweeps.lab import Lab


@pytest.mark.parametrize("name", FIGURES)
def test_promise_is_kept(name: str, server: ForkServer, tiny_recipe: Path, tmp_path: Path) -> None:
    outcome = FIGURES[name](Lab(tmp_path, server, tiny_recipe), True)
    assert outcome.kept == outcome.trials > 0, outcome.measured
