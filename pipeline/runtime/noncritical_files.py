"""Files that a run can do without (logs, metrics, run.json, restarts.json, TensorBoard): none of them may end a run.

In: the path of a file that is not what it should be. Out: it is renamed `NAME.corrupt-N`, a warning says so, and the caller
writes the file again. Where even that fails, the run continues without the file.
"""

from __future__ import annotations

import itertools
import json
import stat
from pathlib import Path
from typing import Any, Literal, TextIO

from data_prep.durable_files import replace_file
from data_prep.shards import DataError, read_again

LARGEST_JSON_BYTES = 64 << 20  # run.json and restarts.json of the longest runs have a few hundred kilobytes


def set_aside(path: Path, why: object) -> None:
    """Rename a file or directory that is in the way, and warn. One that cannot be renamed stays.

    A device stays too: renamed, it would be missing for every program of the machine.
    """
    if path.is_char_device() or path.is_block_device():
        print(f"warning: {path} is unusable ({_short(why)}); a device is not renamed", flush=True)
        return
    names = (path.with_name(f"{path.name}.corrupt-{number}") for number in itertools.count(1))
    try:
        aside = next(name for name in names if not name.exists() and not name.is_symlink())
        path.rename(aside)
    except OSError as error:
        print(f"warning: {path} is unusable ({_short(why)}) and could not be renamed: {error}", flush=True)
        return
    print(f"warning: {path} is unusable ({_short(why)}); kept as {aside.name} and written again", flush=True)


def make_way_for_file(path: Path) -> None:
    """Rename a directory, FIFO, socket or dangling link at the path of a file that will be written. A device stays."""
    try:
        mode = path.stat().st_mode
    except OSError:
        if path.is_symlink():
            set_aside(path, "a dangling link")
        return
    if stat.S_ISDIR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        set_aside(path, "not a regular file")


def make_way_for_directory(path: Path) -> None:
    """Rename a file at the path of a directory that will be made."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        set_aside(path, "not a directory")


def open_log(path: Path, mode: Literal["a", "w"]) -> TextIO:
    """Open a text file for writing, after making its directory and renaming what is in the way. Raises OSError."""
    make_way_for_directory(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_way_for_file(path)
    return open(path, mode, encoding="utf-8")


def read_json_or_warn(path: Path) -> Any:
    """The content of a JSON file. None where it does not exist, cannot be read now, or was renamed as unusable."""
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON_BYTES:
            raise ValueError("not a regular file of a run's size")
        return json.loads(read_again(path, path.read_bytes).decode())
    except DataError as error:  # it may be valid, so it is not renamed
        print(f"warning: {error}", flush=True)
        return None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        set_aside(path, f"{type(error).__name__}: {error}")
        return None


def write_file_or_warn(path: Path, text: str) -> bool:
    """Replace a file atomically; False, with a warning, where the disk is full or the directory cannot be written to."""
    try:
        make_way_for_file(path)
        if path.is_char_device() or path.is_block_device():  # a rename would remove it for every program
            path.write_text(text, encoding="utf-8")
        else:
            replace_file(path, text)
    except OSError as error:
        print(f"warning: {path} not written, the run continues without it: {error}", flush=True)
        return False
    return True


def _short(why: object) -> str:
    return " ".join(str(why).split())[:200]
