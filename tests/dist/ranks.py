"""Run one Python file in N real processes that form a gloo group, and read back what each rank reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import REPO, first_on_python_path
from tests.dist.ports import free_port


def run_ranks(
    script: Path, world_size: int, options: dict[str, Any], directory: Path, timeout_s: int = 240
) -> list[Any]:
    """Start `script OPTIONS.json REPORT.json` once per rank; returns the ranks' reports. Any failure fails the test."""
    codes, logs = run_ranks_to_any_end(script, world_size, options, directory, timeout_s)
    assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
    return [json.loads((directory / f"report{rank}.json").read_text()) for rank in range(world_size)]


def run_ranks_to_any_end(
    script: Path, world_size: int, options: dict[str, Any], directory: Path, timeout_s: int = 240
) -> tuple[list[int], str]:
    """As `run_ranks`, for runs that may be killed: exit codes and logs. When one rank dies the others are killed."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (directory / "options.json").write_text(json.dumps(options))
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = first_on_python_path(REPO)
        log = open(directory / f"rank{rank}.log", "w")
        command = [sys.executable, str(script), str(directory / "options.json"), str(directory / f"report{rank}.json")]
        processes.append(
            subprocess.Popen(command, cwd=REPO, env=environment, stdout=log, stderr=log, start_new_session=True)
        )
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    logs = "\n".join((directory / f"rank{rank}.log").read_text()[-3000:] for rank in range(world_size))
    return [process.wait() for process in processes], logs
