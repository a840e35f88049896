"""Report one node as one line of JSON: `facts`, which must be equal on all nodes, and `problems`.

python slurm/lib/probe_node.py RECIPE RUN_DIR MIN_FREE_GB [KEY=VALUE ...]          (node_check.sh runs it on each node)
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from data_prep.shards import ShardSet  # noqa: E402
from pipeline.config import load_recipe  # noqa: E402
from pipeline.provenance import PACKAGES, git_commit, metadata  # noqa: E402
from pipeline.runtime import gpus  # noqa: E402
from pipeline.runtime.allotment import allotted_gpus, check_allotted_gpus  # noqa: E402


def graphics_cards() -> str:
    """For example `8 x NVIDIA H100 80GB HBM3, driver 550.54`."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    cards = done.stdout.strip().splitlines()
    return f"{len(cards)} x {cards[0].replace(', ', ', driver ')}" if cards else done.stderr.strip()


def check_gpus() -> None:
    """Raises where torch does not find every GPU that Slurm has allotted here, or one computes a wrong sum."""
    check_allotted_gpus()
    seen, allotted = gpus.count(), allotted_gpus()
    if seen and seen < allotted:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise RuntimeError(f"{allotted} GPUs are allotted, torch finds {seen} (CUDA_VISIBLE_DEVICES is {visible!r})")
    for number in range(seen):
        gpus.check_usable(torch.device("cuda", number))


def check_run_dir(run_dir: Path, min_free_gb: int) -> None:
    """Raises where no file can be written and synced in the run directory, or too little space is free."""
    with tempfile.NamedTemporaryFile(dir=run_dir, prefix=f"probe-{socket.gethostname()}-") as file:
        file.write(b"probe")
        os.fsync(file.fileno())
    free_gb = shutil.disk_usage(run_dir).free / 1e9
    if free_gb < min_free_gb:
        raise OSError(f"{free_gb:.0f} GB are free in {run_dir}, at least {min_free_gb} are required")


def check_teacher(teacher: str) -> None:
    """Raises where a local teacher has no config. A hub name is not checked: the run may have it in its cache."""
    if Path(teacher).is_absolute() or teacher.startswith("."):
        (Path(teacher) / "config.json").read_bytes()


def main(recipe_path: Path, run_dir: Path, min_free_gb: int, overrides: list[str]) -> None:
    problems: list[str] = []
    facts: dict[str, Any] = {"gpus": graphics_cards(), "python": platform.python_version(), "commit": git_commit()}
    facts |= {name: metadata.version(name) for name in PACKAGES}

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except Exception as error:  # every problem of this node belongs in the report
            problems.append(f"{type(error).__name__}: {error}")
            return None

    facts["GPUs that torch finds"] = gpus.count()
    recipe = load_recipe(recipe_path, overrides)
    attempt(check_gpus)
    attempt(lambda: check_run_dir(run_dir, min_free_gb))
    attempt(lambda: check_teacher(recipe.teacher))
    shards = attempt(lambda: ShardSet(Path(recipe.data)))
    facts["shards"] = len(shards.all_shards()) if shards else 0
    print(json.dumps({"facts": facts, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
