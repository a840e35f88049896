"""What a command may write to, and what it replaces there: never a directory that is somebody else's.

In: the path behind `--output` or `--run-dir` and what the command reads. Out: a `DataError`, or a new directory put in
the place of an earlier one, with whatever the user has added to that.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.durable_files import leftovers, unique_name
from data_prep.ownership import lock_beside, own
from data_prep.shards import DataError


def output_path(text: str) -> Path:
    """The type of an option that names an output: an empty one, as an unset shell variable gives, is no directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (an unset variable of the shell?). Name a directory")
    return Path(text)


def check_output_place(output: Path, option: str, inputs: Mapping[str, Path]) -> None:
    """`inputs`: what is read, by what it is called. None of them, nor a directory above one, may be written over."""
    real, here, home = output.resolve(), Path.cwd().resolve(), Path.home().resolve()
    places = {"the working directory": here, "the home directory": home}
    places |= {f"{name} {path}": path.resolve() for name, path in inputs.items()}
    for name, place in places.items():
        if place.is_relative_to(real):
            what = "is" if place == real else "holds"
            raise DataError(f"{option} {output} {what} {name}, which is left alone. Name another directory.")


@contextlib.contextmanager
def replaced_directory(output: Path, products: Sequence[str]) -> Iterator[Path]:
    """A new directory to be filled, which takes the place of `output` when the block ends without an error.

    `products`: patterns of the names that an earlier output of this kind holds. They go with it; anything else in it
    was put there by the user, and stays. One process at a time.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    new, old = unique_name(output, ".tmp"), unique_name(output, ".old")
    with own(lock_beside(output), f"the output {output}"):
        for leftover in leftovers(output, ".tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        before = leftovers(output, ".old")
        if before and not output.exists():  # killed between two renames
            before.pop().rename(output)
        for leftover in before:
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            if output.exists():
                output.rename(old)
            new.rename(output)
            _keep_what_is_not_ours(old, output, products)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _keep_what_is_not_ours(old: Path, output: Path, products: Sequence[str]) -> None:
    for path in old.iterdir() if old.is_dir() else ():
        is_ours = any(fnmatch.fnmatchcase(path.name, product) for product in products)
        if not is_ours and not (output / path.name).exists():
            path.rename(output / path.name)
