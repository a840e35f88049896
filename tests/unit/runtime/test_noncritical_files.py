"""Files that a run can do without cannot end it: one of another shape is kept under another name and written again."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from pipeline.runtime.anomalies import GuardConfig, record_spike
from pipeline.runtime.metrics import Metrics
from pipeline.runtime.noncritical_files import read_json_or_warn, set_aside, write_file_or_warn
from pipeline.runtime.rank_log import tee_output
from pipeline.runtime.restarts import Restarts
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.watchdog import Watchdog


def put(kind: str, path: Path) -> None:
    """Create something that is not a regular file at `path`."""
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)  # opening it for writing would wait indefinitely
    else:
        path.symlink_to(path.parent / "nowhere" / "at all")


KINDS = ["directory", "fifo", "dangling link"]


@pytest.mark.parametrize(
    "content",
    ["null", "[{}]", "{", "5", "[" * 100_000, '[{"saved_steps": 3, "ended": null}]', b"\xff\xfe", b""],
    ids=lambda content: repr(content[:12]),
)
@pytest.mark.parametrize("name", ["restarts.json", "lives.json"])
def test_attempts_of_another_shape_are_renamed_and_counted_from_zero(
    tmp_path: Path, content: str | bytes, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    restarts = Restarts(tmp_path)
    assert (restarts.crashes_in_a_row, restarts.slowest_save_s) == (0, 0.0)
    restarts.begin(0, 1)
    assert len(json.loads((tmp_path / "restarts.json").read_text())) == 1
    assert (tmp_path / f"{name}.corrupt-1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_the_place_of_a_noncritical_file_ends_a_run(tmp_path: Path, kind: str) -> None:
    names = ("metrics.jsonl", "metrics.tmp", "restarts.json", "spikes.jsonl", "DONE", "run.json", "run.json.tmp")
    for name in names:
        put(kind, tmp_path / name)
    restarts = Restarts(tmp_path)
    restarts.begin(0, 1)
    metrics = Metrics(RunPaths(tmp_path), active=True, first_step=0, steps=5)
    metrics.write(1, 8, {"loss/total": 1.0})
    metrics.close()
    record_spike(tmp_path / "spikes.jsonl", 1, 2.0, 9.0, skipped=False, rows=[])
    write_file_or_warn(tmp_path / "DONE", "done")
    write_file_or_warn(tmp_path / "run.json", "{}")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    assert json.loads((tmp_path / "spikes.jsonl").read_text())["loss"] == 2.0
    assert (tmp_path / "DONE").read_text() == "done"
    assert read_json_or_warn(tmp_path / "run.json") == {}
    assert len(json.loads((tmp_path / "restarts.json").read_text())) == 1


def test_good_points_of_a_curve_survive_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps({"step": step, "samples": step, "loss/total": 1.0}).encode() for step in (1, 2, 3)]
    bad = [b"\xff", b"5", b'{"step": null}', b"null", b"[" * 100_000]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*good[:2], *bad, good[2], b'{"step": 4, "sam']))
    before = path.read_bytes()
    metrics = Metrics(RunPaths(tmp_path), active=True, first_step=2, steps=5)
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert (tmp_path / "metrics.jsonl.corrupt-1").read_bytes() == before
    assert "5 lines are not points" in capsys.readouterr().out
    assert "loss/total" in metrics.known_of_first_step


def test_a_line_that_a_kill_cut_short_is_no_corruption(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples": 8}\n{"step": 2, "sa')
    Metrics(RunPaths(tmp_path), active=True, first_step=1, steps=5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "samples": 8}\n'
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_tensorboard_and_logs_that_are_files_are_replaced(tmp_path: Path) -> None:
    for name in ("tensorboard", "logs"):
        (tmp_path / name).write_text("")
    metrics = Metrics(RunPaths(tmp_path), active=True, first_step=0, steps=5)
    metrics.write(1, 8, {"loss/total": 1.0})
    metrics.close()
    with Watchdog(GuardConfig(), tmp_path / "logs" / "stacks-rank0.txt"):
        assert (tmp_path / "logs" / "stacks-rank0.txt").is_file()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_directory_that_cannot_be_written_to_costs_the_logs_and_nothing_else(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even root can create files in /proc."""
    nowhere = Path("/proc/self")
    with Watchdog(GuardConfig(), nowhere / "logs" / "stacks-rank0.txt"):
        tee_output(nowhere / "logs" / "rank0.log")
        metrics = Metrics(RunPaths(nowhere), active=True, first_step=0, steps=5)
        metrics.write(1, 8, {"loss/total": 1.0})
        metrics.close()
        write_file_or_warn(nowhere / "run.json", "{}")
        Restarts(nowhere).begin(0, 1)
    said = capfd.readouterr().out
    for name in ("stacks-rank0.txt", "rank0.log", "metrics", "run.json", "restarts.json"):
        assert any(line.startswith("warning: ") and name in line for line in said.splitlines()), name


def test_a_full_disk_is_a_warning(capsys: pytest.CaptureFixture) -> None:
    assert not write_file_or_warn(Path("/dev/full"), "done")
    assert "warning: /dev/full not written" in capsys.readouterr().out


def test_a_device_is_not_renamed(tmp_path: Path) -> None:
    device = tmp_path / "full"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7))  # a device of this test, not one of the machine
    except PermissionError:
        pytest.skip("only root can make a device")
    write_file_or_warn(device, "done")
    set_aside(device, "not a regular file")
    assert device.is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_every_renamed_file_gets_a_name_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / "run.json").write_text(str(number))
        set_aside(tmp_path / "run.json", "another shape")
        assert (tmp_path / f"run.json.corrupt-{number}").read_text() == str(number)
