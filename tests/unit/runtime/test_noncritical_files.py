"""What is beside the training cannot end it: a file of another shape is kept under another name and written again."""

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
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.watchdog import Watchdog


def put(kind: str, path: Path) -> None:
    """Something else where a file is expected."""
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)  # opening it for writing would wait indefinitely
    else:
        path.symlink_to(path.parent / "nowhere" / "at all")


KINDS = ["directory", "fifo", "link to nothing"]


@pytest.mark.parametrize(
    "content",
    ["null", "[{}]", "{", "5", "[" * 100_000, '[{"saved_steps": 3, "ended": null}]', b"\xff\xfe", b""],
    ids=lambda content: repr(content[:12]),
)
def test_starts_of_another_shape_are_kept_aside_and_counted_anew(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "lives.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    restarts = Restarts(tmp_path)
    assert (restarts.crashes_in_a_row, restarts.slowest_save_s) == (0, 0.0)
    restarts.begin(0, 1)
    assert len(json.loads(path.read_text())) == 1
    assert (tmp_path / "lives.json.corrupt-1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_beside_the_training_may_be_in_the_way(tmp_path: Path, kind: str) -> None:
    names = ("metrics.jsonl", "metrics.tmp", "lives.tmp", "spikes.jsonl", "DONE", "run.json", "run.json.tmp")
    for name in names:
        put(kind, tmp_path / name)
    restarts = Restarts(tmp_path)
    restarts.begin(0, 1)
    metrics = Metrics(tmp_path, active=True, first_step=0, steps=5)
    metrics.write(1, 8, {"loss/total": 1.0})
    metrics.close()
    record_spike(tmp_path / "spikes.jsonl", 1, 2.0, 9.0, skipped=False, rows=[])
    write_file_or_warn(tmp_path / "DONE", "done")
    write_file_or_warn(tmp_path / "run.json", "{}")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    assert json.loads((tmp_path / "spikes.jsonl").read_text())["loss"] == 2.0
    assert (tmp_path / "DONE").read_text() == "done"
    assert read_json_or_warn(tmp_path / "run.json") == {}
    assert len(json.loads((tmp_path / "lives.json").read_text())) == 1


def test_good_points_of_a_curve_survive_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps({"step": step, "samples": step, "loss/total": 1.0}).encode() for step in (1, 2, 3)]
    bad = [b"\xff", b"5", b'{"step": null}', b"null", b"[" * 100_000]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*good[:2], *bad, good[2], b'{"step": 4, "sam']))
    before = path.read_bytes()
    metrics = Metrics(tmp_path, active=True, first_step=2, steps=5)
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert (tmp_path / "metrics.jsonl.corrupt-1").read_bytes() == before
    assert "5 lines are no points" in capsys.readouterr().out
    assert "loss/total" in metrics.known_of_first_step


def test_a_line_that_a_kill_cut_short_is_no_corruption(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples": 8}\n{"step": 2, "sa')
    Metrics(tmp_path, active=True, first_step=1, steps=5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "samples": 8}\n'
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_tensorboard_and_logs_that_are_files_are_replaced(tmp_path: Path) -> None:
    for name in ("tensorboard", "logs"):
        (tmp_path / name).write_text("")
    metrics = Metrics(tmp_path, active=True, first_step=0, steps=5)
    metrics.write(1, 8, {"loss/total": 1.0})
    metrics.close()
    with Watchdog(GuardConfig(), tmp_path / "logs" / "stacks-rank0.txt"):
        assert (tmp_path / "logs" / "stacks-rank0.txt").is_file()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_place_that_takes_no_files_costs_the_logs_and_nothing_else(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc takes no files, from root either."""
    nowhere = Path("/proc/self")
    with Watchdog(GuardConfig(), nowhere / "logs" / "stacks-rank0.txt"):
        tee_output(nowhere / "logs" / "rank0.log")
        metrics = Metrics(nowhere, active=True, first_step=0, steps=5)
        metrics.write(1, 8, {"loss/total": 1.0})
        metrics.close()
        write_file_or_warn(nowhere / "run.json", "{}")
        Restarts(nowhere).begin(0, 1)
    said = capfd.readouterr().out
    for name in ("stacks-rank0.txt", "rank0.log", "metrics", "run.json", "lives.json"):
        assert any(line.startswith("warning: ") and name in line for line in said.splitlines()), name


def test_a_stop_directory_left_by_an_earlier_start_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir()
    stop = StopRequests(tmp_path / "STOP", margin_s=1)
    stop.forget_leftover()
    assert stop.reason is None
    assert (tmp_path / "STOP.corrupt-1").is_dir()


def test_a_device_is_left_where_it_is(tmp_path: Path) -> None:
    device = tmp_path / "full"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7))  # one of its own: the machine's is not put at risk
    except PermissionError:
        pytest.skip("making a device takes root")
    write_file_or_warn(device, "done")
    set_aside(device, "not a regular file")
    assert device.is_char_device()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_every_bad_file_keeps_a_name_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / "run.json").write_text(str(number))
        set_aside(tmp_path / "run.json", "another shape")
        assert (tmp_path / f"run.json.corrupt-{number}").read_text() == str(number)
