"""`--dry-run` takes the run's first step, prints what a run would need, and leaves every file as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.errors import EXIT_DIVERGED, EXIT_USER
from tests.dist.fork_server import ForkServer
from tests.dist.runs import curve
from tests.dist.training_process import TrainingProcess


@pytest.fixture
def words(tiny_recipe: Path, fp32_config: Path) -> list[object]:
    return ["--deepspeed", fp32_config, "--recipe", tiny_recipe]


def state_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in directory.rglob("*") if p.is_file()}


def loss_in(text: str) -> float:
    found = re.search(r"^  loss +([0-9.]+) ", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_a_dry_run_leaves_no_trace_in_the_run_after_it(
    training: TrainingProcess, words: list[object], tmp_path: Path
) -> None:
    run_dir = tmp_path / "not" / "there" / "run"
    tried = training.run(*words, "--run-dir", run_dir, "--dry-run")
    assert tried.code == 0, tried.err
    assert not (tmp_path / "not").exists()
    for name in ("teacher", "student", "data", "batch", "relations", "loss", "time", "memory", "disk"):
        assert re.search(rf"^  {name} ", tried.out, re.MULTILINE), tried.out
    assert "micro-batch 4 x accumulation 2 x 1 rank(s) = 8 rows, 256 tokens a step" in tried.out
    assert "backend chunked" in tried.out

    run = [*words, "--run-dir", run_dir, "--set", "steps=2"]
    assert training.run(*run).code == 0
    assert loss_in(tried.out) == pytest.approx(curve(run_dir)[1], abs=1e-4)

    before = state_of(run_dir)
    again = training.run(*run[:-1], "steps=4", "--dry-run")
    assert f"{run_dir} would resume after step 2" in again.out
    assert state_of(run_dir) == before
    assert "would do nothing" in training.run(*run, "--dry-run").out
    assert state_of(run_dir) == before

    rejected = training.run(*run[:-1], "seed=7", "--dry-run")
    assert rejected.code == EXIT_USER
    assert "seed: 0 -> 7" in rejected.err


def test_a_directory_that_cannot_be_written_to(training: TrainingProcess, words: list[object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    rejected = training.run(*words, "--run-dir", tmp_path / "file" / "run", "--dry-run")
    assert rejected.code == EXIT_USER
    assert "--run-dir" in rejected.err


def test_steps_that_are_all_skipped_end_the_dry_run(words: list[object], tmp_path: Path) -> None:
    """Every step has a gradient that is not finite: the dry run ends with an error instead of trying indefinitely."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [*map(str, words), "--run-dir", str(run_dir), "--dry-run", "--set", "steps=3"]
    with ForkServer() as server:
        job = server.start(1, arguments, log, faults=[{"kind": "nan", "steps": list(range(10))}])
        assert job.wait(60) == EXIT_DIVERGED
    assert "3 steps in a row" in log.read_text()
    assert list(tmp_path.iterdir()) == [log]


def test_warnings_about_the_recipe_are_printed_once_before_step_1(
    training: TrainingProcess, words: list[object], tmp_path: Path
) -> None:
    settings = ["--set", "steps=1", "--set", "heldout_rows=5000", "--run-dir", tmp_path / "run"]
    for more in (["--dry-run"], []):
        said = training.run(*words, *settings, *more).out
        before_the_step = said.split("step 1 of 1")[0]
        assert before_the_step.count("warning: held out is at most a tenth of a language") == 1, said
        assert said.count("held out is at most a tenth") == 1
