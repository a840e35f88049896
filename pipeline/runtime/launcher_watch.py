"""Notices that the launcher of this rank has ended: a killed `deepspeed` leaves its ranks training without it.

In: the processes above this one. Out: a call when a launcher among them has ended. Only `deepspeed` and `torchrun` are
watched: a shell, `nohup`, `srun` or `ssh` above a rank or a launcher may end at any time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from data_prep.ownership import start_ticks

POLL_S = 1.0
LAUNCHERS = ("deepspeed", "deepspeed.exe", "ds", "torchrun")
LAUNCHER_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
)


def launchers_above(pid: int) -> list[tuple[int, int]]:
    """Process number and start time of each launcher above `pid`, nearest first, up to the first other program."""
    found = []
    while (pid := _parent(pid)) > 1 and _is_launcher(pid):
        if (started := start_ticks(pid)) is not None:
            found.append((pid, started))
    return found


def watch_launchers(on_end: Callable[[], None]) -> None:
    """Call `on_end` once, from a thread of its own, as soon as a launcher above this process has ended."""
    launchers = launchers_above(os.getpid())
    if launchers:
        threading.Thread(target=_watch, args=[launchers, on_end], name="launcher", daemon=True).start()


def _watch(launchers: list[tuple[int, int]], on_end: Callable[[], None]) -> None:
    pause = threading.Event()
    while all(start_ticks(pid) == started for pid, started in launchers):
        pause.wait(POLL_S)
    on_end()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _is_launcher(pid: int) -> bool:
    """Look at the command line: the program, the script that Python runs, or the module after `-m`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if Path(words[0]).name in LAUNCHERS:
        return True
    if not Path(words[0]).name.startswith("python"):
        return False
    for word, following in zip(words[1:], [*words[2:], ""], strict=False):
        if word == "-m":
            return following in LAUNCHER_MODULES
        if not word.startswith("-"):
            return Path(word).name in LAUNCHERS
    return False
