"""Runs with compiled layers: the losses of a run without, at every ZeRO stage; a resumed one is the uninterrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.dist.runs import curve, train
from tests.dist.test_checkpoint import equal
from tests.dist.training_process import TrainingProcess

COMPILED = ("student.compile=true", "teacher_options.compile=true")
STEPS = 3


def config_of(stage: int, fp32_config: Path, directory: Path) -> Path:
    config = json.loads(fp32_config.read_text())
    config["zero_optimization"] = {"stage": stage, "overlap_comm": False}
    if stage == 3:  # partition every parameter of these tiny models
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = directory / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return path


def run(training: TrainingProcess, recipe: Path, ds: Path, run_dir: Path, *sets: str) -> str:
    """A run to its end; what it printed."""
    keys = (f"steps={STEPS}", "eval_every=2", "save_every=2", "metrics.log_every=1", *sets)
    pairs = [word for key in keys for word in ("--set", key)]
    ended = training.run("--deepspeed", ds, "--recipe", recipe, "--run-dir", run_dir, *pairs)
    assert ended.code == 0, ended.err
    assert "compiled again" not in ended.err + ended.out
    return ended.out


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_losses(
    stage: int, training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    ds = config_of(stage, fp32_config, tmp_path)
    for name, sets in (("written", ()), ("compiled", COMPILED)):
        run(training, tiny_recipe, ds, tmp_path / name, *sets)
    written, compiled = (curve(tmp_path / name) for name in ("written", "compiled"))
    assert compiled == pytest.approx(written, rel=1e-5)
    assert len(compiled) == STEPS
    heldout = [curve(tmp_path / name, "heldout/mean") for name in ("written", "compiled")]
    assert heldout[0][0] == heldout[1][0], "held-out text is evaluated by layers as written"


@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_is_uninterrupted_bit_for_bit(
    stage: int, training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    """With dropout, recomputed activations, and documents kept apart."""
    ds = config_of(stage, fp32_config, tmp_path)
    sets = (*COMPILED, "student.dropout=0.1", "student.checkpointing=true", "documents=separate")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(training, tiny_recipe, ds, straight, *sets)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    (resumed / "DONE").unlink()
    assert "resumed from" in run(training, tiny_recipe, ds, resumed, *sets)
    assert equal(*(path / "checkpoints" / f"step-{STEPS:08d}" for path in (straight, resumed)))


def test_compilation_may_change_within_a_run(
    training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    """It changes last bits, so a resume warns. Otherwise a run whose compiler fails could not be continued."""
    ds = config_of(2, fp32_config, tmp_path)
    run(training, tiny_recipe, ds, tmp_path / "run", *COMPILED)
    said = run(training, tiny_recipe, ds, tmp_path / "run", "student.compile=false", f"steps={STEPS + 1}")
    (warning,) = [line for line in said.splitlines() if "layers are not compiled as before" in line]
    assert "teacher_options.compile: True -> False; student.compile: True -> False" in warning
    assert said.count("resumed from") == 1


def test_two_ranks_and_a_partitioned_teacher(tiny_recipe: Path, fp32_config: Path, tmp_path: Path) -> None:
    ds = config_of(3, fp32_config, tmp_path)
    losses = {}
    for name, sets in (("written", ()), ("compiled", COMPILED)):
        keys = (f"steps={STEPS}", "eval_every=100", "metrics.log_every=1", "teacher_options.placement=zero3", *sets)
        words = ["--deepspeed", str(ds), "--recipe", str(tiny_recipe), *(w for key in keys for w in ("--set", key))]
        text = train("torchrun", 2, tmp_path / name, words)
        assert "compiled again" not in text
        losses[name] = curve(tmp_path / name)
    assert losses["compiled"] == pytest.approx(losses["written"], rel=1e-5)
