"""The ranks of an evaluation leave each other after success alone: after an error to leave can take as long as the others wait."""

from __future__ import annotations

import pytest
import torch

from pipeline.evaluation.ranks import joined
from pipeline.runtime import dist
from pipeline.runtime.dist import Launch


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled when the ranks leave each other."""
    calls: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "read_launch", lambda: Launch(0, 2, 0, torch.device("cpu")))
    monkeypatch.setattr(dist, "init_process_group", lambda launch, timeout_s: None)
    monkeypatch.setattr(dist, "shut_down", lambda: calls.append("left"))
    return calls


def test_after_success(left: list[str]) -> None:
    with joined() as ranks:
        assert ranks.world_size == 2
    assert left == ["left"]


def test_after_an_error(left: list[str]) -> None:
    with pytest.raises(KeyError), joined():
        raise KeyError
    assert left == []
