"""Checkpoints by parameter name: which ones are kept, which one is resumed from, and how they are loaded.

`checkpoints/step-00000100/` holds, from every rank, its fragments of the fp32 weights and of both Adam moments
(safetensors, key `parameter:start`), the untrained weights, `state.json`, and `manifest.json` with the size and sha256 of
each file. Where a run has several students, each has a directory `step-00000100/NAME/` with these files, and one manifest
lists all of them. A checkpoint loads at any ZeRO stage and any number of ranks. Nothing is pickled, and DeepSpeed's own `latest` is
not used. checkpoint_files.py knows the files, checkpoint_writer.py writes them. Format and promises: docs/reliability.md.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from data_prep.shards import UnreadableError
from pipeline.errors import UserError
from pipeline.installed import training_command
from pipeline.recipe.ranges import LARGEST_INT, check_ranges
from pipeline.runtime.checkpoint_files import (
    KINDS,
    MANIFEST,
    STATE,
    checkpoint_path,
    checkpoints_of,
    committed_steps,
    corruption,
    discard,
    names_by_student,
    read_text,
    untrained_name,
)
from pipeline.runtime.evaluations import best_evaluation
from pipeline.runtime.tensor_files import not_finite, open_tensors

MAX_READS = 100  # of a checkpoint that the run which writes it prunes while it is read
NOT_OF_MODEL = "projection."  # prefix of the tensors that are not weights of the model
Step = int | Literal["best"] | None  # of a checkpoint: "best" has the lowest held-out loss; None: the newest valid one


@dataclass
class CheckpointConfig:
    """How many checkpoints stay on disk."""

    keep: int = 2  # the newest ones
    keep_every: int | None = None  # and every checkpoint whose step divides by this
    keep_best: Literal["heldout"] | None = None  # and the one with the lowest held-out loss, mean over languages
    max_failed_saves: int = 8  # saves in a row that may fail before the run stops with an error

    def __post_init__(self) -> None:
        limits = {"keep": (1, 10**9), "keep_every": (1, LARGEST_INT), "max_failed_saves": (1, 10**9)}
        check_ranges(self, "checkpoint", limits)

    def num_newest_and_best(self, num_students: int) -> int:
        """The most checkpoints that are kept at one time besides milestones: the newest ones, and the best of each student."""
        return self.keep + (num_students if self.keep_best else 0)

    def num_milestones(self, steps: int) -> int:
        """Checkpoints of a run of `steps` steps that `keep_every` keeps."""
        return steps // self.keep_every if self.keep_every else 0


# -- which checkpoints are kept


def prune(
    directory: Path,
    config: CheckpointConfig,
    newest: int | None = None,
    known: Container[int] | None = None,
    best: Container[int] = (),
) -> None:
    """Delete the checkpoints that `config` does not keep, and what interrupted saves left. Only rank 0 calls it, after a commit.

    Args:
        newest: the step just committed; None for the highest one on disk. Later steps are deleted: they were corrupt or
            passed over when this attempt began, and as the "newest" ones they would displace the valid ones.
        known: the steps that this attempt found when it began or wrote; None for all. Other steps were written by someone
            else: they are neither counted nor deleted.
        best: steps that are kept in addition
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
        if step not in kept and step not in best:
            try:
                discard(checkpoint_path(directory, step))
            except OSError as error:  # another user's, immutable, or in use: this costs space and must not end the run
                print(f"warning: {checkpoint_path(directory, step)} could not be deleted: {error}", flush=True)


def kept_steps(steps: list[int], config: CheckpointConfig) -> list[int]:
    """Those of ascending `steps` that are kept: the newest ones and the milestones."""
    newest = steps[-config.keep :]
    return [step for step in steps if step in newest or (config.keep_every and step % config.keep_every == 0)]


# -- which checkpoint is resumed from


