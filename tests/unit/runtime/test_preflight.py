"""Checks before step 1: the run directory, the disk, agreement between ranks, and locks of killed compilations."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.provenance import CODE, code_fingerprint
from pipeline.runtime import preflight
from pipeline.runtime.run_paths import RunPaths
from tests.conftest import REPO


def test_two_trees_that_differ_have_two_fingerprints(tmp_path: Path) -> None:
    """Computed from the files, without git."""
    for package in CODE:
        shutil.copytree(REPO / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_fingerprint(tmp_path)
    assert before == code_fingerprint(REPO)
    changed = tmp_path / "pipeline" / "runtime" / "dist.py"
    changed.write_text(changed.read_text() + "\n")
    after = code_fingerprint(tmp_path)
    (tmp_path / "data_prep" / "new.py").write_text("")
    assert len({before, after, code_fingerprint(tmp_path)}) == 3


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


def test_milestones_that_will_not_fit_are_a_warning(tmp_path: Path) -> None:
    assert preflight.milestones_warning(tmp_path, 2**20, 0) is None
    assert "checkpoint.keep_every" in str(preflight.milestones_warning(tmp_path, 2**40, 1000))


def test_the_run_directory_survives_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new name survives a power failure once the directory that holds it was synced."""
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run_dir = tmp_path / "runs" / "new"
    preflight.ensure_run_dir(RunPaths(run_dir))
    assert (run_dir / "checkpoints").is_dir()
    assert {str(run_dir), str(run_dir.parent), str(tmp_path)} <= set(synced)
