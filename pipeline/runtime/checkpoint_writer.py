"""Writes checkpoints: a snapshot on the training thread, the files in the background, the commit when all ranks are done.

Commit: every rank writes into `step-N.TOKEN.tmp`, syncs and hashes; rank 0 adds the manifest, renames, syncs the parent. A
failure on any rank (disk full, say) leaves no trace of this checkpoint and every older one as it was. Used by
trainer.py; all ranks make the same calls in the same order.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import DivergedRunError, UserError
from pipeline.runtime import dist
from pipeline.runtime.checkpoint import (
    KINDS,
    UNTRAINED_FILE,
    CheckpointConfig,
    checkpoint_path,
    commit,
    committed_steps,
    file_corruption,
    fsync_and_hash,
    kept_steps,
)
from pipeline.runtime.host_memory import available_memory_bytes
from pipeline.runtime.tensor_files import save_tensors

if TYPE_CHECKING:
    from pipeline.runtime.engine import StudentEngine

MEMORY_MARGIN = 4  # snapshots that must fit for one to be taken: several ranks of a host take theirs at the same moment


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended: `problem` is None when the checkpoint is committed.

    `seconds` from the snapshot to the commit; training stood still for `stopped_s` of them.
    """

    step: int
    problem: str | None
    seconds: float
    stopped_s: float


@dataclass
class _Pending:
    """A save under way on this rank."""

    step: int
    began_s: float
    thread: threading.Thread
    problem: str | None
    files: dict[str, Any]
    stopped_s: float = 0.0


