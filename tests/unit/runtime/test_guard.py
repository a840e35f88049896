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

from pipeline.errors import EXIT_HUNG, DivergedRunError, UserError
from pipeline.runtime import preflight
from pipeline.runtime.anomalies import BadStepCounter, GuardConfig, SpikeDetector
from pipeline.runtime.noncritical_files import write_file_or_warn
from pipeline.runtime.restarts import Restarts
from pipeline.runtime.stop import STOP_SIGNALS, StopRequests
from pipeline.runtime.watchdog import Watchdog
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


def test_a_second_signal_changes_nothing(tmp_path: Path, handlers: None) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    assert stop.reason == "signal SIGTERM"


def test_under_nohup_a_hangup_is_no_wish_to_stop(tmp_path: Path, handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    stop.end_at_once()
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reason is None


def test_before_the_ranks_have_met_a_signal_ends_the_rank(tmp_path: Path, handlers: None) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.listen()
    stop.end_at_once()
    assert {signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)} == {signal.SIG_DFL}
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "signal SIGTERM"


def test_a_launcher_that_has_gone_is_a_reason(tmp_path: Path) -> None:
    stop = StopRequests(tmp_path / "STOP", 60)
    stop.launcher_has_gone()
    assert stop.reason == "the launcher has gone"


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


def test_an_earlier_lifes_save_counts_up_to_half_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 500))
    stop = StopRequests(tmp_path / "STOP", margin_s=60)
    stop.saw_earlier_saves(70)
    assert stop.margin_s == 210
    stop.saw_earlier_saves(10_000)  # a day of slow disks must not end every later life at its first step
    assert 240 < stop.margin_s < 260
    assert stop.reason is None


def test_a_full_disk_changes_no_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_file_or_warn(Path("/dev/full"), "done")
    assert "warning: /dev/full not written" in capsys.readouterr().out
    with pytest.raises(DivergedRunError):
        BadStepCounter(GuardConfig(max_bad_steps=1), Path("/dev/full")).observe(0, NAN, True, 1.0, lambda: [])
    report = tmp_path / "bad_batch.json"
    with pytest.raises(DivergedRunError, match=str(report)):
        BadStepCounter(GuardConfig(max_bad_steps=1), report, writes=False).observe(0, NAN, True, 1.0, lambda: [])
    assert not report.exists(), "written by a rank that should not"


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
    for saved, ended, crashes in [([], None, 1), ([], None, 2), ([7, 9], None, 0), ([], None, 1), ([], "PREEMPTED", 0)]:
        restarts = Restarts(tmp_path)
        restarts.begin(0, world_size=2)
        for step in saved:
            restarts.saved(step, seconds=30.0 - step)
        if ended:
            restarts.end(ended)
        assert Restarts(tmp_path).crashes_in_a_row == crashes
    assert Restarts(tmp_path).slowest_save_s == 23.0


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
    of_two = [{"precision of the student": "fp16"}, {"precision of the student": "bf16"}]
    with pytest.raises(UserError, match=r"\(bf16 on new instead of fp16 on old\).*Their devices cannot do the same"):
        preflight.check_agreement(of_two, ["old", "new"])


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
    with pytest.raises(DivergedRunError, match="step 5"):
        counter.observe(5, NAN, True, 1.0, lambda: [{"language": "sw", "row": 7}])
    assert json.loads(report.read_text()) == {"step": 5, "loss": "nan", "rows": [{"language": "sw", "row": 7}]}


def test_loss_scaling_may_overflow_until_its_floor(tmp_path: Path) -> None:
    counter = BadStepCounter(GuardConfig(max_bad_steps=2), tmp_path / "bad_batch.json")
    for step in range(16):
        counter.observe(step, 1.0, True, 2.0 ** (16 - step), lambda: [])
    counter.observe(16, 1.0, True, 1.0, lambda: [])
    with pytest.raises(DivergedRunError):
        counter.observe(17, 1.0, True, 1.0, lambda: [])


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


def test_a_call_that_keeps_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    """No Python thread runs any more, the watchdog's neither."""
    stacks = tmp_path / "logs" / "stacks.txt"
    command = stuck(stacks, "ctypes.PyDLL(None).sleep(60)", "watchdog.BACKSTOP_MARGIN_S = 1.0")
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=40)
    assert done.returncode == 1
    assert "stuck_here" in stacks.read_text()


def test_a_console_that_nobody_reads_holds_no_watchdog(tmp_path: Path) -> None:
    fill = "os.set_blocking(2, False)\ntry:\n    while os.write(2, b'x' * 4096): pass\nexcept BlockingIOError: pass\n"
    command = stuck(tmp_path / "stacks.txt", "time.sleep(60)", fill + "os.set_blocking(2, True)")
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE)
    try:
        assert process.wait(40) == EXIT_HUNG
    finally:
        process.kill()


def test_a_run_that_ends_while_the_watchdog_collects_stacks_has_ended_well(tmp_path: Path) -> None:
    """A stopped rank is woken for its stacks, and may bring the run to its last step with that."""
    stacks = tmp_path / "stacks.txt"
    program = (
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.anomalies import GuardConfig\n"
        "from pipeline.runtime.watchdog import Watchdog\n"
        f"with Watchdog(GuardConfig(hang_timeout_s=0.4, slow_timeout_s=0.4), stacks := Path({str(stacks)!r})):\n"
        "    while not stacks.stat().st_size: time.sleep(0.05)\n"
        "time.sleep(4)\n"  # longer than it waits for other ranks' stacks
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=60).returncode == 0


def test_stacks_of_earlier_lives_are_kept(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "stacks-rank0.txt"
    for text in ("first", "second", ""):
        with Watchdog(GuardConfig(), stacks):
            stacks.write_text(text)
    kept = {path.name: path.read_text() for path in stacks.parent.iterdir()}
    assert kept == {"earlier-1-stacks-rank0.txt": "first", "earlier-2-stacks-rank0.txt": "second"}


def test_fed_watchdog_stays_quiet(tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\nfrom pipeline.runtime.anomalies import GuardConfig\nfrom pipeline.runtime.watchdog import Watchdog\n"
        f"with Watchdog(GuardConfig(hang_timeout_s=5.0), Path({str(tmp_path / 'stacks.txt')!r})) as dog:\n"
        "    for _ in range(5):\n        time.sleep(0.1)\n        dog.feed()\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=60).returncode == 0
