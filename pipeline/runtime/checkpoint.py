"""Checkpoints by parameter name: their format, verification and reading, at any ZeRO stage and number of ranks.

`checkpoints/step-00000100/` holds, from every rank, the fragments that it owned of the fp32 weights and of both Adam
moments (safetensors, key `parameter:start`), the carried-along weights, `state.json`, and `manifest.json` with the
size and sha256 of all of them. Nothing is pickled, and DeepSpeed's own `latest` plays no part. checkpoint_writer.py
writes them. Format and promises: docs/reliability.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data_prep.durable_files import sync, unique_name
from data_prep.shards import UnreadableError, read_again
from pipeline.errors import UserError
from pipeline.recipe.ranges import LARGEST_INT, check_ranges
from pipeline.runtime.checkpoint_state import state_problem
from pipeline.runtime.optimizer import MOMENTS
from pipeline.runtime.tensor_files import names_a_tensor_twice, not_finite, open_tensors

FORMAT_VERSION = 1
KINDS = ("weight", *MOMENTS)
UNTRAINED_FILE = "carried.safetensors"
MOST_READS = 100  # of a run that saves and prunes while its checkpoint is read
BESIDE_WEIGHTS = "projection."  # how names in it begin that are no weights of the model
_STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")  # one name per step
_FRAGMENT = re.compile(r"[^:]+:[0-9]+")
_FILE_NAME = re.compile(r"state\.json|carried\.safetensors|(weight|exp_avg|exp_avg_sq)-\d{5}-of-\d{5}\.safetensors")


@dataclass
class CheckpointConfig:
    """How many checkpoints stay on disk."""

    keep: int = 2  # the newest ones
    keep_every: int | None = None  # and every checkpoint whose step divides by this
    max_failed_saves: int = 8  # saves in a row that may fail before the run stops and says so

    def __post_init__(self) -> None:
        limits = {"keep": (1, 10**9), "keep_every": (1, LARGEST_INT), "max_failed_saves": (1, 10**9)}
        check_ranges(self, "checkpoint", limits)


# -- what is on disk


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def commit(partial: Path, final: Path, files: Mapping[str, Any]) -> None:
    """Give a complete set of files its manifest and its name. `files`: name -> size and sha256."""
    assert not _incomplete_set(files), "what is committed lets older checkpoints go"
    manifest = partial / "manifest.json"
    manifest.write_text(_manifest_text(files), encoding="utf-8")
    sync(manifest)
    sync(partial)
    if final.exists():  # the same step again, after a fall-back to an older checkpoint
        _discard(final)
    partial.rename(final)
    sync(final.parent)


def fsync_and_hash(path: Path) -> dict[str, Any]:
    """Flush a file to disk and describe it as a manifest does."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size_bytes": file.tell(), "sha256": digest}


def _manifest_text(files: Mapping[str, Any]) -> str:
    """The manifest, with a sha256 over its own content."""
    content = {"format": FORMAT_VERSION, "files": dict(files)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True)


