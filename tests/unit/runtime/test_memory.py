"""Memory that is left on a host, and in the job of this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runtime.host_memory import UNLIMITED, available_memory_bytes

GIB = 2**30


def make_files(base: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Make the files of a /proc and a /sys/fs/cgroup for a test."""
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n", **files}
    for name, text in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return base / "proc", base / "cgroup"


def test_this_host_has_free_memory() -> None:
    assert 0 < available_memory_bytes() < UNLIMITED // 2


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (
            "2, where the job is limited and its step is not",
            {
                "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
                "cgroup/slurm/job_7/memory.max": f"{4 * GIB}\n",
                "cgroup/slurm/job_7/memory.current": f"{3 * GIB}\n",
                "cgroup/slurm/job_7/memory.stat": f"anon 5\ninactive_file {GIB}\n",
                "cgroup/slurm/job_7/step_0/memory.max": "max\n",
                "cgroup/slurm/job_7/step_0/memory.current": "5\n",
            },
        ),
        (
            "1, next to the groups of other controllers",
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n0::/\n",
                "cgroup/memory/slurm/job_7/memory.limit_in_bytes": f"{4 * GIB}\n",
                "cgroup/memory/slurm/job_7/memory.usage_in_bytes": f"{3 * GIB}\n",
                "cgroup/memory/slurm/job_7/memory.stat": f"total_inactive_file {GIB}\n",
                "cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "cgroup/memory/memory.usage_in_bytes": f"{30 * GIB}\n",
            },
        ),
        (
            "2, in a container that sees the path of the host",
            {
                "proc/self/cgroup": "0::/docker/abc\n",
                "cgroup/memory.max": f"{4 * GIB}\n",
                "cgroup/memory.current": f"{2 * GIB}\n",
            },
        ),
    ],
)
def test_the_jobs_limit_counts(version: str, files: dict[str, str], tmp_path: Path) -> None:
    assert available_memory_bytes(*make_files(tmp_path, files)) == 2 * GIB, version


def test_without_limits_the_memory_of_the_host_counts(tmp_path: Path) -> None:
    assert available_memory_bytes(*make_files(tmp_path, {})) == 8 * GIB
    assert available_memory_bytes(tmp_path / "no", tmp_path / "none") == UNLIMITED // 1024 * 1024
