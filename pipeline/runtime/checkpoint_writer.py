"""Writes checkpoints: a snapshot on the training thread, the files in the background, the commit when all ranks are done.

Each student of a run has a directory in a checkpoint, and one manifest and one rename commit all of them. Where a run has one
student, its files are in the checkpoint itself. Every rank writes into `step-N.TOKEN.tmp`, fsyncs and hashes its files. Rank 0 adds the manifest, renames the directory and
fsyncs its parent. A failure on any rank (a full disk, for example) removes this checkpoint and leaves every older one as it
was. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import DivergedRunError, UserError
from pipeline.runtime import dist
from pipeline.runtime.checkpoint import CheckpointConfig, kept_steps
from pipeline.runtime.checkpoint_files import (
    KINDS,
    MANIFEST,
    STATE,
    UNTRAINED_FILE,
    checkpoint_path,
    commit,
    committed_steps,
    file_corruption,
    fragment_file,
    fsync_and_hash,
    untrained_file,
)
from pipeline.runtime.host_memory import available_memory_bytes
from pipeline.runtime.tensor_files import save_tensors

if TYPE_CHECKING:
    from pipeline.runtime.engine import StudentEngine

# A snapshot is taken where the memory of this many is free: several ranks of a host take theirs at the same moment.
MEMORY_MARGIN = 4
Copies = dict[str, torch.Tensor]  # "parameter:start" -> flat fp32 fragment on the CPU
# Student ("" where a run has one) -> its engine, and the weights that training does not change.
Saved = Mapping[str, "tuple[StudentEngine, Mapping[str, torch.Tensor]]"]


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended. `problem` is None when the checkpoint is committed.

    `seconds` counts from the snapshot to the commit; training was stopped for `stopped_s` of them.
    """

    step: int
    problem: str | None
    seconds: float
    stopped_s: float


@dataclass
class _Pending:
    """A save in progress on this rank."""

    step: int
    began_s: float
    thread: threading.Thread
    problem: str | None
    files: dict[str, Any]
    stopped_s: float = 0.0


