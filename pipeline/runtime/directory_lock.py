"""Rank 0 locks the directory that all ranks write to: the run directory, or one task's directory of an evaluation.

In: a directory. Out: nothing, or on every rank the same `UserError`, which names the owner. Lock file: data_prep/ownership.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from data_prep.command_line import paragraph_of
from data_prep.outputs import check_output_place
from data_prep.ownership import owned_directory
from data_prep.shards import DataError
from pipeline.errors import UserError
from pipeline.runtime.dist import Launch
from pipeline.runtime.run_paths import RunPaths


def check_run_directory(run_dir: Path, files: Mapping[str, Path], reads: Mapping[str, Path]) -> None:
    """Check that a new run does not begin in a working directory of the user, nor overwrites what it reads.

    Args:
        files: paths that the run reads, by the name under which it writes a file of its own into `run_dir`
        reads: directories that the run reads, by their name in the recipe
    Raises:
        UserError: names the file or directory
    """
    paths = RunPaths(run_dir)
    if paths.description.exists() or paths.checkpoints.is_dir():
        return  # the run already began there
    check_output_place(run_dir, "--run-dir", {name: path for name, path in reads.items() if path.is_dir()})
    for name, path in files.items():
        if path.resolve() == (run_dir / name).resolve():
            raise UserError(
                f"--run-dir {run_dir}: the run would write its own {name} over {path}. Use another --run-dir"
            )


def owned_by_rank_0(run_dir: Path, launch: Launch) -> AbstractContextManager[None]:
    """Lock `run_dir` against a second run. All ranks call it after they have met and before any of them writes."""
    place = f"the run directory {run_dir}"
    return locked_by_rank_0(
        lambda held: held.enter_context(owned_directory(run_dir, place)), place, "--run-dir", launch
    )


@contextlib.contextmanager
def locked_by_rank_0(
    lock: Callable[[contextlib.ExitStack], object], place: str, option: str, launch: Launch
) -> Iterator[None]:
    """Run `lock` on rank 0, which enters its locks into the given stack. They are released at the end.

    Args:
        place, option: what is locked, and the option that names another place, for messages
    Raises:
        UserError: on every rank, with the owner or the reason
    """
    with contextlib.ExitStack() as held:
        problem = None
        if launch.is_main:
            try:
                lock(held)
            except DataError as error:
                problem = f"{error} Or use another {option}"
            except OSError as error:
                problem = f"{place} cannot be written to ({error}); use another {option}"
            except (MemoryError, RecursionError) as error:
                problem = paragraph_of(error)
        if problem := launch.from_main(problem):
            raise UserError(problem)
        yield
