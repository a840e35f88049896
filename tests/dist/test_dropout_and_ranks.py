"""Another number of ranks or micro-batch changes the order of sums, and with dropout also the masks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.dist.runs import curve
from tests.dist.training_process import TrainingProcess

STEPS = 3


def losses(training: TrainingProcess, words: list[object], run_dir: Path, *sets: str) -> list[float]:
    pairs = [
        word for key in (f"steps={STEPS}", "eval_every=100", "metrics.log_every=1", *sets) for word in ("--set", key)
    ]
    ended = training.run(*words, "--run-dir", run_dir, *pairs)
    assert ended.code == 0, ended.err
    return list(curve(run_dir).values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_micro_batch_changes_masks_and_nothing_else(
    dropout: float, training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    """The first loss of a run depends only on rows, initial weights and masks."""
    words: list[object] = ["--deepspeed", fp32_config, "--recipe", tiny_recipe]
    first, again, cut = (
        losses(training, words, tmp_path / name, f"student.dropout={dropout}", *sets)
        for name, sets in (("first", ()), ("again", ()), ("cut", ("micro_batch_per_gpu=2",)))
    )
    assert first == again, "the same ranks and micro-batch draw the same masks"
    differ = max(abs(one - other) for one, other in zip(first, cut, strict=True))
    assert (differ > 1e-3) == (dropout > 0), differ
    resumed = shutil.copytree(tmp_path / "first", tmp_path / "resumed")
    pairs = ["--set", f"student.dropout={dropout}", "--set", "micro_batch_per_gpu=2", "--set", f"steps={STEPS + 1}"]
    ended = training.run(*words, "--run-dir", resumed, *pairs, "--set", "eval_every=100")
    assert ended.code == 0, ended.err
    said = ended.out.count("draw other dropout masks (dropout is 0.1)")
    assert said == (1 if dropout else 0)
