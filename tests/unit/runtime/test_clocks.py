"""A wrong clock on one host does not end a run after its first step, and a warning names the host."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from pipeline.runtime.clocks import agree, my_clock
from pipeline.runtime.stop import StopRequests

NOW, DAY = 1_800_000_000.0, 86_400.0


def test_rank_zeros_clock_decides() -> None:
    left, warnings = agree([("one", NOW, NOW + 7200), ("two", NOW + DAY, NOW + 7200)])
    assert left == 7200
    assert "clock of two is 86400 s ahead of that of one" in warnings[0]


def test_a_difference_of_a_minute_is_ignored() -> None:
    assert agree([("one", NOW, NOW + 7200), ("two", NOW - 60, NOW + 7200)]) == (7200, [])


def test_another_clock_decides_where_rank_zeros_is_past_the_end_of_the_job() -> None:
    left, warnings = agree([("one", NOW + DAY, NOW + 7200), ("two", NOW, NOW + 7200)])
    assert left == 7200
    assert "another rank's is used" in warnings[-1]


def test_an_end_in_the_past_by_every_clock_is_no_deadline() -> None:
    left, warnings = agree([("one", NOW + DAY, NOW + 7200)])
    assert left == math.inf
    assert "in the past by every clock (one: " in warnings[-1]


def test_without_a_scheduler_there_is_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "inf", "0"):
        monkeypatch.setenv("SLURM_JOB_END_TIME", value)
        assert agree([my_clock()]) == (math.inf, [])


def test_the_agreed_deadline_replaces_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() - 10))
    stop = StopRequests(tmp_path / "STOP", margin_s=60)
    assert "deadline" in str(stop.reason)
    stop.agree_on_deadline(7200)
    assert stop.reason is None
    stop.agree_on_deadline(30)
    assert "deadline" in str(stop.reason)
