"""Shared by all fault sweeps: a tiny teacher, shards and recipe, runs under the fork server, comparison of their ends.

Every attempt is a real `pipeline/train.py` (teacher 4 x 48, student 2 x 24, real text, fp32) on one or two gloo ranks. A
run under faults is restarted until it is done. Then its weights, both moments and every logged value must equal those of
an undisturbed run, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.runtime.checkpoint import CheckpointReader, newest_valid
from pipeline.runtime.checkpoint_files import KINDS
from tests.conftest import (
    make_tiny_shards,
    make_tiny_teacher,
    make_tiny_tokenizer,
    write_fp32_config,
    write_tiny_recipe,
)
from tests.dist.fork_server import ForkServer, Job
from tests.dist.runs import end_group, metrics

DEFAULTS = {"micro_batch_per_gpu": 2, "metrics.images": False, "guard.hang_timeout_s": 60}
ATTEMPT_TIMEOUT_S = 300.0
State = dict[tuple[str, str], torch.Tensor]


@dataclass
class Outcome:
    """One line of the table. `kept` of `trials` ended as promised."""

    promise: str
    trials: int
    kept: int
    measured: str
    stock: str = "not measured"
    figures: dict[str, Any] = field(default_factory=dict)

    def row(self, number: int) -> list[str]:
        return [str(number), self.promise, f"{self.kept} of {self.trials}", self.measured, self.stock]


class Lab:
    """Makes the inputs once, starts attempts, and keeps the undisturbed runs."""

    def __init__(self, directory: Path, server: ForkServer, recipe: Path | None = None):
        """`recipe`: an existing one, with its teacher and shards."""
        self.directory, self.server = directory, server
        self.recipe = recipe or self._make_inputs()
        self._untouched: dict[str, Path] = {}

    def _make_inputs(self) -> Path:
        tokenizer = make_tiny_tokenizer(self.directory / "tokenizer")
        (self.directory / "teacher").mkdir()
        teacher = make_tiny_teacher(self.directory / "teacher", tokenizer)
        shards = make_tiny_shards(self.directory / "shards", tokenizer)
        return write_tiny_recipe(self.directory / "tiny.yaml", teacher, shards)

    def arguments(self, stage: int, settings: Mapping[str, Any]) -> list[str]:
        config = self.directory / f"zero{stage}.json"
        if not config.exists():
            write_fp32_config(config, f"zero{stage}")
        words = ["--deepspeed", str(config), "--recipe", str(self.recipe)]
        for key, value in {**DEFAULTS, **settings}.items():
            words += ["--set", f"{key}={json.dumps(value)}"]
        return words

    def begin(
        self, run_dir: Path, ranks: int, settings: Mapping[str, Any], stage: int = 2, faults: Iterable[Any] = ()
    ) -> Job:
        """Start one attempt of a run."""
        words = [*self.arguments(stage, settings), "--run-dir", str(run_dir)]
        return self.server.start(ranks, words, run_dir.with_suffix(".log"), faults=faults)

    def run(
        self, run_dir: Path, ranks: int, settings: Mapping[str, Any], stage: int = 2, faults: Iterable[Any] = ()
    ) -> int:
        """One attempt to its end; its exit code."""
        job = self.begin(run_dir, ranks, settings, stage, faults)
        try:
            return job.wait(ATTEMPT_TIMEOUT_S)
        finally:
            end_group(job)

    def untouched(self, ranks: int, settings: Mapping[str, Any], stage: int = 2, faults: Iterable[Any] = ()) -> Path:
        """The finished run without interruptions. `faults`: those that belong to the run itself."""
        key = json.dumps([ranks, stage, dict(settings), list(faults)], sort_keys=True)
        if key not in self._untouched:
            run_dir = self.directory / f"untouched{len(self._untouched)}"
            code = self.run(run_dir, ranks, settings, stage, faults)
            assert code == 0, run_dir.with_suffix(".log").read_text()[-3000:]
            self._untouched[key] = run_dir
        return self._untouched[key]

    def fresh(self, name: str) -> Path:
        """A run directory that does not exist yet."""
        run_dir = self.directory / name
        shutil.rmtree(run_dir, ignore_errors=True)
        return run_dir


def state_of(checkpoint: Path, student: str = "") -> State:
    """Every weight and moment of one student in a checkpoint, for any number of ranks that wrote it."""
    reader = CheckpointReader(checkpoint, student)
    return {
        (kind, name): reader.read(kind, name, 0, int(torch.Size(shape).numel()))
        for kind in KINDS
        for name, shape in reader.state["parameters"].items()
    }


def newest(run_dir: Path) -> Path | None:
    """The newest valid checkpoint. In these sweeps a corrupt one under its final name is a broken promise."""
    checkpoint, problems = newest_valid(run_dir / "checkpoints")
    assert not problems, problems
    return checkpoint


def newest_step(run_dir: Path) -> int:
    checkpoint = newest(run_dir)
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def same_state(a: Path, b: Path) -> bool:
    one, two = state_of(a), state_of(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def same_end(run_dir: Path, other: Path) -> bool:
    """Weights, moments and every logged loss and norm equal, bit for bit."""
    return same_student(run_dir, other) and logged_values(run_dir) == logged_values(other)


def same_student(run_dir: Path, other: Path) -> bool:
    """Weights and moments equal, bit for bit, after the same number of steps."""
    ours, theirs = newest(run_dir), newest(other)
    return ours is not None and theirs is not None and ours.name == theirs.name and same_state(ours, theirs)


def logged_values(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times and speeds."""
    rows = [{k: v for k, v in row.items() if k != "time_s" and "speed/" not in k} for row in metrics(run_dir)]
    return [row for row in rows if len(row) > 2]


def steps_done(run_dir: Path) -> int:
    """The last step in metrics.jsonl. Only the end of the file is read: it may be long, and this is called often."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            return int(file.read().rsplit(b'{"step": ', 1)[1].split(b",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Poll until `condition` holds; False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