class CheckpointWriter:
    """One save at a time: `begin`, then `poll` after every step or `wait`. Both return the outcome once."""

    def __init__(
        self,
        directory: Path,
        students: Saved,
        rank: int,
        keeping: CheckpointConfig | None = None,
    ):
        """`keeping`: how many checkpoints the caller keeps when it prunes after each commit."""
        self._directory, self._students, self._rank = directory, students, rank
        self._keeping = keeping or CheckpointConfig()
        self._world_size = torch.distributed.get_world_size()
        # One name for all ranks of this attempt; no other attempt writes under it.
        self._token: str = dist.broadcast_json(secrets.token_hex(4))
        self._pending: _Pending | None = None
        self._failures = 0  # in a row

    def begin(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take a snapshot and start writing the checkpoint of `state["step"]`. No save may be in progress.

        Args:
            states: student -> the content of its `state.json`, all of the same step

        Raises:
            DivergedRunError: on all ranks, where a weight is NaN or infinite. Such a weight never recovers, and its
                checkpoints would displace the finite ones.
        """
        assert self._pending is None, "wait for the previous save first"
        (step,) = {state["step"] for state in states.values()}
        self._check_finite(step)
        began_s, partial = time.monotonic(), self._partial(step)
        problem = _attempt(lambda: _make_empty(partial, self._students)) if self._rank == 0 else None
        problem = dist.broadcast_json(problem)
        self._pending = pending = _Pending(step, began_s, threading.Thread(), problem, {})
        if problem is None:
            pending.problem = "the writing thread did not finish"  # replaced when it does
            if problem := _attempt(lambda: self._start_writing(pending, partial, states)):
                pending.problem = problem
        pending.stopped_s = time.monotonic() - began_s

    def _start_writing(self, pending: _Pending, partial: Path, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Write this rank's files: from a snapshot in a thread, or, where memory is short, now and one kind at a time."""

        def write(copies: Callable[[str, str], Copies]) -> None:
            def write_all() -> None:
                for student, state in states.items():
                    pending.files.update(self._write(partial, student, copies, state))

            pending.problem = _attempt(write_all)

        if available_memory_bytes() > MEMORY_MARGIN * self._snapshot_bytes():
            snapshot = {(student, kind): self._copies(student, kind) for student in self._students for kind in KINDS}
            from_snapshot = [lambda student, kind: snapshot.pop((student, kind))]
            pending.thread = threading.Thread(target=write, args=from_snapshot, name="checkpoint", daemon=True)
            pending.thread.start()
        else:
            write(self._copies)

    def poll(self) -> SaveOutcome | None:
        """The outcome, if a save was in progress and every rank has written its files."""
        if self._pending is None or dist.any_rank(self._pending.thread.is_alive()):
            return None
        return self._finish(self._pending, time.monotonic())

    def wait(self) -> SaveOutcome | None:
        """Block until the save in progress, if any, has ended; its outcome."""
        if self._pending is None:
            return None
        stopped_from_s = time.monotonic()
        if self._pending.thread.ident is not None:
            self._pending.thread.join()
        return self._finish(self._pending, stopped_from_s)

    def _check_finite(self, step: int) -> None:
        found = ((student, engine.not_finite()) for student, (engine, _) in self._students.items())
        mine = next((f"{student}: {name}" if student else name for student, name in found if name), None)
        if name := next(filter(None, dist.gather_json(mine)), None):
            raise DivergedRunError(
                f"after step {step} the weights of {name} are not finite (NaN or infinite): no checkpoint of them is written, "
                f"and those in {self._directory} stay. Lower optimizer.lr and start again, with --allow-change to continue "
                "from the newest of them or in another --run-dir"
            )

    def check_failed_saves(self, failed: SaveOutcome) -> None:
        """Raise a `UserError` on all ranks after `checkpoint.max_failed_saves` failed saves in a row."""
        if self._failures >= self._keeping.max_failed_saves:
            raise UserError(
                f"{self._failures} saves in a row have failed (checkpoint.max_failed_saves), the last one of step "
                f"{failed.step}: {failed.problem}. Older checkpoints are unchanged. Make {self._directory} writable, with "
                "room for one more checkpoint, then start the same command again"
            )

    def _partial(self, step: int) -> Path:
        return self._directory / f"{checkpoint_path(self._directory, step).name}.{self._token}.tmp"

    def _snapshot_bytes(self) -> int:
        engines = [engine for engine, _ in self._students.values()]
        return sum(4 * len(KINDS) * fragment.numel for engine in engines for fragment in engine.fragments())

    def _copies(self, student: str, kind: str) -> Copies:
        """This rank's fragments of one kind."""
        engine, _ = self._students[student]
        return {
            f"{f.name}:{f.start}": (f.view(f.buffer) if kind == "weight" else engine.moment(f, kind)).to(
                "cpu", copy=True
            )
            for f in engine.fragments()
        }

    def _write(
        self, partial: Path, student: str, copies: Callable[[str, str], Copies], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write and fsync this rank's files of one student; name in the checkpoint -> manifest entry."""
        entries, directory = {}, partial / student
        for kind in KINDS:
            name = fragment_file(kind, self._rank, self._world_size)
            save_tensors(copies(student, kind), directory / name)
            entries[name] = fsync_and_hash(directory / name)
        if self._rank == 0:
            (directory / STATE).write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
            entries[STATE] = fsync_and_hash(directory / STATE)
            _, untrained = self._students[student]
            entries[UNTRAINED_FILE] = write_untrained(partial, state["step"], untrained, self._keeping, student)
        return {f"{student}/{name}" if student else name: entry for name, entry in entries.items()}

    def _finish(self, pending: _Pending, stopped_from_s: float) -> SaveOutcome:
        """All ranks report; rank 0 commits if none failed."""
        self._pending = None
        partial = self._partial(pending.step)
        reports = dist.gather_json([pending.problem, pending.files])
        problems = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(reports) if problem]
        if not problems and self._rank == 0:
            files = {name: entry for _, entries in reports for name, entry in entries.items()}
            problem = _attempt(lambda: commit(partial, checkpoint_path(self._directory, pending.step), files))
            problems = [f"rank 0: {problem}"] if problem else []
        problems = dist.broadcast_json(problems)
        if problems and self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self._failures = self._failures + 1 if problems else 0
        now_s = time.monotonic()
        stopped_s = pending.stopped_s + now_s - stopped_from_s
        return SaveOutcome(pending.step, "; ".join(problems) or None, now_s - pending.began_s, stopped_s)


def _attempt(action: Callable[[], object]) -> str | None:
    """The error of `action`, or None. Any exception on one rank must fail this save on all ranks, and not the run."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make_empty(partial: Path, students: Collection[str]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for student in students:
        (partial / student).mkdir(parents=True)


def write_untrained(
    partial: Path, step: int, untrained: Mapping[str, torch.Tensor], keeping: CheckpointConfig, student: str = ""
) -> dict[str, Any]:
    """Write the weights that training does not change, or link them from an earlier checkpoint; their manifest entry.

    They are the same at every step of a run and can be most of a checkpoint (390 of 500 MB in the quickstart). Two copies
    take turns, so that the newest checkpoint and the one kept next to it never depend on the same bytes on disk.
    """
    earlier = [other for other in committed_steps(partial.parent) if other < step]
    kept = [other for other in kept_steps([*earlier, step], keeping) if other < step]
    source = _source_of_link(partial.parent, kept[-1], earlier, student) if kept else None
    target = partial / student / UNTRAINED_FILE
    entry = _link(source, target, student) if source else None
    if entry is not None:
        return entry
    save_tensors(dict(untrained), target)
    return fsync_and_hash(target)


def _source_of_link(directory: Path, kept: int, earlier: list[int], student: str) -> Path | None:
    """The newest untrained weights that are not the same file as those of the checkpoint that will be `kept` next to this."""
    copy = untrained_file(checkpoint_path(directory, kept) / student)
    others = (untrained_file(checkpoint_path(directory, other) / student) for other in reversed(earlier))
    return next((other for other in others if not _is_same_file(other, copy)), None)


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist, so it cannot be linked from
        return True


def _link(source: Path, target: Path, student: str) -> dict[str, Any] | None:
    """Link the untrained weights `source` of a checkpoint, if they are valid and the file system has links; their entry."""
    try:
        checkpoint = source.parent.parent if student else source.parent
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        entry = manifest["files"][source.relative_to(checkpoint).as_posix()]
        if file_corruption(source, entry) is not None:
            return None
        os.link(source, target)
    except (OSError, ValueError, KeyError, TypeError):  # UnreadableError too: a new copy is written instead
        return None
    return entry
