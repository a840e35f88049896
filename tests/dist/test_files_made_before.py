"""Shards, checkpoints, exports and evaluations made before names changed (commit db9193f) are read, resumed and continued.

`tests/fixtures/made_before_renames.tar.xz` holds a tiny teacher, shards of two languages, a trimmed vocabulary, a run of four steps,
its export (without weights), its evaluation, and `expected.json`: the losses of that commit when it continued to step 8.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from data_prep.shards import ShardSet
from pipeline.runtime.checkpoint import read_model_weights
from tests.conftest import REPO, first_on_python_path
from tests.dist.runs import curve

ARCHIVE = REPO / "tests/fixtures/made_before_renames.tar.xz"


@pytest.fixture
def before(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "format_1"


def command(directory: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": first_on_python_path(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(before: Path, *extra: str) -> str:
    files = ["--deepspeed", "zero2_fp32.json", "--recipe", "recipe.yaml", "--run-dir", "run"]
    return command(before, str(REPO / "pipeline/train.py"), *files, *extra)


def test_a_finished_run_continues_with_the_losses_it_would_have_had(before: Path) -> None:
    log = train(before, "--set", "steps=8")
    assert "resumed from run/checkpoints/step-00000004" in log
    expected = json.loads((before / "expected.json").read_text())
    for tag, points in (("loss/total", expected["losses"]), ("heldout/mean", expected["heldout"])):
        assert curve(before / "run", tag) == pytest.approx({int(step): loss for step, loss in points.items()}, rel=1e-4)


def test_its_attempts_still_count(before: Path) -> None:
    """Six attempts in a row without a checkpoint are noticed, also in a file with the former name."""
    entries = json.loads((before / "run/lives.json").read_text())
    crashed = {**entries[0], "saved_steps": [], "ended": None}
    (before / "run/lives.json").write_text(json.dumps(entries + [crashed] * 6))
    with pytest.raises(AssertionError, match="the last 6 starts in run all ended without a new checkpoint"):
        train(before, "--set", "steps=8")


def test_it_is_exported_again_with_the_weights_it_had(before: Path) -> None:
    command(before, "-m", "pipeline", "export", "run", "--output", "again")
    config, earlier = (json.loads((before / name / "config.json").read_text()) for name in ("again", "student"))
    assert config == {**earlier, "transformers_version": transformers.__version__}
    _, state = read_model_weights(before / "run")
    assert state["step"] == 4
    exported = load_file(before / "again/model.safetensors")
    checkpoint = before / "run/checkpoints/step-00000004"
    stored = load_file(checkpoint / "weight-00000-of-00001.safetensors")
    assert len(stored) > 20
    for key, fragment in stored.items():
        name, start = key.rsplit(":", 1)
        assert torch.equal(exported[name].flatten()[int(start) : int(start) + len(fragment)], fragment), key
    for name, tensor in load_file(checkpoint / "carried.safetensors").items():
        assert torch.equal(exported[name], tensor), name


def test_report_and_card_read_it(before: Path) -> None:
    command(before, "-m", "pipeline", "report", "run", "--output", "page.html")
    losses = json.loads((before / "expected.json").read_text())["heldout"]
    assert f"{losses['0']:.3f} → {losses['4']:.3f}" in (before / "page.html").read_text()
    command(before, "-m", "pipeline", "export", "run", "--output", "again")
    command(before, "-m", "pipeline", "card", "again", "run", "evaluation")
    card = (before / "again/README.md").read_text()
    evaluated = json.loads((before / "evaluation/evaluation.json").read_text())["tasks"]["retrieval"]["student"]["mean"]
    assert "| student, output |" in card
    assert f"{evaluated['output']:.3f} |" in card


def test_shards_and_trimmed_vocabulary_are_read(before: Path) -> None:
    shards = ShardSet(before / "shards")
    assert shards.languages == ["sw", "tr"]
    assert shards.rows("tr", np.arange(2), 32).shape == (2, 32)
    command(before, "-m", "data_prep", "verify", "shards")
    command(before, "-m", "data_prep", "stats", "shards")
    text = REPO / "samples/cc100/tr.txt.xz"
    command(
        before, "-m", "data_prep", "prepare", "--input", str(text), "--tokenizer", "vocabulary", "--output", "small"
    )
    settings = ("vocabulary=vocabulary", "data=small", "steps=2")
    log = train(before, "--run-dir", "trimmed", *(word for setting in settings for word in ("--set", setting)))
    assert "done: 2 steps" in log
