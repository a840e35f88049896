"""Progress: a line about every 30 s where there is no terminal, a bar on one, and nothing for what is over before that."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable

import pytest

from data_prep import progress
from data_prep.progress import BYTES, LINE_EVERY_S, Pace, Progress, duration, time_left


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only moves when this is called with seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_one_line_about_every_30_s(wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encoding", 100, "batch") as shown:
        for _ in range(100):
            wait(2.0)
            shown.update()
    assert lines(capsys) == [
        f"encoding: batch {done} of 100, {duration(2.0 * (100 - done))} left" for done in (15, 30, 45, 60, 75, 90)
    ]


def test_an_operation_of_less_than_30_s_prints_nothing(
    wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress.progress(range(14), "encoding", "batch"):
        wait(2.0)
    assert lines(capsys) == []


def test_slow_units_print_a_line_each(wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("fine-tuning", 12, "step", initial=8) as shown:
        for _ in range(2):
            wait(90.0)
            shown.update()
        shown.update(2)
        wait(90.0)
        shown.update(0)  # nothing is left to say
    assert lines(capsys) == ["fine-tuning: step 9 of 12, 4.5 min left", "fine-tuning: step 10 of 12, 3.0 min left"]


def test_bytes_and_a_note(wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("prepare", 2_000_000, BYTES) as shown:
        wait(40.0)
        shown.note("de, 1.5 M tokens/s")
        shown.update(500_000)
    assert lines(capsys) == ["prepare: 0.5 of 2.0 MB, 2.0 min left, de, 1.5 M tokens/s"]


def test_not_shown(wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("verify", 2, "shard", is_shown=False) as shown:
        wait(100.0)
        shown.update()
    assert lines(capsys) == []


def test_another_line_delays_the_next_one(wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("distil", 100, "step") as shown:
        for number in range(40):
            wait(1.0)
            shown.update()
            if number == 20:
                shown.printed()
    assert lines(capsys) == []


def test_another_line_at_the_same_point_is_enough(
    wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a training whose steps take longer than a pause: the step's own line comes first."""
    with Progress("distil", 10, "step") as shown:
        for number in range(4):
            wait(60.0)
            if number % 2:
                shown.printed()
            shown.update()
    assert lines(capsys) == ["distil: step 1 of 10, 9.0 min left", "distil: step 3 of 10, 7.0 min left"]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in progress.progress(range(3), "encoding", "batch"):
        pass
    text = terminal.getvalue()
    assert "encoding:   0%" in text
    assert "\n" not in text, "one line that is drawn again"


@pytest.mark.parametrize("distance_s", [0.7, 1.0, 6.5, 10.0, 29.0])
def test_no_pause_of_a_pace_is_longer_than_30_s(distance_s: float, wait: Callable[[float], None]) -> None:
    pace, due = Pace(begins_with_line=True), []
    for number in range(400):
        wait(distance_s)
        if pace.is_due():
            due.append(number * distance_s)
    assert due[0] == 0.0, "the first point"
    pauses = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert max(pauses) <= LINE_EVERY_S + 1e-6
    assert min(pauses) > LINE_EVERY_S / 2 - 1e-6


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 99, 100, 5000, 7200, 200_000)] == [
        *("0 s", "99 s", "1.7 min", "83.3 min", "2.0 h", "2.3 days")
    ]
    assert time_left(10.0, 0, 5) == "", "the speed is not known yet"
    assert time_left(10.0, 2, 6) == "30 s left"
