"""Run the scripts of `slurm/` without Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in the environment of a job, without Slurm."""
    job = {"SLURM_SUBMIT_DIR": str(REPO), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "1"}
    job["SLURM_JOB_NUM_NODES"] = "1"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=REPO,
        env={**plain, **job, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def programs(directory: Path, **lines: str) -> dict[str, str]:
    """An environment whose PATH begins with bash programs of these names. The default srun only starts its command."""
    directory.mkdir()
    for name, text in {"srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"', "scontrol": "", **lines}.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}


def submit_all(*options: str, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPO / "slurm" / "submit_all.sh"), "--recipe", "recipes/quickstart.yaml", *options]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def commands_of(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]
