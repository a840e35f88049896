"""Files of a checkpoint: their names, the manifest that lists them, how a checkpoint is committed and how it is verified.

In: a directory `checkpoints/` or one `step-N/` in it. Out: the committed steps, and for each of them None or what is wrong.
Format: docs/reliability.md. Writing is in checkpoint_writer.py, loading in checkpoint.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_prep.durable_files import sync, unique_name
from data_prep.file_hashes import sha256_of_file
from data_prep.shards import UnreadableError, read_again
from pipeline.runtime.optimizer import MOMENTS
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.tensor_files import has_duplicate_names, open_tensors

FORMAT_VERSION = 1
KINDS = ("weight", *MOMENTS)
MANIFEST, STATE = "manifest.json", "state.json"
UNTRAINED_FILE = "untrained.safetensors"
FORMER_UNTRAINED_FILE = "carried.safetensors"  # its name in older checkpoints, which stay valid
_STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")  # one name per step
_LATER_GROUP = re.compile(r"checkpoints-([2-9]|[1-9][0-9]{1,5})")
_FRAGMENT = re.compile(r"[^:]+:[0-9]+")
_FILE_NAME = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9_+-]{0,63}/)?"  # of a student, in a run with several
    r"(state\.json|(untrained|carried)\.safetensors|(weight|exp_avg|exp_avg_sq)-\d{5}-of-\d{5}\.safetensors)"
)


def checkpoints_of(run_dir: Path, student: str = "") -> Path:
    """The directory with the checkpoints of a student: those that were added to a finished run have one of their own."""
    groups = (RunPaths(run_dir, group=group).checkpoints for group in reversed([1, *later_groups(run_dir)]))
    return next((directory for directory in groups if has_student(directory, student)), RunPaths(run_dir).checkpoints)


def has_student(directory: Path, student: str) -> bool:
    """Whether a committed checkpoint in this directory is also of the student."""
    return any((checkpoint_path(directory, step) / student).is_dir() for step in committed_steps(directory))


def later_groups(run_dir: Path) -> list[int]:
    """The numbers of the groups of students that were added to a finished run, ascending."""
    found = (_LATER_GROUP.fullmatch(path.name) for path in run_dir.glob("checkpoints-*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def fragment_file(kind: str, rank: int, world_size: int) -> str:
    """The name of the file with one rank's fragments of one kind ("weight", "exp_avg" or "exp_avg_sq")."""
    return f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def names_by_student(files: Collection[str]) -> dict[str, list[str]]:
    """Student -> names of its files in its directory of a checkpoint; "" where the files are those of one student."""
    found: dict[str, list[str]] = {}
    for name in files:
        student, _, file = name.rpartition("/")
        found.setdefault(student, []).append(file)
    return found


def untrained_name(names: Collection[str]) -> str:
    """The name of the file with the untrained weights among the file names of a checkpoint."""
    is_former = FORMER_UNTRAINED_FILE in names and UNTRAINED_FILE not in names
    return FORMER_UNTRAINED_FILE if is_former else UNTRAINED_FILE


def untrained_file(directory: Path) -> Path:
    """The file with the untrained weights in a student's directory of a checkpoint, under its present or its former name."""
    # os.path.exists is False on any error, so that an unreadable older checkpoint cannot make a save fail
    names = [name for name in (UNTRAINED_FILE, FORMER_UNTRAINED_FILE) if os.path.exists(directory / name)]  # noqa: PTH110
    return directory / untrained_name(names)


def committed_steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint directory under its final name, ascending; none where `directory` does not exist.

    Raises:
        UnreadableError: the directory exists and cannot be listed.
    """
    try:
        names = read_again(directory, lambda: [entry.name for entry in os.scandir(directory) if entry.is_dir()])
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_STEP_NAME.fullmatch, names) if match)


# -- commit


def fsync_and_hash(path: Path) -> dict[str, Any]:
    """Flush a file to disk and return its manifest entry: size in bytes and sha256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size_bytes": file.tell(), "sha256": digest}


def manifest_text(files: Mapping[str, Any]) -> str:
    """The manifest of `files` (name -> entry). It contains a sha256 of its own content."""
    content = {"format": FORMAT_VERSION, "files": dict(files)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True)


