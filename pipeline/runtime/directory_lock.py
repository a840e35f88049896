"""Rank 0 owns what all ranks write to: the run directory, or one task's directory of an evaluation.

In: a directory. Out: nothing, or on every rank the same `UserError` with who owns it. The lock itself: data_prep/ownership.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.outputs import check_output_place
from data_prep.ownership import owned_directory
from data_prep.shards import DataError
from pipeline.errors import UserError
from pipeline.runtime import dist
from pipeline.runtime.dist import Launch


def check_run_directory(run_dir: Path, files: Mapping[str, Path], reads: Mapping[str, Path]) -> None:
    """A new run may not begin where the user works, nor over what it reads. `files`: what a run writes under those names;
    `reads`: directories."""
    if (run_dir / "run.json").exists() or (run_dir / "checkpoints").is_dir():
        return  # it has begun there before
    check_output_place(run_dir, "--run-dir", {name: path for name, path in reads.items() if path.is_dir()})
    for name, path in files.items():
        if path.resolve() == (run_dir / name).resolve():
            raise UserError(
                f"--run-dir {run_dir}: the run would write its own {name} over {path}. Take another --run-dir"
            )


@contextlib.contextmanager
def owned_by_rank_0(run_dir: Path, launch: Launch) -> Iterator[None]:
    """Hold `run_dir` against a second run. Called by all ranks, once they have met and before any of them writes."""
    with contextlib.ExitStack() as held:
        problem = None
        if launch.is_main:
            try:
                held.enter_context(owned_directory(run_dir, f"the run directory {run_dir}"))
            except DataError as error:
                problem = f"{error} Or take another --run-dir"
            except OSError as error:
                problem = f"the run directory {run_dir} cannot be written to ({error}); take another --run-dir"
        if problem := dist.broadcast_json(problem, launch.device):
            raise UserError(problem)
        yield
