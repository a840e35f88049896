"""Start real training runs as a user does, and read their files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_prep.command_line import VERBOSE, installed_program
from tests.conftest import REPO
from tests.dist.ports import free_port

BIN = Path(sys.executable).parent


def launcher(kind: str, num_ranks: int = 1) -> list[str]:
    """Command that goes before the arguments of pipeline/train.py."""
    script = "pipeline/train.py"
    if kind == "deepspeed":
        ranks = ["--num_gpus", str(num_ranks)] if num_ranks > 1 else []
        return [installed_program("deepspeed"), "--master_port", str(free_port()), *ranks, script]
    if kind == "torchrun":
        port = ["--master_port", str(free_port())]
        return [installed_program("torchrun"), "--nproc_per_node", str(num_ranks), *port, script]
    return [sys.executable, script]


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """A run in its own process group, output to `log`, with a line for every point of the curves."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", VERBOSE: "1", **environment}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=REPO, env=env, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen, log: Path, timeout_s: float = 240) -> str:
    """Wait for a run that must end with code 0; returns its log."""
    try:
        code = process.wait(timeout_s)
    finally:
        end_group(process)
    text = log.read_text()
    assert code == 0, f"exit code {code}\n{text[-4000:]}"
    return text


def end_group(process: subprocess.Popen) -> None:
    """SIGKILL to everything that the run started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def train(kind: str, num_ranks: int, run_dir: Path, arguments: list[str], **environment: str) -> str:
    """A run from start to end; returns its log."""
    log = run_dir.with_suffix(".log")
    command = [*launcher(kind, num_ranks), *arguments, "--run-dir", str(run_dir)]
    return finish(start(command, log, **environment), log)


def wait_for_line(log: Path, text: str, process: subprocess.Popen, timeout_s: float = 120) -> None:
    """Return as soon as the log of a running process contains `text`."""
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text():
        assert process.poll() is None, f"ended before {text!r}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"no {text!r} within {timeout_s} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.02)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, tag: str = "loss/total") -> dict[int, float]:
    """Step -> value."""
    return {row["step"]: row[tag] for row in metrics(run_dir) if tag in row}
