"""Rank 0 locks the directory that all ranks write to: the run directory, or one task's directory of an evaluation.

In: a directory. Out: nothing, or on every rank the same `UserError`, which names the owner. Lock file: data_prep/ownership.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.command_line import paragraph_of
from data_prep.outputs import check_output_place
from data_prep.ownership import owned_directory
from data_prep.shards import DataError
from pipeline.errors import UserError
from pipeline.runtime.dist import Launch


def check_run_directory(run_dir: Path, files: Mapping[str, Path], reads: Mapping[str, Path]) -> None:
    """Check that a new run does not begin in a working directory of the user, nor overwrites what it reads.

    Args:
        files: paths that the run reads, by the name under which it writes a file of its own into `run_dir`
        reads: directories that the run reads, by their name in the recipe
    Raises:
        UserError: names the file or directory
    """
    if (run_dir / "run.json").exists() or (run_dir / "checkpoints").is_dir():
        return  # the run already began there
    check_output_place(run_dir, "--run-dir", {name: path for name, path in reads.items() if path.is_dir()})
    for name, path in files.items():
        if path.resolve() == (run_dir / name).resolve():
            raise UserError(
                f"--run-dir {run_dir}: the run would write its own {name} over {path}. Use another --run-dir"
            )


@contextlib.contextmanager
def owned_by_rank_0(run_dir: Path, launch: Launch) -> Iterator[None]:
    """Lock `run_dir` against a second run. All ranks call it after they have met and before any of them writes."""
    with contextlib.ExitStack() as held:
        problem = None
        if launch.is_main:
            try:
                held.enter_context(owned_directory(run_dir, f"the run directory {run_dir}"))
            except DataError as error:
                problem = f"{error} Or use another --run-dir"
            except OSError as error:
                problem = f"the run directory {run_dir} cannot be written to ({error}); use another --run-dir"
            except (MemoryError, RecursionError) as error:
                problem = paragraph_of(error)
        if problem := launch.from_main(problem):
            raise UserError(problem)
        yield
