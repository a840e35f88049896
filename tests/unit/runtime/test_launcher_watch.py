"""Ranks notice the end of their launcher, and ignore the end of other programs above them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

RANK = """
import sys, threading
sys.path.insert(0, {repo!r})
from pipeline.runtime.launcher_watch import watch_launchers
gone = threading.Event()
watch_launchers(gone.set)
print("rank", flush=True)
print("gone" if gone.wait(float(sys.argv[1])) else "nothing", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"


def start_below(launcher: Path, rank: Path, patience_s: float) -> subprocess.Popen:
    """Start a launcher of that file name, with a rank below it. Both write to one pipe."""
    launcher.write_text(LAUNCHER)
    rank.write_text(RANK.format(repo=str(REPO)))
    command = [sys.executable, str(launcher), str(rank), str(patience_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "rank\n"
    return process


@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_launcher_that_was_killed_is_noticed(name: str, tmp_path: Path) -> None:
    process = start_below(tmp_path / name, tmp_path / "rank.py", 30)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert process.stdout is not None
    assert process.stdout.readline() == "gone\n"


def test_the_end_of_a_shell_or_script_above_a_rank_is_ignored(tmp_path: Path) -> None:
    process = start_below(tmp_path / "my_script.py", tmp_path / "rank.py", 3)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(10)
    assert process.stdout is not None
    assert process.stdout.readline() == "nothing\n"
