"""Failures that must not stay silent: shards cut short, saves that keep failing, weights that are not finite."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.shards import ShardSet
from pipeline.config import load_recipe
from pipeline.errors import EXIT_DIVERGED, EXIT_USER, UserError
from pipeline.export.hf import export_run
from pipeline.runtime.checkpoint import commit, committed_steps, fsync_and_hash
from tests.dist.runs import end_group
from tests.faults.sweeps.lab import Lab, newest_step, same_student, steps_done, wait_until

STEPS = {"steps": 8, "save_every": 1, "eval_every": 8, "checkpoint.keep": 10}


def test_a_shard_cut_while_it_is_read_is_named(lab: Lab) -> None:
    """Reading beyond the end of a mapped file would kill the process by SIGBUS."""
    data = Path(shutil.copytree(load_recipe(lab.recipe, []).data, lab.directory / "shards"))
    run_dir = lab.fresh("run")
    settings = {"steps": 500, "save_every": 500, "eval_every": 500, "data": str(data)}
    job = lab.begin(run_dir, 1, settings, faults=[{"kind": "pause", "seconds": 0.05}])
    try:
        assert wait_until(lambda: steps_done(run_dir) >= 2)
        for shard in ShardSet(data).all_shards():
            os.truncate(shard.path, 64)
        assert job.wait(60) == EXIT_USER
    finally:
        end_group(job)
    log = run_dir.with_suffix(".log").read_text()
    assert str(data) in log.split("error:")[-1]
    assert "Traceback" not in log


def test_saves_that_keep_failing_end_the_run_with_the_reason(lab: Lab) -> None:
    """A disk that stays full: the run stops and keeps the older checkpoints, instead of training for a week without saves."""
    full = [
        {"kind": "at call", "save": save, "rank": 0, "operation": "fsync", "call": 1, "error": errno.ENOSPC}
        for save in range(3, 9)
    ]
    run_dir = lab.fresh("run")
    assert lab.run(run_dir, 1, {**STEPS, "checkpoint.max_failed_saves": 3}, faults=full) == EXIT_USER
    log = run_dir.with_suffix(".log").read_text()
    assert "3 saves in a row have failed (checkpoint.max_failed_saves)" in log
    assert committed_steps(run_dir / "checkpoints") == [1, 2]
    assert not (run_dir / "DONE").exists()
    assert lab.run(run_dir, 1, STEPS) == 0, "with free space it resumes from there"
    assert same_student(run_dir, lab.untouched(1, STEPS))


def test_a_few_failed_saves_do_not_end_the_run(lab: Lab) -> None:
    full = [
        {"kind": "at call", "save": save, "rank": 0, "operation": "fsync", "call": 1, "error": errno.ENOSPC}
        for save in (2, 3, 5, 6)
    ]
    run_dir = lab.fresh("run")
    assert lab.run(run_dir, 1, {**STEPS, "checkpoint.max_failed_saves": 3}, faults=full) == 0
    assert same_student(run_dir, lab.untouched(1, STEPS))


def test_weights_that_are_not_finite_are_never_saved(lab: Lab) -> None:
    run_dir = lab.fresh("run")
    healthy = {**STEPS, "steps": 2, "eval_every": 2}
    assert lab.run(run_dir, 2, healthy) == 0
    assert lab.run(run_dir, 2, STEPS, faults=[{"kind": "broken weights", "step": 3}]) == EXIT_DIVERGED
    log = run_dir.with_suffix(".log").read_text()
    assert "are not finite (NaN or infinite): no checkpoint of them is written" in log
    assert newest_step(run_dir) == 3
    assert not (run_dir / "DONE").exists()


def test_a_student_that_is_not_finite_is_never_exported(lab: Lab, tmp_path: Path) -> None:
    """A checkpoint of an older version, with valid files and hashes."""
    run_dir = Path(shutil.copytree(lab.untouched(1, STEPS), tmp_path / "old"))
    spoil(run_dir / "checkpoints" / "step-00000008")
    with pytest.raises(UserError, match=r"is not finite.*step-00000007 is finite; to export it: mv "):
        export_run(run_dir, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def spoil(checkpoint: Path) -> None:
    """Make one weight NaN, with a manifest that matches."""
    partial = checkpoint.rename(checkpoint.with_name(checkpoint.name + ".tmp"))
    files = json.loads((partial / "manifest.json").read_text())["files"]
    (file,) = partial.glob("weight-*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file)
    commit(partial, checkpoint, {**files, file.name: fsync_and_hash(file)})
