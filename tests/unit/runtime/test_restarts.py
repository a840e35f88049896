"""The attempts of a run: crashes in a row are counted, under the file's present name and its former one."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.runtime.restarts import Restarts, restarts_file

CRASH = {"first_step": 0, "saved_steps": [], "ended": None, "time_s": 1.0, "host": "x", "world_size": 1}


def test_crashes_in_a_row_are_counted_across_attempts(tmp_path: Path) -> None:
    for saved, ended, crashes in [([], None, 1), ([], None, 2), ([7, 9], None, 0), ([], None, 1), ([], "PREEMPTED", 0)]:
        restarts = Restarts(tmp_path)
        restarts.begin(0, world_size=2)
        for step in saved:
            restarts.saved(step, seconds=30.0 - step)
        if ended:
            restarts.end(ended)
        assert Restarts(tmp_path).crashes_in_a_row == crashes
    assert Restarts(tmp_path).slowest_save_s == 23.0


def test_the_former_name_is_read_and_the_present_one_written(tmp_path: Path) -> None:
    (tmp_path / "lives.json").write_text(json.dumps([CRASH, CRASH]))
    restarts = Restarts(tmp_path)
    assert restarts.crashes_in_a_row == 2
    assert restarts_file(tmp_path) == tmp_path / "lives.json", "reading alone changes nothing, as in a dry run"
    restarts.begin(0, world_size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["restarts.json"]
    assert len(json.loads((tmp_path / "restarts.json").read_text())) == 3
    assert Restarts(tmp_path).crashes_in_a_row == 3


def test_the_former_file_does_not_hide_the_present_one(tmp_path: Path) -> None:
    """Both exist where a kill came between writing the one and deleting the other."""
    (tmp_path / "lives.json").write_text(json.dumps([CRASH]))
    (tmp_path / "restarts.json").write_text(json.dumps([CRASH, CRASH]))
    assert Restarts(tmp_path).crashes_in_a_row == 2


def test_the_former_file_stays_until_the_present_one_is_written(tmp_path: Path) -> None:
    (tmp_path / "lives.json").write_text(json.dumps([CRASH]))
    (tmp_path / "restarts.json").symlink_to("/dev/full")
    Restarts(tmp_path).begin(0, world_size=1)
    assert (tmp_path / "lives.json").exists()