def newest_valid(directory: Path, skip: int = 0) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies.

    Args:
        skip: number of valid checkpoints to pass over. The oldest valid one is never passed over.
    Returns:
        the checkpoint, or None where there is none at all; and for each newer one why it was not taken
    Raises:
        UnreadableError: a newer checkpoint cannot be read. Resuming from an older one would delete it with the next save.
        UserError: checkpoints exist and all are corrupt. A new start over them would bury weeks of work.
    """
    problems: list[str] = []
    valid: list[Path] = []
    for step in sorted(committed_steps(directory), reverse=True):
        checkpoint = checkpoint_path(directory, step)
        if problem := corruption(checkpoint):
            problems.append(f"{checkpoint}: {problem}")
            continue
        valid.append(checkpoint)
        if len(valid) > skip:
            break
    problems += [f"{checkpoint}: passed over after three crashes in a row" for checkpoint in valid[:-1]]
    if valid:
        return valid[-1], problems
    if problems:
        raise UserError(
            "no checkpoint here is valid: " + "; ".join(problems) + ". Restore one from a backup, or start again with "
            "another --run-dir"
        )
    return None, []


# -- read


class CheckpointReader:
    """Reads the fragments of a verified checkpoint for any other partition of the parameters."""

    def __init__(self, checkpoint: Path, student: str = ""):
        """`student`: whose fragments, in a checkpoint of several students. Raises `UserError` if it has none of them."""
        by_student = names_by_student(json.loads(read_text(checkpoint / MANIFEST))["files"])
        if student not in by_student:
            has = ", ".join(filter(None, by_student)) or "one without a name"
            raise UserError(f"{checkpoint} has no student {student!r}; it has {has}")
        self.path = directory = checkpoint / student
        self.state: dict[str, Any] = json.loads(read_text(directory / STATE))
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._files: list[Any] = []
        names = by_student[student]
        self._untrained = directory / untrained_name(names)
        for name in sorted(names):  # and no other file: what is not listed was not verified
            kind = name.partition("-")[0]
            if kind in KINDS:
                self._index(kind, directory / name)
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
        """Elements [start, start + numel) of a flattened parameter.

        Args:
            kind: "weight", "exp_avg" or "exp_avg_sq"
        Returns:
            fp32 [numel]
        Raises:
            UserError: the checkpoint does not have all of them
        """
        parts, position = [], start
        for piece_start, piece_numel, file, key in self._pieces.get((kind, name), []):
            low, high = max(position, piece_start), min(start + numel, piece_start + piece_numel)
            if low == position and low < high:
                parts.append(file.get_slice(key)[low - piece_start : high - piece_start])
                position = high
        if position != start + numel:
            raise UserError(
                f"{self.path} has no {kind} of {name[:200]} from element {position}: it was written by a run with another "
                "student or other frozen parts. Use another --run-dir"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def check_shapes(
        self, trained: Mapping[str, Sequence[int]], frozen: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Check that this run's student has the parameters and shapes of the checkpoint's.

        A flat fragment would also fit into a smaller matrix, with other numbers in every row.

        Raises:
            UserError: names the first parameter that differs
        """
        saved = {name: tuple(shape) for name, shape in self.state["parameters"].items()}
        expected = {name: tuple(shape) for name, shape in trained.items()}
        if frozen is not None:
            expected |= {name: tuple(tensor.shape) for name, tensor in frozen.items()}
            saved |= {name: tuple(tensor.shape) for name, tensor in self.untrained().items()}
        missing = {name for kind, name in self._pieces if kind == "weight"} ^ set(trained)
        differing = sorted(
            missing | {name for name in saved.keys() | expected if saved.get(name) != expected.get(name)}
        )
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.path} was written by a run with another student: {len(differing)} parameters differ, the first is "
                f"{name}, {_shape(saved.get(name))} there and {_shape(expected.get(name))} here. Use another --run-dir, or "
                "set the recipe's student section back (with --allow-change too: no weight fits into another shape)"
            )

    def untrained(self) -> dict[str, torch.Tensor]:
        """The weights that training does not change, by name."""
        with open_tensors(self._untrained) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "a number"