def commit(partial: Path, final: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest of a complete set of files and rename `partial` to `final`.

    Args:
        files: name -> entry of fsync_and_hash, for every file of every rank
    """
    assert not _problem_of_names(files), "pruning deletes older checkpoints after a commit, so the set must be complete"
    manifest = partial / MANIFEST
    manifest.write_text(manifest_text(files), encoding="utf-8")
    sync(manifest)
    for student in {*names_by_student(files), ""}:
        sync(partial / student)
    if final.exists():  # the same step again, after the run resumed from an older checkpoint
        discard(final)
    partial.rename(final)
    sync(final.parent)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first: a kill during the deletion leaves a `.tmp`, not an incomplete checkpoint."""
    doomed = unique_name(checkpoint, ".tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# -- verify


def corruption(checkpoint: Path) -> str | None:
    """Verify every file of a checkpoint: listed, present, of the manifest's size and sha256, and well formed.

    Returns:
        None for a valid checkpoint, else which file is wrong and how.
    Raises:
        UnreadableError: a file could not be read. That does not make it corrupt.
    """
    if checkpoint.is_symlink():
        return "a symbolic link, not a directory of this run"
    try:
        return _corruption(checkpoint)
    except UnreadableError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json or state.json cannot be read ({type(error).__name__}: {error})"


def _corruption(checkpoint: Path) -> str | None:
    text = read_text(checkpoint / MANIFEST)
    manifest = json.loads(text)
    if manifest["format"] != FORMAT_VERSION:
        return f"format {str(manifest['format'])[:40]}, this code reads {FORMAT_VERSION}"
    files = manifest["files"]
    if unknown := next((name for name in files if not _FILE_NAME.fullmatch(name)), None):
        return f"the manifest names {unknown[:80]!r}, which no checkpoint has"
    if text != manifest_text(files):
        return "manifest.json does not have its own sha256"
    if problem := _problem_of_names(files):
        return problem
    listed = read_again(checkpoint, lambda: _names_below(checkpoint))
    if unlisted := sorted({name for name in listed if _FILE_NAME.fullmatch(name)} - set(files)):
        return f"{unlisted[0]} is not in the manifest"
    problems = (file_corruption(checkpoint / name, entry) for name, entry in files.items())
    if problem := next(filter(None, problems), None):
        return problem
    tensors = (checkpoint / name for name in files if name.endswith(".safetensors"))
    if problem := next(filter(None, map(_header_problem, tensors)), None):
        return problem
    states = (checkpoint / student / STATE for student in names_by_student(files))
    return next(filter(None, map(_problem_of_state_file, states)), None)


def _names_below(checkpoint: Path) -> list[str]:
    """Names of the files of a checkpoint, and of those in its directories of students."""
    paths = list(checkpoint.iterdir())
    paths += [path for directory in paths if directory.is_dir() for path in directory.iterdir()]
    return [path.relative_to(checkpoint).as_posix() for path in paths]


def _problem_of_state_file(path: Path) -> str | None:
    state = json.loads(read_text(path))
    checkpoint = path.parent if _STEP_NAME.fullmatch(path.parent.name) else path.parent.parent
    match = _STEP_NAME.fullmatch(checkpoint.name)
    name = path.relative_to(checkpoint).as_posix()
    if match is None or state["step"] != int(match[1]):
        return f"{name} belongs to another step"
    if problem := _state_problem(state):
        return f"{name} is not one of this code: {problem}"
    return None


def read_text(path: Path) -> str:
    """The text of a file. Errors of a network file system that pass are tried again; raises UnreadableError, OSError."""
    return read_again(path, path.read_bytes).decode()


def readable_state(directory: Path) -> dict[str, Any]:
    """`state.json` of a student in a checkpoint, whose hashes are not verified; empty where it cannot be read."""
    try:
        state = json.loads(read_text(directory / STATE))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _problem_of_names(files: Collection[str]) -> str | None:
    """None when the names are complete for each student: every kind from every rank, the untrained weights and the state."""
    by_student = names_by_student(files) or {"": []}
    if "" in by_student and len(by_student) > 1:
        return "the manifest lists files of a run with one student and of one with several"
    return next(filter(None, map(_problem_of_students_names, by_student.values())), None)


def _problem_of_students_names(listed: Collection[str]) -> str | None:
    names = set(listed)
    world_size = max(1, sum(name.startswith(f"{KINDS[0]}-") for name in names))
    fragments = {fragment_file(kind, rank, world_size) for kind in KINDS for rank in range(world_size)}
    differing = sorted(names ^ (fragments | {untrained_name(names), STATE}))
    return f"the manifest does not list just the files of {world_size} rank(s): {differing[:3]}" if differing else None


def file_corruption(path: Path, entry: Mapping[str, Any]) -> str | None:
    """None when `path` is a regular file with the size and sha256 of its manifest entry, else what is wrong."""
    try:
        found = read_again(path, path.lstat)
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{path.name} is missing"
    if found.st_size != entry["size_bytes"]:
        return f"{path.name} has {found.st_size} bytes, the manifest says {entry['size_bytes']}"
    if read_again(path, lambda: sha256_of_file(path)) != entry["sha256"]:
        return f"{path.name} does not have the sha256 of the manifest"
    return None


def _header_problem(path: Path) -> str | None:
    """The library checks lengths and offsets. This checks for duplicate names, and for flat fp32 fragments."""
    try:
        if has_duplicate_names(path):
            return f"{path.name} names a tensor twice"
        with open_tensors(path) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = tensors.get_slice(key)
                is_flat = part.get_dtype() == "F32" and len(part.get_shape()) == 1
                is_fragment_file = path.name not in (UNTRAINED_FILE, FORMER_UNTRAINED_FILE)
                if is_fragment_file and not (is_flat and _FRAGMENT.fullmatch(key)):
                    return f"{path.name} holds {key!r}, which is not a flat fp32 fragment"
    except UnreadableError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        return f"{path.name} is not a safetensors file: {error}"
    return None


def _state_problem(state: Mapping[str, Any]) -> str | None:
    """None when the parameter shapes, evaluations and early end in `state.json` can be used, else why not."""
    shapes = state.get("parameters", {})
    if not isinstance(shapes, dict):
        return "`parameters` is not an object"
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            return f"`parameters` has no shape for {name[:80]!r}"
    # checkpoints of earlier versions have neither
    evaluations, ended = state.get("evaluations", []), state.get("ended")
    if not isinstance(evaluations, list) or not all(map(_is_evaluation, evaluations)):
        return "`evaluations` is not a list of [step, loss]"
    if ended is not None and not _is_end(ended):
        return "`ended` is not a step and a reason"
    return None


def _is_evaluation(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 2 and _is_step(found[0]) and isinstance(found[1], float)


def _is_end(found: Any) -> bool:
    return isinstance(found, dict) and _is_step(found.get("step")) and isinstance(found.get("reason"), str)


def _is_step(found: Any) -> bool:
    return type(found) is int and found >= 0
