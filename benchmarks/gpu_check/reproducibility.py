"""The same run twice, and resumed: are the checkpoints equal in every bit?

Each case is three runs of pipeline/train.py on the XLM-R-large recipe: one, the same again, and a copy of the first without
its last checkpoint, which resumes from the middle. Compared are the SHA-256 of weights and moments in every common checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_check.figures import Figures, Row
from benchmarks.gpu_check.processes import Ended, Process, reason_in
from benchmarks.gpu_check.relation_backends import chosen_backend
from benchmarks.gpu_check.setting import RECIPE, Setting, words_of
from benchmarks.gpu_check.timing import on_gpu
from pipeline.runtime.checkpoint_files import KINDS, MANIFEST, checkpoint_path, committed_steps
from pipeline.runtime.host_memory import available_memory_bytes
from pipeline.runtime.json_files import read_json, read_points
from pipeline.runtime.run_paths import RunPaths

TABLE = "Equal in every bit"
RUN_LIMIT_S = 90
RUN_GPU_BYTES, RUN_HOST_BYTES = 8 * 2**30, 8 * 2**30  # of one run, with a margin
MOST_AT_ONCE = 3
LOSS = "loss/total"


@dataclass(frozen=True)
class Case:
    """One kind of run. It should be reproducible where `deterministic`."""

    stage: int
    precision: str
    deterministic: bool

    @property
    def name(self) -> str:
        return f"zero{self.stage}-{self.precision}-{'deterministic' if self.deterministic else 'any-order'}"


CASES = (
    *(Case(stage, "fp16", True) for stage in (2, 1, 3)),
    Case(2, "bf16", True),
    Case(2, "fp16", False),
    Case(3, "bf16", True),
)
TINY_CASES = (Case(2, "bf16", True),)


def measure(setting: Setting, figures: Figures) -> None:
    """Several small runs share a GPU, as many as its memory and the host's allow."""
    cases = TINY_CASES if setting.is_tiny else CASES
    backend = chosen_backend(setting)  # once: a choice by measured times could differ, and with it the last bits
    at_once = _cases_at_once()
    for group in (cases[start : start + at_once] for start in range(0, len(cases), at_once)):
        twice = {case: [Run(setting, case, copy, backend) for copy in ("first", "again")] for case in group}
        resumed = {case: _resumed(setting, case, runs[0]) for case, runs in twice.items()}
        for case, runs in twice.items():
            names = {"ZeRO": case.stage, "asked": case.precision, "deterministic": case.deterministic}
            figures.attempt(TABLE, names, partial(_compare, runs[0], runs[1], resumed[case]))


def _cases_at_once() -> int:
    """Each case is two runs at a time."""
    if not on_gpu():
        return 1
    free = min(torch.cuda.mem_get_info()[0] / RUN_GPU_BYTES, available_memory_bytes() / RUN_HOST_BYTES)
    return max(1, min(MOST_AT_ONCE, int(free / 2)))


def _resumed(setting: Setting, case: Case, first: Run) -> Run | None:
    """The run that resumes from the middle of `first`; None where that failed, which `_compare` reports."""
    try:
        first.finish()
    except RuntimeError:
        return None
    return Run(setting, case, "resumed", first.backend, copy_of=first)


def _compare(first: Run, again: Run, resumed: Run | None) -> Row:
    first.finish()
    row: Row = {"backend": first.backend, "checkpoints": len(first.hashes())}
    for name, other in (("twice", again), ("resumed", resumed)):
        assert other is not None
        other.finish()
        row[f"{name}: the same"] = first.hashes() == other.hashes()
        row[f"{name}: greatest difference of a loss"] = first.difference(other)
    return row


class Run:
    """A small training run, started when it is made."""

    def __init__(self, setting: Setting, case: Case, copy: str, backend: str, copy_of: Run | None = None) -> None:
        self.backend = backend
        self._ended: Ended | None = None
        self.paths = RunPaths(setting.work / "runs" / f"{case.name}-{copy}")
        self._log = setting.log(f"run-{case.name}-{copy}")
        self._limit_s = RUN_LIMIT_S * setting.scale.patience
        if copy_of is not None:
            self._begin_in_the_middle(copy_of)
        steps = setting.scale.run_steps
        changes = {
            "steps": steps,
            "save_every": steps // 2,
            "global_batch": setting.scale.rows // 2,
            "micro_batch_per_gpu": setting.scale.rows // 2,
            "student.dropout": 0.1,
            "metrics.log_every": 1,
            "metrics.images": "false",
            "deterministic": str(case.deterministic).lower(),
            "relations.backend": backend,
        }
        command = [sys.executable, "pipeline/train.py", "--deepspeed", str(setting.ds_json(case.stage, case.precision))]
        command += ["--recipe", str(RECIPE), "--run-dir", str(self.paths.directory)]
        self._process = Process([*command, *words_of(setting.overrides(changes))], self._log, {"OMP_NUM_THREADS": "2"})

    def _begin_in_the_middle(self, other: Run) -> None:
        """A copy of a finished run as it was after its first checkpoint."""
        shutil.copytree(other.paths.directory, self.paths.directory)
        *_, last = committed_steps(self.paths.checkpoints)
        shutil.rmtree(checkpoint_path(self.paths.checkpoints, last))
        self.paths.done.unlink()

    def finish(self) -> None:
        """Wait for its end. Raises `RuntimeError` where it failed."""
        if self._ended is None:
            self._ended = self._process.wait(self._limit_s)
        if self._ended.code != 0:
            raise RuntimeError(f"pipeline/train.py ended with {self._ended.code}: {reason_in(self._log)}")

    def hashes(self) -> dict[str, dict[str, str]]:
        """Checkpoint -> file of weights or moments -> its SHA-256."""
        paths = [checkpoint_path(self.paths.checkpoints, step) for step in committed_steps(self.paths.checkpoints)]
        return {path.name: tensor_hashes(path) for path in paths}

    def difference(self, other: Run) -> float:
        """Greatest difference of the loss of one step."""
        mine, others = (
            {point["step"]: point[LOSS] for point in read_points(run.paths.metrics) if LOSS in point}
            for run in (self, other)
        )
        return max(abs(mine[step] - others[step]) for step in mine.keys() & others.keys())


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """File of weights or moments -> its SHA-256."""
    files = read_json(checkpoint / MANIFEST)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith(KINDS)}
