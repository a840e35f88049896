"""Stop requests, sick batches, and the watchdog, which must end a hung process with its stacks on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import EXIT_HUNG, SickRunError
from pipeline.runtime.guard import STOP_SIGNALS, BadStepCounter, GuardConfig, StopRequests
from tests.conftest import REPO

NAN = float("nan")


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_becomes_a_reason(number: signal.Signals, tmp_path: Path, handlers: None) -> None:
    stop = StopRequests(tmp_path / "STOP")
    stop.listen()
    assert stop.reason is None
    os.kill(os.getpid(), number)
    assert stop.reason == f"signal {number.name}"


def test_stop_file_becomes_a_reason(tmp_path: Path) -> None:
    stop = StopRequests(tmp_path / "STOP")
    assert stop.reason is None
    (tmp_path / "STOP").touch()
    assert stop.reason == "file STOP"


def test_k_bad_steps_in_a_row_stop_and_name_the_batch(tmp_path: Path) -> None:
    report = tmp_path / "bad_batch.json"
    counter = BadStepCounter(GuardConfig(max_bad_steps=3), report)
    for step, loss in enumerate([NAN, NAN, 1.0, NAN, float("inf")]):
        counter.observe(step, loss, loss != 1.0, 1.0, lambda: [])
    assert not report.exists()
    with pytest.raises(SickRunError, match="step 5"):
        counter.observe(5, NAN, True, 1.0, lambda: [{"language": "sw", "row": 7}])
    assert json.loads(report.read_text()) == {"step": 5, "loss": "nan", "rows": [{"language": "sw", "row": 7}]}


def test_loss_scaling_may_overflow_until_its_floor(tmp_path: Path) -> None:
    counter = BadStepCounter(GuardConfig(max_bad_steps=2), tmp_path / "bad_batch.json")
    for step in range(16):
        counter.observe(step, 1.0, True, 2.0 ** (16 - step), lambda: [])
    counter.observe(16, 1.0, True, 1.0, lambda: [])
    with pytest.raises(SickRunError):
        counter.observe(17, 1.0, True, 1.0, lambda: [])


def test_watchdog_dumps_stacks_and_ends_the_process(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "stacks.txt"
    program = (
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.guard import Watchdog\n"
        "def stuck_here():\n    time.sleep(60)\n"
        f"with Watchdog(0.5, Path({str(stacks)!r})):\n    stuck_here()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HUNG
    assert "stuck_here" in stacks.read_text()
    assert str(stacks) in done.stderr


def test_fed_watchdog_stays_quiet(tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.guard import Watchdog\n"
        f"with Watchdog(5.0, Path({str(tmp_path / 'stacks.txt')!r})) as dog:\n"
        "    for _ in range(5):\n        time.sleep(0.1)\n        dog.feed()\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=60).returncode == 0