def read_model_weights(
    run_dir: Path, student: str = "", step: Step = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a student of a run from a checkpoint, also while the run keeps saving and pruning.

    Args:
        student: its name in the recipe's `students`; empty where the run has one student
        step: which checkpoint

    Returns:
        all fp32 weights by Hugging Face name, trained and untrained, in their shapes, and trained ones of the loss
        (`projection.`); and the content of `state.json`
    Raises:
        UserError: no checkpoint, no valid one, or weights that are not finite
    """
    for _ in range(MAX_READS):
        directory = checkpoints_of(run_dir, student)
        before = committed_steps(directory)
        try:
            return _read_model_weights(run_dir, directory, student, step)
        except (UserError, OSError, SafetensorError, RuntimeError, ValueError, KeyError):  # RuntimeError: safe_open
            if set(before) <= set(committed_steps(directory)):
                raise  # nothing was pruned during the read, so the error is about the files
    raise UserError(
        f"{run_dir} prunes its checkpoints faster than one can be read. Raise checkpoint.keep, or wait until the run has ended"
    )


def _read_model_weights(
    run_dir: Path, directory: Path, student: str, step: Step
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    checkpoint = _checkpoint_of(step, run_dir, directory, student)
    reader = CheckpointReader(checkpoint, student)
    weights = _weights_of(reader)
    if name := not_finite(weights):
        raise UserError(_not_finite_text(run_dir, checkpoint, name, student))
    return weights, reader.state


def _checkpoint_of(step: Step, run_dir: Path, directory: Path, student: str) -> Path:
    """The valid checkpoint of a step; no other is verified for a number. Raises `UserError` where there is none."""
    if isinstance(step, int) and committed_steps(directory):
        return _kept(directory, step, f"step {step}")
    newest, _ = newest_valid(directory)
    if newest is None:
        raise UserError(
            f"{run_dir} has no checkpoint. Train first: {training_command()} --deepspeed ds_configs/zero2.json "
            f"--run-dir {shlex.quote(str(run_dir))}   (--recipe FILE for another than recipes/quickstart.yaml)"
        )
    if step is None:
        return newest
    best = best_evaluation(CheckpointReader(newest, student).state.get("evaluations", []))
    if best is None:
        raise UserError(f"{newest / student} knows no held-out evaluation, so no step is the best. Use --step last")
    if checkpoint_path(directory, best[0]) == newest:
        return newest
    return _kept(directory, best[0], f"the best held-out loss, {best[1]:.4f} at step {best[0]},")


def _kept(directory: Path, step: int, what: str) -> Path:
    path, steps = checkpoint_path(directory, step), committed_steps(directory)
    if step not in steps:
        raise UserError(
            f"the checkpoint of {what} was not kept in {directory}; it has the steps {', '.join(map(str, steps))}. Name one "
            "of these with --step, or train with checkpoint.keep_best: heldout, which keeps the best"
        )
    if problem := corruption(path):
        raise UserError(f"{path} is not valid: {problem}. Restore it from a backup, or name another --step")
    return path


def _weights_of(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    weights = {name: tensor for name, tensor in reader.untrained().items() if not name.startswith(NOT_OF_MODEL)}
    if "parameters" not in reader.state:
        raise UserError(f"{reader.path / STATE} does not name the student's parameters. Restore it from a backup")
    for name, shape in reader.state["parameters"].items():
        numel = int(torch.Size(shape).numel())
        weights[name] = reader.read("weight", name, 0, numel).reshape(shape)
    return weights


def _not_finite_text(run_dir: Path, newest: Path, name: str, student: str) -> str:
    """The message for a checkpoint with NaN or infinity in tensor `name`; it names an earlier one that is finite."""
    problem = f"{newest}: {name} is not finite (NaN or infinite), so the student cannot be used"
    moved = [newest]
    for step in reversed(committed_steps(newest.parent)):
        path = checkpoint_path(newest.parent, step)
        if path.name >= newest.name or corruption(path) is not None:
            continue
        if not_finite(_weights_of(CheckpointReader(path, student))) is None:
            names = " ".join(shlex.quote(str(other)) for other in moved)
            return f"{problem}. {path} is finite; to export it: mv {names} {shlex.quote(str(run_dir))} and the same command again"
        moved.append(path)
    return f"{problem}, and no earlier checkpoint is finite either. Train again with a lower optimizer.lr and another --run-dir"
