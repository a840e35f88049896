"""Shell commands and options in errors about a run's environment and checkpoints: each is pasted, and the error is gone."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.__main__ import main
from pipeline.config import load_recipe
from pipeline.errors import UserError
from pipeline.export.command import add_arguments
from pipeline.report.command import add_arguments as add_report_arguments
from pipeline.report.command import run as run_report
from pipeline.runtime.allotment import check_allotted_gpus
from pipeline.runtime.checkpoint import read_model_weights
from pipeline.runtime.checkpoint_files import commit, fsync_and_hash
from pipeline.runtime.clocks import job_end_s
from pipeline.runtime.determinism import WORKSPACE, fix_workspace
from pipeline.runtime.dist import read_launch
from pipeline.runtime.preflight import problem_on_disk
from tests.unit.made_up_run import make_family, make_run
from tests.unit.printed import paste, settings_in
from tests.unit.runtime.test_family_checkpoint import write


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


def paste_environment(message: str, environment: pytest.MonkeyPatch) -> list[str]:
    """Do what `unset NAME ...` and `export NAME=VALUE` of a message do. Returns the names."""
    unset = [name for names in re.findall(r"\bunset ([A-Z_ ]+)", message) for name in names.split()]
    exported = dict(re.findall(r"\bexport ([A-Z_]+)=(\w+)", message))
    for name in unset:
        environment.delenv(name, raising=False)
    for name, value in exported.items():
        environment.setenv(name, value)
    return [*unset, *exported]


@pytest.mark.parametrize("variables", [{"RANK": "3", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}], ids=str)
def test_variables_of_a_launcher_that_is_not_there(variables: dict[str, str], no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_PORT": "29500", **variables}.items():
        no_launcher.setenv(name, value)
    assert paste_environment(error_of(read_launch), no_launcher)
    assert read_launch().world_size == 1


def test_the_end_of_a_job_that_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "tomorrow")
    assert paste_environment(error_of(job_end_s), monkeypatch)
    assert job_end_s() == float("inf")


def test_a_workspace_that_is_not_reproducible(monkeypatch: pytest.MonkeyPatch, tiny_recipe: Path) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    message = error_of(fix_workspace)
    assert paste_environment(message, monkeypatch)
    fix_workspace()
    assert not load_recipe(tiny_recipe, settings_in(message)).deterministic, "with this no workspace is required"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPU")
def test_gpus_that_slurm_has_allotted_and_torch_does_not_see(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("SLURM_JOB_ID", "1")
    no_launcher.setenv("SLURM_GPUS_ON_NODE", "2")
    assert "ALLOW_CPU_RANKS" in paste_environment(error_of(check_allotted_gpus), no_launcher)
    check_allotted_gpus()


def test_a_lock_of_a_killed_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "my cache" / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "my cache"))
    assert problem_on_disk(tmp_path / "run", 1, 1, 0, 0) is None
    paste(capsys.readouterr().out.partition("hangs: ")[2])
    assert problem_on_disk(tmp_path / "run", 1, 1, 0, 0) is None
    assert "a lock" not in capsys.readouterr().out


def step_of(message: str) -> object:
    """The value of `--step` in a message, as `pipeline export` parses it."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = re.findall(r"--step \w+", message)[0].split()
    return parser.parse_args(["run", "--output", "student", *words]).step


def test_the_best_step_of_a_run_without_evaluations(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 4)
    message = error_of(lambda: read_model_weights(tmp_path, "small", "best"))
    read_model_weights(tmp_path, "small", step_of(message))


def test_a_step_that_was_not_kept(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path / "checkpoints", step)
    message = error_of(lambda: read_model_weights(tmp_path, "small", 3))
    numbers = [int(number) for number in re.findall(r"\d+", re.findall(r"it has the steps ([\d, ]+)\.", message)[0])]
    assert numbers == [2, 4]
    for number in numbers:
        read_model_weights(tmp_path, "small", number)
    (key, value) = re.findall(r"train with (checkpoint\.keep_best): (\w+)", message)[0]
    assert (key, value) == ("checkpoint.keep_best", "heldout")


def test_newest_checkpoints_that_are_not_finite(tmp_path: Path) -> None:
    run_dir = tmp_path / "my run"
    for step in (2, 4, 6):
        committed = write(run_dir / "checkpoints", step)
        if step > 2:
            spoil(committed)
    message = error_of(lambda: read_model_weights(run_dir, "small"))
    (command,) = re.findall(r"to export it: (mv .*) and the same command again", message)
    paste(command)
    assert read_model_weights(run_dir, "small")[1]["step"] == 2


def spoil(committed: Path) -> None:
    """Make the weights of `small` NaN, with a manifest that matches."""
    partial = committed.rename(committed.with_name(f"{committed.name}.tmp"))
    (partial / "manifest.json").unlink()
    (file,) = (partial / "small").glob("weight-*.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    paths = [path for path in partial.rglob("*") if path.is_file()]
    commit(partial, committed, {path.relative_to(partial).as_posix(): fsync_and_hash(path) for path in paths})


def report(*words: object) -> None:
    parser = argparse.ArgumentParser()
    add_report_arguments(parser)
    run_report(parser.parse_args(list(map(str, words))))


def test_a_student_that_the_run_does_not_have(tmp_path: Path) -> None:
    family = make_family(tmp_path / "my family")
    message = error_of(lambda: report(family, "--student", "nobody"))
    report(family, *re.findall(r"Add (--student) (\w+)", message)[0])
    alone = make_run(tmp_path / "alone")
    assert error_of(lambda: report(alone, "--student", "nobody")).endswith("Leave --student out")
    report(alone)


def test_a_report_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_family(tmp_path / name) for name in ("my run", "other")]
    command = error_of(lambda: report(*runs)).partition("compares several: ")[2]
    words = shlex.split(command)
    main(words[words.index("pipeline") + 1 :])
    assert "written: " in capsys.readouterr().out
