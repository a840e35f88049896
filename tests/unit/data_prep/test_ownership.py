"""One writer per directory: real processes, with flock and on a file system without it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import ownership
from data_prep.outputs import check_output_place, replaced_directory
from data_prep.ownership import InUseError, Owner, own
from data_prep.shards import DataError
from tests.conftest import REPO

HOLD = """
import fcntl, sys, time
from pathlib import Path
from data_prep.ownership import own
if sys.argv[2] == "without flock":
    def flock(descriptor, operation): raise OSError(37, "No locks available")
    fcntl.flock = flock
own(Path(sys.argv[1]), "the directory")
print("held", flush=True)
time.sleep(60)
"""


def holder(path: Path, how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["with flock", "without flock"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without flock":
        monkeypatch.setattr(fcntl, "flock", without_locks)
        monkeypatch.setattr(ownership, "RECHECK_S", 0.05)
    return request.param


def without_locks(*unused: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_second_writer_is_rejected_and_a_dead_one_is_replaced_immediately(how: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = holder(path, how)
    with pytest.raises(InUseError, match=f"the directory is in use by process {process.pid} on .*, since 20"):
        own(path, "the directory")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    began = time.monotonic()
    own(path, "the directory").release()
    assert time.monotonic() - began < 5
    assert not path.exists()


def write_remote_owner(path: Path, **changes: object) -> None:
    owner = Owner.myself()
    vars(owner).update({"machine": "another", "host": "far", "by_flock": False, **changes})
    path.write_bytes(owner.text())


def test_an_owner_on_another_host_is_alive_while_it_touches_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE_S", 1.0)
    path = tmp_path / "lock"
    write_remote_owner(path)
    beat = f"import os, time\nfor _ in range(100): os.utime({str(path)!r}); time.sleep(0.1)"
    with subprocess.Popen([sys.executable, "-c", beat]) as beating:
        with pytest.raises(InUseError, match="on far"):
            own(path, "the directory")
        beating.kill()
    own(path, "the directory").release()  # no process touches it any more


@pytest.mark.parametrize("off_s", [-60, 60])
def test_a_wrong_clock_does_not_take_over_a_live_owner(
    off_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of this machine is wrong by a minute; by the clock of the file system the file was just touched."""
    path = tmp_path / "lock"
    write_remote_owner(path)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + off_s)
    monkeypatch.setattr(ownership, "PATIENCE_S", 1.0)
    began = time.monotonic()
    own(path, "the directory").release()
    assert time.monotonic() - began >= 0.9, "the lock was acquired without waiting"


def test_a_requeued_job_replaces_its_earlier_start_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_remote_owner(tmp_path / "lock", job="77.0")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    own(tmp_path / "lock", "the directory").release()
    assert time.monotonic() - began < 5


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    owner = Owner.myself()
    owner.started, owner.by_flock = owner.started - 1, False
    (tmp_path / "lock").write_bytes(owner.text())
    own(tmp_path / "lock", "the directory").release()


def test_a_file_of_the_user_is_not_used_as_a_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("mine\n")
    with pytest.raises(DataError, match="is not a lock file of this program"):
        own(tmp_path / "lock", "the directory")
    assert (tmp_path / "lock").read_text() == "mine\n"


def test_an_owner_that_lost_its_lock_is_notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.05)
    lost: list[Path] = []
    held = own(tmp_path / "lock", "the directory")
    held._on_loss = lost.append
    write_remote_owner(tmp_path / "lock")
    deadline = time.monotonic() + 5
    while not lost and time.monotonic() < deadline:
        time.sleep(0.02)
    held.release()
    assert lost == [tmp_path / "lock"]
    assert json.loads((tmp_path / "lock").read_text())["owner"]["host"] == "far"


def test_replacing_a_directory_keeps_its_neighbours_and_added_files(tmp_path: Path) -> None:
    for name in ("voc.old", "voc.tmp"):
        (tmp_path / name).mkdir()
    for number in range(2):
        with replaced_directory(tmp_path / "voc", ["product"]) as new:
            (new / "product").write_text(str(number))
        (tmp_path / "voc" / "notes").write_text("mine")
    with pytest.raises(OSError, match="full"), replaced_directory(tmp_path / "voc", ["product"]) as new:
        raise OSError("full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["voc", "voc.old", "voc.tmp"]
    assert {path.name: path.read_text() for path in (tmp_path / "voc").iterdir()} == {"product": "1", "notes": "mine"}


def test_directories_of_the_user_are_rejected_as_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    inputs = {"the teacher": tmp_path / "work" / "teacher"}
    for place in (Path(), Path("/"), Path.home(), tmp_path, tmp_path / "work" / "teacher", Path("teacher/../teacher")):
        with pytest.raises(DataError, match=r"--output .* must not be overwritten"):
            check_output_place(place, "--output", inputs)
    check_output_place(tmp_path / "work" / "teacher" / "student", "--output", inputs)


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize("command", [
    ["pipeline/train.py", "--deepspeed", "ds_configs/zero2.json", "--run-dir"],
    ["-m", "data_prep", "prepare", "--input", "samples/cc100", "--tokenizer", "x", "--output"],
])  # fmt: skip
def test_an_empty_output_name_is_rejected(command: list[str], text: str) -> None:
    run = subprocess.run([sys.executable, *command, text], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 2
    assert "is empty" in run.stderr


def test_ctrl_c_ends_prepare_that_waits_for_its_input(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """The input never arrives, as from a network file system that hangs."""
    (tmp_path / "sw.txt").write_text("habari ya asubuhi\n" * 100)
    program = """
import signal, sys, time
from data_prep import language_job
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background inherits that it is ignored
def chunks(self):
    print("reading", flush=True)
    time.sleep(600)
    yield b""
language_job.Source.chunks = chunks
from data_prep import prepare, __main__ as command
prepare.check_languages = lambda *unused: {}
sys.exit(command.main(sys.argv[1:]))
"""
    words = ["prepare", "--input", str(tmp_path / "sw.txt"), "--tokenizer", str(tiny_tokenizer), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words, "--output", str(tmp_path / "shards")],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped. Finished shards are kept" in errors
