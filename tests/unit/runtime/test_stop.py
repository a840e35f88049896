"""Requests to stop: signals, a STOP file, the deadline of the job, a launcher that has ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.runtime.stop import STOP_SIGNALS, StopRequests


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup inherit that it is ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_becomes_a_reason(number: signal.Signals, tmp_path: Path, handlers: None) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    assert stop.reason is None
    os.kill(os.getpid(), number)
    assert stop.reason == f"signal {number.name}"


def test_a_second_signal_changes_nothing(tmp_path: Path, handlers: None) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    assert stop.reason == "signal SIGTERM"


def test_under_nohup_a_hangup_is_no_request(tmp_path: Path, handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    stop.end_immediately()
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reason is None


def test_before_the_ranks_have_met_a_signal_ends_the_rank(tmp_path: Path, handlers: None) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    stop.end_immediately()
    assert {signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)} == {signal.SIG_DFL}
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "signal SIGTERM"


def test_a_launcher_that_has_ended_is_a_reason(tmp_path: Path) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.launcher_ended()
    assert stop.reason == "the launcher has ended"


def test_stop_file_becomes_a_reason(tmp_path: Path) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    assert stop.reason is None
    (tmp_path / "STOP").touch()
    assert stop.reason == "file STOP"


def test_deadline_leaves_time_for_saves_as_slow_as_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 500))
    stop = StopRequests(tmp_path / "STOP", margin_s=60)
    assert stop.reason is None
    stop.saw_save(20)
    assert stop.reason is None
    stop.saw_save(300)
    assert "deadline" in str(stop.reason)
    assert "900 s" in str(stop.reason)


def test_an_earlier_attempts_save_reserves_at_most_half_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 500))
    stop = StopRequests(tmp_path / "STOP", margin_s=60)
    stop.saw_earlier_saves(70)
    assert stop.margin_s == 210
    stop.saw_earlier_saves(10_000)  # one day with slow disks must not end every later attempt at its first step
    assert 240 < stop.margin_s < 260
    assert stop.reason is None


def test_a_stop_directory_left_by_an_earlier_start_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir()
    stop = StopRequests(tmp_path / "STOP", margin_s=1)
    stop.forget_leftover()
    assert stop.reason is None
    assert (tmp_path / "STOP.corrupt-1").is_dir()
