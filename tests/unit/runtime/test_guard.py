"""Stop requests, sick batches, and the watchdog, which must end a hung process with its stacks on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import EXIT_HUNG, SickRunError, UserError
from pipeline.runtime import preflight
from pipeline.runtime.guard import STOP_SIGNALS, BadStepCounter, GuardConfig, SpikeDetector, StopRequests
from pipeline.runtime.lives import Lives
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
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    assert stop.reason is None
    os.kill(os.getpid(), number)
    assert stop.reason == f"signal {number.name}"


def test_stop_file_becomes_a_reason(tmp_path: Path) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    assert stop.reason is None
    (tmp_path / "STOP").touch()
    assert stop.reason == "file STOP"


def test_deadline_leaves_room_for_the_saves_that_were_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 500))
    stop = StopRequests(tmp_path / "STOP", margin_s=60)
    assert stop.reason is None
    stop.saw_save(20)
    assert stop.reason is None
    stop.saw_save(300)
    assert "deadline" in str(stop.reason)
    assert "900 s" in str(stop.reason)


def test_spikes_stand_out_and_do_not_hide_the_next() -> None:
    spikes = SpikeDetector(GuardConfig(spike_window=20, spike_sigmas=6))
    ordinary = [1.0 + 0.02 * (step % 5) for step in range(30)]
    assert [spikes.z_score(loss) for loss in ordinary] == [None] * 30
    first, second = spikes.z_score(3.0), spikes.z_score(3.0)
    assert first is not None
    assert first == second
    assert spikes.z_score(float("nan")) is None
    assert spikes.z_score(1.03) is None


def test_crashes_in_a_row_are_counted_across_lives(tmp_path: Path) -> None:
    for saved, ended, crashes in [([], None, 1), ([], None, 2), ([7], None, 0), ([], None, 1), ([], "PREEMPTED", 0)]:
        lives = Lives(tmp_path)
        lives.begin(0, world_size=2)
        for step in saved:
            lives.saved(step)
        if ended:
            lives.end(ended)
        assert Lives(tmp_path).crashes_in_a_row == crashes


def test_preflight_names_what_is_in_the_way(tmp_path: Path) -> None:
    preflight.check_run_dir(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--run-dir"):
        preflight.check_run_dir(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"checkpoint\.keep"):
        preflight.check_disk(tmp_path, 2**60, 2, 0)
    with pytest.raises(UserError, match="rank 2 has another code than rank 0"):
        preflight.check_agreement([{"code": "a"}, {"code": "a"}, {"code": "b"}])


def test_stale_build_locks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    fresh, stale = tmp_path / "new" / "lock", tmp_path / "old" / "lock"
    for lock in (fresh, stale):
        lock.parent.mkdir()
        lock.touch()
    os.utime(stale, (time.time() - 7200,) * 2)
    assert preflight.stale_build_locks() == [stale]


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
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.guard import GuardConfig, Watchdog\n"
        "def stuck_here():\n    time.sleep(60)\n"
        f"with Watchdog(GuardConfig(hang_timeout_s=0.5, slow_timeout_s=0.5), Path({str(stacks)!r})):\n    stuck_here()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HUNG
    assert "stuck_here" in stacks.read_text()
    assert str(stacks) in done.stderr


def test_fed_watchdog_stays_quiet(tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.guard import GuardConfig, Watchdog\n"
        f"with Watchdog(GuardConfig(hang_timeout_s=5.0), Path({str(tmp_path / 'stacks.txt')!r})) as dog:\n"
        "    for _ in range(5):\n        time.sleep(0.1)\n        dog.feed()\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=60).returncode == 0
