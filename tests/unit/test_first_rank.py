"""An error that every rank finds is printed by the first rank of a host; one of another rank alone is printed as well."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from data_prep import command_line
from data_prep.command_line import VERBOSE
from pipeline.errors import EXIT_USER, UserError, exit_code_of
from tests.conftest import REPO

FAILS = """
import sys
from data_prep import command_line
command_line.FIRST_RANK_S = 60.0
print("waits", flush=True)
command_line.CommandLine(prog="train").error("unknown option")
"""


def fail() -> None:
    raise UserError("not a recipe")


def seconds_to_fail(capsys: pytest.CaptureFixture[str]) -> float:
    began = time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert exit_code_of(fail) == EXIT_USER
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "error: not a recipe\n"
    return time.monotonic() - began


def test_the_first_rank_does_not_wait(
    no_launcher: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "FIRST_RANK_S", 60.0)
    assert seconds_to_fail(capsys) < 10
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert seconds_to_fail(capsys) < 10
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(VERBOSE, "1")
    assert seconds_to_fail(capsys) < 10, "asked for the messages of all ranks"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_the_error_of_another_rank_alone_is_printed(
    name: str,
    no_launcher: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(VERBOSE, raising=False)
    monkeypatch.setenv(name, "3")
    monkeypatch.setattr(command_line, "FIRST_RANK_S", 0.2)
    assert seconds_to_fail(capsys) >= 0.2


def test_a_launcher_that_ends_the_other_ranks_prevents_the_second_error() -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", FAILS],
        cwd=REPO,
        env={"LOCAL_RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "waits\n"
    time.sleep(0.2)
    rank.terminate()
    _, errors = rank.communicate(timeout=20)
    assert (rank.returncode, errors) == (-signal.SIGTERM, "")
