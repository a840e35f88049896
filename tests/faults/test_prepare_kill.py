"""`kill -9` at a random moment of `prepare`, then the same command: the same bytes. bench_prepare_faults.py runs 200 of these."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.bench_prepare_faults import KillTrials, same_files
from tests.conftest import REPO


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> KillTrials:
    return KillTrials(tmp_path_factory.mktemp("kills") / "work", tiny_tokenizer)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_continues_to_the_same_bytes(trials: KillTrials, seed: int) -> None:
    same, _, _ = trials.one(random.Random(seed))
    assert same


def test_killing_the_parent_leaves_no_worker_behind(trials: KillTrials, tmp_path: Path) -> None:
    process = subprocess.Popen(trials._command(tmp_path / "shards", 2), cwd=REPO, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (children := children_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children
    process.kill()
    process.wait()
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(child) for child in children)


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if sys.platform != "linux" or not path.exists():
        pytest.skip("needs /proc")
    return [int(child) for child in path.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_stops_the_run_and_says_so(trials: KillTrials, tmp_path: Path) -> None:
    process = subprocess.Popen(trials._command(tmp_path / "shards", 2), cwd=REPO, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(children := children_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(children[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "A tokenising process ended with status -9" in errors
    assert "Traceback" not in errors
    assert not any(is_running(child) for child in children)


def test_ctrl_c_stops_without_a_traceback_and_the_rerun_continues(trials: KillTrials, tmp_path: Path) -> None:
    command = trials._command(tmp_path / "shards", 2)
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("shards/*/*.tok")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("shards/**/*.tmp"))
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    assert same_files(trials.expected, tmp_path / "shards")
