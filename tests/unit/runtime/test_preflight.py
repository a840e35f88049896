"""What is checked and made before step 1 that a run in good health never notices."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipeline.provenance import CODE, code_fingerprint
from pipeline.runtime import preflight
from tests.conftest import REPO


def test_two_trees_that_differ_have_two_fingerprints(tmp_path: Path) -> None:
    """Without a checkout, and whatever git would have said of either."""
    for package in CODE:
        shutil.copytree(REPO / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_fingerprint(tmp_path)
    assert before == code_fingerprint(REPO)
    changed = tmp_path / "pipeline" / "runtime" / "dist.py"
    changed.write_text(changed.read_text() + "\n")
    after = code_fingerprint(tmp_path)
    (tmp_path / "data_prep" / "new.py").write_text("")
    assert len({before, after, code_fingerprint(tmp_path)}) == 3


def test_milestones_that_will_not_fit_are_a_warning(tmp_path: Path) -> None:
    assert preflight.milestones_warning(tmp_path, 2**20, 0) is None
    assert "checkpoint.keep_every" in str(preflight.milestones_warning(tmp_path, 2**40, 1000))


def test_a_power_failure_takes_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new name is only there for good once the directory that holds it was synced."""
    synced: list[str] = []
    fsync = os.fsync

    def witness(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", witness)
    run_dir = tmp_path / "runs" / "new"
    preflight.ensure_run_dir(run_dir)
    assert (run_dir / "checkpoints").is_dir()
    assert {str(run_dir), str(run_dir.parent), str(tmp_path)} <= set(synced)