class CheckpointWriter:
    """One save at a time. `begin`, then `poll` after every step or `wait`; both return the outcome once."""

    def __init__(
        self,
        directory: Path,
        engine: StudentEngine,
        untrained: Mapping[str, torch.Tensor],
        rank: int,
        keeping: CheckpointConfig | None = None,
    ):
        """`keeping`: what will be pruned after each commit."""
        self._directory, self._engine, self._carried, self._rank = directory, engine, untrained, rank
        self._keeping = keeping or CheckpointConfig()
        self._world_size = torch.distributed.get_world_size()
        # One name for all ranks of this attempt; no other one writes under it.
        self._token: str = dist.broadcast_json(secrets.token_hex(4), engine.device)
        self._pending: _Pending | None = None
        self._failures = 0  # in a row

    def begin(self, state: Mapping[str, Any]) -> None:
        """Snapshot the engine and start writing the checkpoint of `state["step"]`. No save may be under way.

        Raises `DivergedRunError` on all ranks where a weight is NaN or infinite: it never recovers, and a checkpoint of it would
        push the finite ones out.
        """
        assert self._pending is None, "the save before must be waited for"
        self._check_finite(state["step"])
        began_s, partial = time.monotonic(), self._partial(state["step"])
        problem = _attempt(lambda: _start(partial)) if self._rank == 0 else None
        problem = dist.broadcast_json(problem, self._engine.device)
        self._pending = pending = _Pending(state["step"], began_s, threading.Thread(), problem, {})
        if problem is None:
            pending.problem = "the writing never came to its end"  # until it has: silence is no success
            if problem := _attempt(lambda: self._start_writing(pending, partial, state)):
                pending.problem = problem
        pending.stopped_s = time.monotonic() - began_s

    def _start_writing(self, pending: _Pending, partial: Path, state: Mapping[str, Any]) -> None:
        """This rank's share, beside the training from a snapshot; where memory is short, at once and kind by kind."""

        def write(of_kind: Callable[[str], dict[str, torch.Tensor]]) -> None:
            pending.problem = _attempt(lambda: pending.files.update(self._write(partial, of_kind, state)))

        if available_memory_bytes() > MEMORY_MARGIN * self._snapshot_bytes():
            snapshot = {kind: self._copies(kind) for kind in KINDS}
            pending.thread = threading.Thread(target=write, args=[snapshot.__getitem__], name="checkpoint", daemon=True)
            pending.thread.start()
        else:
            write(self._copies)

    def poll(self) -> SaveOutcome | None:
        """The outcome, if a save was under way and every rank has written its share by now."""
        if self._pending is None or dist.any_rank(self._pending.thread.is_alive(), self._engine.device):
            return None
        return self._finish(self._pending, time.monotonic())

    def wait(self) -> SaveOutcome | None:
        """Block until the save under way, if any, has ended."""
        if self._pending is None:
            return None
        stopped_from_s = time.monotonic()
        if self._pending.thread.ident is not None:
            self._pending.thread.join()
        return self._finish(self._pending, stopped_from_s)

    def _check_finite(self, step: int) -> None:
        names = dist.gather_json(self._engine.not_finite(), self._engine.device)
        if name := next(filter(None, names), None):
            raise DivergedRunError(
                f"after step {step} the weights of {name} are not finite (NaN or infinite): no checkpoint of them is written, "
                f"and those in {self._directory} stay. Lower optimizer.lr and start again, with --allow-change to continue "
                "from the newest of them or in another --run-dir"
            )

    def check_failed_saves(self, failed: SaveOutcome) -> None:
        """After so many failed saves in a row nothing that is trained would be kept: a `UserError`, on all ranks."""
        if self._failures >= self._keeping.max_failed_saves:
            raise UserError(
                f"{self._failures} saves in a row have failed (checkpoint.max_failed_saves), the last one of step "
                f"{failed.step}: {failed.problem}. Older checkpoints are as they were. Let {self._directory} be written to, "
                "with room for one checkpoint more, then start the same command again"
            )

    def _partial(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.{self._token}.tmp"

    def _snapshot_bytes(self) -> int:
        return sum(4 * len(KINDS) * fragment.numel for fragment in self._engine.fragments())

    def _copies(self, kind: str) -> dict[str, torch.Tensor]:
        """This rank's fragments of one kind, copied to the CPU: "parameter:start" -> flat fp32."""
        engine = self._engine
        return {
            f"{f.name}:{f.start}": (f.view(f.buffer) if kind == "weight" else engine.moment(f, kind)).to(
                "cpu", copy=True
            )
            for f in engine.fragments()
        }

    def _write(
        self, partial: Path, of_kind: Callable[[str], dict[str, torch.Tensor]], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """This rank's files, synced; name -> size and sha256."""
        entries = {}
        for kind in KINDS:
            name = f"{kind}-{self._rank:05d}-of-{self._world_size:05d}.safetensors"
            save_tensors(of_kind(kind), partial / name)
            entries[name] = fsync_and_hash(partial / name)
        if self._rank == 0:
            (partial / "state.json").write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
            entries |= {
                "state.json": fsync_and_hash(partial / "state.json"),
                UNTRAINED_FILE: _write_untrained(partial, self._carried, self._keeping),
            }
        return entries

    def _finish(self, pending: _Pending, stopped_from_s: float) -> SaveOutcome:
        """All ranks report; rank 0 commits if none failed."""
        self._pending = None
        partial = self._partial(pending.step)
        reports = dist.gather_json([pending.problem, pending.files], self._engine.device)
        problems = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(reports) if problem]
        if not problems and self._rank == 0:
            files = {name: entry for _, entries in reports for name, entry in entries.items()}
            problem = _attempt(lambda: commit(partial, checkpoint_path(self._directory, pending.step), files))
            problems = [f"rank 0: {problem}"] if problem else []
        problems = dist.broadcast_json(problems, self._engine.device)
        if problems and self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self._failures = self._failures + 1 if problems else 0
        now_s = time.monotonic()
        stopped_s = pending.stopped_s + now_s - stopped_from_s
        return SaveOutcome(pending.step, "; ".join(problems) or None, now_s - pending.began_s, stopped_s)


def _attempt(action: Callable[[], object]) -> str | None:
    """What kept `action` from its end. Of whatever kind: this save has failed on all ranks, and the run goes on."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _start(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_untrained(partial: Path, untrained: Mapping[str, torch.Tensor], keeping: CheckpointConfig) -> dict[str, Any]:
    """The weights that training never touches: linked from an earlier checkpoint where that leaves two copies.

    They never change within a run and can be most of a checkpoint (390 of 500 MB in the quickstart). Two files take
    turns, so that the newest checkpoint and the one that stays beside it never depend on the same bytes on disk.
    """
    step = int(partial.name.split(".")[0].removeprefix("step-"))
    earlier = [other for other in committed_steps(partial.parent) if other < step]
    source = _source_of_link(partial.parent, earlier, step, keeping)
    entry = _linked(source, partial) if source else None
    if entry is not None:
        return entry
    save_tensors(dict(untrained), partial / UNTRAINED_FILE)
    return fsync_and_hash(partial / UNTRAINED_FILE)


def _source_of_link(directory: Path, earlier: list[int], step: int, keeping: CheckpointConfig) -> Path | None:
    """The newest checkpoint whose copy is another one than that of the checkpoint which will stay beside `step`."""
    beside = [other for other in kept_steps([*earlier, step], keeping) if other < step]
    if not beside:
        return None
    copy = checkpoint_path(directory, beside[-1]) / UNTRAINED_FILE
    others = (checkpoint_path(directory, other) for other in reversed(earlier))
    return next((other for other in others if not _same_copy(other / UNTRAINED_FILE, copy)), None)


def _same_copy(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is gone: not to be linked from
        return True


def _linked(source: Path, partial: Path) -> dict[str, Any] | None:
    """Link the carried weights of a checkpoint, if they are whole and the file system has links; their entry."""
    try:
        entry = json.loads((source / "manifest.json").read_text(encoding="utf-8"))["files"][UNTRAINED_FILE]
        if file_corruption(source / UNTRAINED_FILE, entry) is not None:
            return None
        os.link(source / UNTRAINED_FILE, partial / UNTRAINED_FILE)
    except (OSError, ValueError, KeyError, TypeError):  # UnreadableError too: a copy of our own is written instead
        return None
    return entry