def _incomplete_set(names: Iterable[str]) -> str | None:
    """None when the names are those of a checkpoint: each kind from every one of its ranks, and what rank 0 adds."""
    names = set(names)
    world_size = max(1, sum(name.startswith(f"{KINDS[0]}-") for name in names))
    fragments = {f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors" for kind in KINDS for rank in range(world_size)}
    differing = sorted(names ^ (fragments | {UNTRAINED_FILE, "state.json"}))
    return f"the manifest does not list just the files of {world_size} rank(s): {differing[:3]}" if differing else None


def _discard(checkpoint: Path) -> None:
    """Delete so that a kill in the middle leaves a `.tmp`, never half a checkpoint under its real name."""
    doomed = unique_name(checkpoint, ".tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(
    directory: Path, config: CheckpointConfig, newest: int | None = None, known: Container[int] | None = None
) -> None:
    """Delete what `config` does not keep, and what interrupted saves left. Rank 0 alone calls it, after a commit.

    `newest` is the step just committed (None: the highest there is). Later ones were damaged or passed over when this
    life began: they would count as the newest and push the whole ones out, so they go. `known` are the steps that this
    life found when it began or wrote (None: all): others are somebody else's, and are neither counted nor deleted.
    """
    for leftover in directory.glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        steps = [step for step in committed_steps(directory) if known is None or step in known]
    except UnreadableError as error:
        print(f"warning: older checkpoints stay: {error}", flush=True)
        return
    kept = kept_steps([step for step in steps if newest is None or step <= newest], config)
    for step in reversed(steps):
        if step not in kept:
            try:
                _discard(checkpoint_path(directory, step))
            except OSError as error:  # another user's, immutable, or in use: it costs space, never the run
                print(f"warning: {checkpoint_path(directory, step)} could not be deleted: {error}", flush=True)


def kept_steps(steps: list[int], config: CheckpointConfig) -> list[int]:
    """Those of ascending `steps` that stay: the newest ones and the milestones."""
    newest = steps[-config.keep :]
    return [step for step in steps if step in newest or (config.keep_every and step % config.keep_every == 0)]


# -- find and verify


def committed_steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint directory under its final name, ascending. One that cannot be listed is no empty one:
    `UnreadableError`."""
    try:
        names = read_again(directory, lambda: [entry.name for entry in os.scandir(directory) if entry.is_dir()])
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_STEP_NAME.fullmatch, names) if match)


def damage(checkpoint: Path) -> str | None:
    """None when every file is there with its size and sha256; else which file is wrong and how.

    Raises `UnreadableError` for a file that could not be read: that is no damage."""
    if checkpoint.is_symlink():
        return "a symbolic link, not a directory of this run"
    try:
        text = _text(checkpoint / "manifest.json")
        manifest = json.loads(text)
        if manifest["format"] != FORMAT_VERSION:
            return f"format {str(manifest['format'])[:40]}, this code reads {FORMAT_VERSION}"
        files = manifest["files"]
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                return f"the manifest names {name[:80]!r}, which no checkpoint has"
        if text != _manifest_text(files):
            return "manifest.json does not have its own sha256"
        if problem := _incomplete_set(files):
            return problem
        listed = read_again(checkpoint, lambda: list(checkpoint.iterdir()))
        there = {path.name for path in listed if _FILE_NAME.fullmatch(path.name)}
        if unlisted := sorted(there - set(files)):
            return f"{unlisted[0]} is not in the manifest"
        problems = (file_corruption(checkpoint / name, entry) for name, entry in files.items())
        if problem := next(filter(None, problems), None):
            return problem
        tensors = (checkpoint / name for name in files if name.endswith(".safetensors"))
        if problem := next(filter(None, map(_header_problem, tensors)), None):
            return problem
        if json.loads(_text(checkpoint / "state.json"))["step"] != _step_of(checkpoint):
            return "state.json belongs to another step"
        if problem := state_problem(json.loads(_text(checkpoint / "state.json"))):
            return f"state.json is not one of this code: {problem}"
    except UnreadableError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json or state.json cannot be read ({type(error).__name__}: {error})"
    return None


def _text(path: Path) -> str:
    return read_again(path, path.read_bytes).decode()


def file_corruption(path: Path, entry: Mapping[str, Any]) -> str | None:
    return read_again(path, lambda: _file_corruption(path, entry))


def _file_corruption(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{path.name} is missing"
    if found.st_size != entry["size_bytes"]:
        return f"{path.name} has {found.st_size} bytes, the manifest says {entry['size_bytes']}"
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            return f"{path.name} does not have the sha256 of the manifest"
    return None


def _header_problem(path: Path) -> str | None:
    """The library checks lengths and offsets; what is left is that no name comes twice, and what a fragment must be."""
    try:
        if names_a_tensor_twice(path):
            return f"{path.name} names a tensor twice"
        with open_tensors(path) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = tensors.get_slice(key)
                is_flat = part.get_dtype() == "F32" and len(part.get_shape()) == 1
                if path.name != UNTRAINED_FILE and not (is_flat and _FRAGMENT.fullmatch(key)):
                    return f"{path.name} holds {key!r}, which is no flat fp32 fragment"
    except UnreadableError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        return f"{path.name} is no safetensors file: {error}"
    return None


def _step_of(checkpoint: Path) -> int:
    match = _STEP_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def newest_valid(directory: Path, skip: int = 0) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were not taken. None when there is none at all.

    One that cannot be read ends the search with an `UnreadableError`: an older one would be continued in its place, and
    its saves would delete the newer one.

    `skip` passes over so many whole ones, but never over the last one there is. Checkpoints that exist but are all
    damaged are a `UserError`: starting afresh over them would bury weeks of work.
    """
    problems: list[str] = []
    whole: list[Path] = []
    for step in sorted(committed_steps(directory), reverse=True):
        checkpoint = checkpoint_path(directory, step)
        if problem := damage(checkpoint):
            problems.append(f"{checkpoint}: {problem}")
            continue
        whole.append(checkpoint)
        if len(whole) > skip:
            break
    problems += [f"{checkpoint}: passed over after three crashes in a row" for checkpoint in whole[:-1]]
    if whole:
        return whole[-1], problems
    if problems:
        raise UserError(
            "no checkpoint here is whole: " + "; ".join(problems) + ". Restore one from a backup, or start afresh "
            "with another --run-dir"
        )
    return None, []


# -- read


class CheckpointReader:
    """Fragments of a verified checkpoint, put together again for any other partition of the parameters."""

    def __init__(self, checkpoint: Path):
        self.state: dict[str, Any] = json.loads(_text(checkpoint / "state.json"))
        self.path = checkpoint
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._files: list[Any] = []
        manifest = json.loads(_text(checkpoint / "manifest.json"))
        for name in sorted(manifest["files"]):  # and no other file: what is not listed was not verified
            kind = name.partition("-")[0]
            if kind in KINDS:
                self._index(kind, checkpoint / name)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def _index(self, kind: str, path: Path) -> None:
        file = open_tensors(path)
        self._files.append(file)
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            name, _, start = key.rpartition(":")
            numel = file.get_slice(key).get_shape()[0]
            self._pieces.setdefault((kind, name), []).append((int(start), numel, file, key))

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """fp32 elements [start, start + numel) of a flattened parameter; `UserError` when some are not there."""
        parts, position = [], start
        for piece_start, piece_numel, file, key in self._pieces.get((kind, name), []):
            low, high = max(position, piece_start), min(start + numel, piece_start + piece_numel)
            if low == position and low < high:
                parts.append(file.get_slice(key)[low - piece_start : high - piece_start])
                position = high
        if position != start + numel:
            raise UserError(
                f"{self.path} has no {kind} of {name[:200]} from element {position}: it was written by a run with another "
                "student or other frozen parts. Take another --run-dir"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def check_shapes(
        self, trained: Mapping[str, Sequence[int]], frozen: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """The student of this run and the one of the checkpoint must have the same parameters in the same shapes: a flat
        fragment would fit into a smaller matrix, with other numbers in every row."""
        saved = {name: tuple(shape) for name, shape in self.state["parameters"].items()}
        wanted = {name: tuple(shape) for name, shape in trained.items()}
        if frozen is not None:
            wanted |= {name: tuple(tensor.shape) for name, tensor in frozen.items()}
            saved |= {name: tuple(tensor.shape) for name, tensor in self.untrained().items()}
        missing = {name for kind, name in self._pieces if kind == "weight"} ^ set(trained)
        differing = sorted(missing | {name for name in saved.keys() | wanted if saved.get(name) != wanted.get(name)})
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.path} was written by a run with another student: {len(differing)} parameters differ, the first is "
                f"{name}, {_shape(saved.get(name))} there and {_shape(wanted.get(name))} here. Take another --run-dir, or "
                "set the recipe's student section back (with --allow-change too: no weight fits into another shape)"
            )

    def untrained(self) -> dict[str, torch.Tensor]:
        with open_tensors(self.path / UNTRAINED_FILE) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "a number"


def read_model_weights(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All fp32 weights of the newest whole checkpoint by HF name, trained and carried along, and its `state.json`. A running
    run may prune the one that is being read: then a newer one is taken."""
    for _ in range(MOST_READS):
        before = committed_steps(run_dir / "checkpoints")
        try:
            return _read_model_weights(run_dir)
        except (UserError, OSError, SafetensorError, RuntimeError, ValueError, KeyError):  # RuntimeError: safe_open
            if set(before) <= set(committed_steps(run_dir / "checkpoints")):
                raise  # nothing was pruned under the reader: what it found is so
    raise UserError(
        f"{run_dir} prunes its checkpoints faster than one can be read. Raise checkpoint.keep, or wait until the run has ended"
    )


def _read_model_weights(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    checkpoint, _ = newest_valid(run_dir / "checkpoints")
    if checkpoint is None:
        raise UserError(
            f"{run_dir} has no checkpoint. Train first: deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json "
            f"--run-dir {shlex.quote(str(run_dir))}   (--recipe FILE for another than recipes/quickstart.yaml)"
        )
    reader = CheckpointReader(checkpoint)
    weights = _weights_of(reader)
    if name := not_finite(weights):
        raise UserError(_not_finite_text(run_dir, checkpoint, name))
    return weights, reader.state


def _weights_of(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    weights = {name: tensor for name, tensor in reader.untrained().items() if not name.startswith(BESIDE_WEIGHTS)}
    if "parameters" not in reader.state:
        raise UserError(
            f"{reader.path / 'state.json'} does not name the student's parameters. Restore it from a backup"
        )
    for name, shape in reader.state["parameters"].items():
        numel = int(torch.Size(shape).numel())
        weights[name] = reader.read("weight", name, 0, numel).reshape(shape)
    return weights


def _not_finite_text(run_dir: Path, newest: Path, name: str) -> str:
    """Why the newest checkpoint is no student, and which earlier one is."""
    told = f"{newest}: {name} is not finite (NaN or infinite), so this is no student"
    moved = [newest]
    for step in reversed(committed_steps(newest.parent)):
        path = checkpoint_path(newest.parent, step)
        if path.name >= newest.name or damage(path) is not None:
            continue
        if not_finite(_weights_of(CheckpointReader(path))) is None:
            names = " ".join(shlex.quote(str(other)) for other in moved)
            return f"{told}. {path} is finite; to export it: mv {names} {shlex.quote(str(run_dir))} and the same command again"
        moved.append(path)
    return f"{told}, and no earlier checkpoint is finite either. Train again with a lower optimizer.lr and another --run-dir"
