"""What errors of a resumed run tell the user to add is added to the same command, and the run resumes."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import EXIT_USER
from tests.dist.training_process import Ended, TrainingProcess


def test_changes_of_a_run_that_has_begun(
    training: TrainingProcess, tiny_recipe: Path, fp32_config: Path, tmp_path: Path
) -> None:
    """Another recipe, and a student that the recipe no longer has: each message names the option that continues."""
    words = ["--deepspeed", fp32_config, "--recipe", tiny_recipe, "--run-dir", tmp_path / "my run"]

    def train(*sets: str, more: tuple[str, ...] = ()) -> Ended:
        settings = ("eval_every=100", "metrics.images=false", *sets)
        return training.run(*words, *(word for setting in settings for word in ("--set", setting)), *more)

    both = "students={one: {}, two: {student: {layers: 1}}}"
    assert train("steps=1", both).code == 0
    for sets in (("steps=2", both, "alpha=0.9"), ("steps=3", "students={one: {}}", "alpha=0.9")):
        ended = train(*sets)
        assert ended.code == EXIT_USER
        (option,) = re.findall(r"or add (--[\w-]+) to continue", ended.err)
        ended = train(*sets, more=(option,))
        assert ended.code == 0, ended.err
        assert "resumed from" in ended.out
