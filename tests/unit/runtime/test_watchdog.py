"""The watchdog ends a process that hangs, with its stacks on disk, and leaves every other process alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.errors import EXIT_HUNG
from pipeline.runtime.anomalies import GuardConfig
from pipeline.runtime.watchdog import Watchdog
from tests.conftest import REPO


def stuck(stacks: Path, how: str, before: str = "") -> list[str]:
    """A program that does `how` for a minute under a watchdog of half a second."""
    program = f"""
import ctypes, os, time
from pathlib import Path
from pipeline.runtime import watchdog
from pipeline.runtime.anomalies import GuardConfig
def stuck_here():
    {how}
{before}
with watchdog.Watchdog(GuardConfig(hang_timeout_s=0.5, slow_timeout_s=0.5), Path({str(stacks)!r})):
    stuck_here()
"""
    return [sys.executable, "-c", program]


def test_watchdog_dumps_stacks_and_ends_the_process(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "stacks.txt"
    command = stuck(stacks, "time.sleep(60)")
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HUNG
    assert "stuck_here" in stacks.read_text()
    assert str(stacks) in done.stderr


def test_a_call_that_holds_the_interpreter_lock_is_ended_too(tmp_path: Path) -> None:
    """No Python thread runs any more, and neither does the watchdog's."""
    stacks = tmp_path / "logs" / "stacks.txt"
    command = stuck(stacks, "ctypes.PyDLL(None).sleep(60)", "watchdog.BACKSTOP_MARGIN_S = 1.0")
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=40)
    assert done.returncode == 1
    assert "stuck_here" in stacks.read_text()


def test_a_console_that_nobody_reads_does_not_block_the_watchdog(tmp_path: Path) -> None:
    fill = "os.set_blocking(2, False)\ntry:\n    while os.write(2, b'x' * 4096): pass\nexcept BlockingIOError: pass\n"
    command = stuck(tmp_path / "stacks.txt", "time.sleep(60)", fill + "os.set_blocking(2, True)")
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE)
    try:
        assert process.wait(40) == EXIT_HUNG
    finally:
        process.kill()


def test_a_run_that_finishes_while_the_watchdog_collects_stacks_has_succeeded(tmp_path: Path) -> None:
    """The watchdog wakes a stopped rank for its stacks, and with that the run may reach its last step."""
    stacks = tmp_path / "stacks.txt"
    program = (
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.anomalies import GuardConfig\n"
        "from pipeline.runtime.watchdog import Watchdog\n"
        f"with Watchdog(GuardConfig(hang_timeout_s=0.4, slow_timeout_s=0.4), stacks := Path({str(stacks)!r})):\n"
        "    while not stacks.stat().st_size: time.sleep(0.05)\n"
        "time.sleep(4)\n"  # longer than it waits for other ranks' stacks
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=60).returncode == 0


def test_stacks_of_earlier_attempts_are_kept(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "stacks-rank0.txt"
    for text in ("first", "second", ""):
        with Watchdog(GuardConfig(), stacks):
            stacks.write_text(text)
    kept = {path.name: path.read_text() for path in stacks.parent.iterdir()}
    assert kept == {"earlier-1-stacks-rank0.txt": "first", "earlier-2-stacks-rank0.txt": "second"}


def test_a_process_that_makes_progress_is_not_ended(tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.anomalies import GuardConfig\nfrom pipeline.runtime.watchdog import Watchdog\n"
        f"with Watchdog(GuardConfig(hang_timeout_s=5.0), Path({str(tmp_path / 'stacks.txt')!r})) as dog:\n"
        "    for _ in range(5):\n        time.sleep(0.1)\n        dog.feed()\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=60).returncode == 0
