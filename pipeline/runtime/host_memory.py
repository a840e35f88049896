"""How much memory this process can still allocate.

In: /proc/meminfo and the control groups of this process (Slurm's --mem, a container's limit). Out: bytes. A process that
allocates more is killed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 2**62  # where Linux reports no limit
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Files of the limit and of the use, and the key of what can be reclaimed immediately, per version of control groups
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The minimum of what the host has left without swapping and what each control group above this process allows."""
    return max(0, min([_left_on_host(proc), *_left_in_groups(proc, cgroups)]))


def _left_on_host(proc: Path) -> int:
    return 1024 * _number_after("MemAvailable:", proc / "meminfo", UNLIMITED // 1024)


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Each ancestor of a group limits it too. A container sees its own group as the root, whatever its path says."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, version = (cgroups / "memory", 1) if controllers else (cgroups, 2)
        group = root / path.strip("/")
        while root in (group, *group.parents):
            yield _left_in_group(group, *FILES[version])
            group = group.parent


def _left_in_group(group: Path, limit: str, use: str, idle: str) -> int:
    try:
        allowed, used = (group / limit).read_text().strip(), int((group / use).read_text())
    except (OSError, ValueError):  # the root of version 2 has neither
        return UNLIMITED
    if allowed == "max":
        return UNLIMITED
    return int(allowed) - used + _number_after(idle, group / "memory.stat", 0)


def _number_after(name: str, file: Path, otherwise: int) -> int:
    """The number on the line of `file` that begins with `name`."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] == [name]:
                return int(words[1])
    return otherwise
