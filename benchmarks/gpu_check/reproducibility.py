"""The same run twice, and resumed: are the checkpoints equal in every bit?

Each case is three runs of pipeline/train.py on the XLM-R-large recipe: one, the same again, and a copy of the first without
its last checkpoint, which resumes from the middle. Compared are the SHA-256 of weights and moments in every common checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.figures import Figures, Row
from benchmarks.gpu_check.processes import Ended, Process, last_lines
from benchmarks.gpu_check.setting import RECIPE, Setting, words_of
from benchmarks.gpu_check.timing import on_gpu
from pipeline.runtime.checkpoint_files import KINDS, MANIFEST, checkpoint_path, committed_steps
from pipeline.runtime.json_files import read_json, read_points
from pipeline.runtime.run_paths import RunPaths

TABLE = "Equal in every bit"
RUN_LIMIT_S = 90
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
    """On a GPU several small runs share the device; on a CPU one runs after the other."""
    cases = TINY_CASES if setting.is_tiny else CASES
    for group in [cases[:3], cases[3:]] if on_gpu() else [[case] for case in cases]:
        runs = {case: [_Run(setting, case, copy) for copy in ("first", "again")] for case in group}
        for case, (first, again) in runs.items():
            names = {"ZeRO": case.stage, "asked": case.precision, "deterministic": case.deterministic}
            figures.attempt(
                TABLE, names, lambda case=case, first=first, again=again: _compare(setting, case, first, again)
            )


def _compare(setting: Setting, case: Case, first: _Run, again: _Run) -> Row:
    first.finish()
    again.finish()
    resumed = _Run(setting, case, "resumed", copy_of=first)
    resumed.finish()
    row: Row = {"checkpoints": len(first.hashes())}
    for name, other in (("twice the same", again), ("resumed the same", resumed)):
        row[name] = first.hashes() == other.hashes()
        row[f"{name}: greatest difference of a loss"] = first.difference(other)
    return row


class _Run:
    """A small training run, started when it is made."""

    def __init__(self, setting: Setting, case: Case, copy: str, copy_of: _Run | None = None) -> None:
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
            # Without a choice by measured times: it could differ, and with it the last bits.
            "relations.backend": "flash" if on_gpu() else "chunked",
        }
        command = [sys.executable, "pipeline/train.py", "--deepspeed", str(setting.ds_json(case.stage, case.precision))]
        command += ["--recipe", str(RECIPE), "--run-dir", str(self.paths.directory)]
        self._process = Process([*command, *words_of(setting.overrides(changes))], self._log, {"OMP_NUM_THREADS": "2"})

    def _begin_in_the_middle(self, other: _Run) -> None:
        """A copy of a finished run as it was after its first checkpoint."""
        shutil.copytree(other.paths.directory, self.paths.directory)
        *_, last = committed_steps(self.paths.checkpoints)
        shutil.rmtree(checkpoint_path(self.paths.checkpoints, last))
        self.paths.done.unlink()

    def finish(self) -> Ended:
        ended = self._process.wait(self._limit_s)
        if ended.code != 0:
            raise RuntimeError(f"pipeline/train.py ended with {ended.code}: {last_lines(self._log, 4)}")
        return ended

    def hashes(self) -> dict[str, dict[str, str]]:
        """Checkpoint -> file of weights or moments -> its SHA-256."""
        paths = [checkpoint_path(self.paths.checkpoints, step) for step in committed_steps(self.paths.checkpoints)]
        return {path.name: _tensor_hashes(path) for path in paths}

    def difference(self, other: _Run) -> float:
        """Greatest difference of the loss of one step."""
        mine, others = (
            {point["step"]: point[LOSS] for point in read_points(run.paths.metrics) if LOSS in point}
            for run in (self, other)
        )
        return max(abs(mine[step] - others[step]) for step in mine.keys() & others.keys())


def _tensor_hashes(checkpoint: Path) -> dict[str, str]:
    files = read_json(checkpoint / MANIFEST)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith(KINDS)}
