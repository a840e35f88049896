"""Checking and replacing output directories, without loss of files of the user.

In: the value of `--output` or `--run-dir`, and the inputs of the command. Out: a `DataError`, or a new directory in the place of
the earlier output, with the files that the user added to it.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.durable_files import leftovers, unique_name
from data_prep.ownership import own, sibling_lock
from data_prep.shards import DataError


def output_path(text: str) -> Path:
    """The `type` of an option that names an output. Rejects an empty name, as an unset shell variable gives it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (an unset variable of the shell?). Name a directory")
    return Path(text)


def check_output_place(output: Path, option: str, inputs: Mapping[str, Path]) -> None:
    """Check that an output overwrites neither an input, nor the working directory, nor the home directory, nor a parent of one.

    Args:
        output: the path to be written.
        option: the option that named it, for the message.
        inputs: the paths that the command reads, by description.

    Raises:
        DataError
    """
    real, here, home = output.resolve(), Path.cwd().resolve(), Path.home().resolve()
    places = {"the working directory": here, "the home directory": home}
    places |= {f"{name} {path}": path.resolve() for name, path in inputs.items()}
    for name, place in places.items():
        if place.is_relative_to(real):
            what = "is" if place == real else "holds"
            raise DataError(f"{option} {output} {what} {name}, which must not be overwritten. Name another directory.")


@contextlib.contextmanager
def replaced_directory(output: Path, products: Sequence[str]) -> Iterator[Path]:
    """A new directory, which replaces `output` when the block ends without an error. One process at a time.

    Args:
        output: the directory to be replaced or created.
        products: patterns of the names that an output of this kind holds. Other files in an earlier output were added by the
            user and are kept.

    Raises:
        InUseError: another process is replacing it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    new, old = unique_name(output, ".tmp"), unique_name(output, ".old")
    with own(sibling_lock(output), f"the output {output}"):
        for leftover in leftovers(output, ".tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        before = leftovers(output, ".old")
        if before and not output.exists():  # a process was killed between the two renames
            before.pop().rename(output)
        for leftover in before:
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            if output.exists():
                output.rename(old)
            new.rename(output)
            _keep_files_of_the_user(old, output, products)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _keep_files_of_the_user(old: Path, output: Path, products: Sequence[str]) -> None:
    for path in old.iterdir() if old.is_dir() else ():
        is_product = any(fnmatch.fnmatchcase(path.name, product) for product in products)
        if not is_product and not (output / path.name).exists():
            path.rename(output / path.name)
