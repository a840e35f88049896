"""Before step 1: will this run be able to save, do all ranks agree on what they run, is anything in the way.

In: the run directory, the size of a checkpoint, fingerprints of every rank. Out: nothing, or a `UserError` that names
the rank or the file and the mend. Used by trainer.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from data_prep.command_line import module_command
from data_prep.durable_files import sync, unique_name
from data_prep.shards import Shard, read_again
from pipeline.errors import UserError
from pipeline.runtime import dist
from pipeline.runtime.noncritical_files import make_way_for_file

STALE_LOCK_AGE_S = 600.0
HASH_BLOCK_BYTES = 4 << 20
SHARED_PATIENCE_S = 10.0  # a network file system may show another node's file a little later


def check_run_dir(run_dir: Path) -> None:
    """A file can be written, synced and renamed there."""
    probe, renamed = (unique_name(run_dir / "preflight", suffix) for suffix in (".tmp", ".renamed"))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(probe, "w") as file:
            file.write("x")
            file.flush()
            os.fsync(file.fileno())
        probe.rename(renamed)
        renamed.unlink()
    except OSError as error:
        raise UserError(f"the run directory {run_dir} cannot be written to ({error}); take another --run-dir") from None


def check_disk(run_dir: Path, checkpoint_bytes: int, num_checkpoints: int, num_present: int) -> None:
    """Room for the checkpoints that will stay, and one more while it is written."""
    needed = checkpoint_bytes * max(1, num_checkpoints + 1 - num_present)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"{run_dir} has {free / 2**30:.1f} GiB free; {num_checkpoints} checkpoints and the one being written take "
            f"{needed / 2**30:.1f} GiB more. Free space, lower checkpoint.keep, or take a --run-dir on another disk"
        )


def milestones_warning(run_dir: Path, checkpoint_bytes: int, num_milestones: int) -> str | None:
    """Milestones come over weeks and may be moved away meanwhile: too little room for them all is no refusal."""
    needed, free = checkpoint_bytes * num_milestones, shutil.disk_usage(run_dir).free
    if free >= needed:
        return None
    return (
        f"the {num_milestones} milestones still to come (checkpoint.keep_every) take up to {needed / 2**30:.1f} GiB, "
        f"{run_dir} has {free / 2**30:.1f} GiB free. Raise checkpoint.keep_every, or move milestones away in time"
    )


def problem_on_disk(
    run_dir: Path, checkpoint_bytes: int, num_checkpoints: int, num_present: int, num_milestones: int
) -> str | None:
    """What keeps rank 0 from saving here, for all ranks to know; warns of what may be in the way."""
    try:
        check_run_dir(run_dir)
        check_disk(run_dir, checkpoint_bytes, num_checkpoints, num_present)
    except UserError as error:
        return str(error)
    if warning := milestones_warning(run_dir, checkpoint_bytes, num_milestones):
        print(f"warning: {warning}", flush=True)
    for lock in stale_build_locks():
        print(f"warning: a killed compilation left a lock; if a start hangs: rm {shlex.quote(str(lock))}", flush=True)
    return None


def check_shared(run_dir: Path, launch: dist.Launch) -> None:
    """All ranks must mean the same directory: what rank 0 writes into it, every one of them finds there."""
    name = dist.broadcast_json(f".shared-{secrets.token_hex(8)}", launch.device)  # new: no node remembers it as missing
    token = run_dir / name
    if launch.is_main:
        with contextlib.suppress(OSError):  # then not even rank 0 finds it
            token.touch()
    dist.barrier()
    deadline = time.monotonic() + SHARED_PATIENCE_S
    while not (found := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = dist.gather_json([socket.gethostname(), found], launch.device)
    if launch.is_main:
        token.unlink(missing_ok=True)
    if blind := sorted({host for host, found in ranks if not found}):
        raise UserError(
            f"{run_dir} is not one directory for all ranks: what rank 0 writes there on {ranks[0][0]} is not found on "
            f"{', '.join(blind)}. Take a --run-dir on a file system that all nodes share"
        )


def ensure_run_dir(run_dir: Path) -> None:
    """Make `checkpoints/`, and let a power failure take neither its name nor those of the directories above it."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    for directory in (run_dir, *run_dir.absolute().parents[:2]):
        with contextlib.suppress(OSError):  # one that may be entered but not read
            sync(directory)


def remove_markers(run_dir: Path) -> None:
    """Markers of how an earlier start ended."""
    for marker in ("DONE", "PREEMPTED", "FAILED"):
        with contextlib.suppress(OSError):
            make_way_for_file(run_dir / marker)
            (run_dir / marker).unlink(missing_ok=True)


def agree(facts: dict[str, Any], launch: dist.Launch) -> None:
    """A `UserError` on every rank where one of them has other facts. Only hashes travel while all have the same."""
    text = json.dumps(facts, sort_keys=True)
    if len(set(dist.gather_json(hashlib.sha256(text.encode()).hexdigest(), launch.device))) > 1:
        hosts = dist.gather_json(socket.gethostname(), launch.device)
        check_agreement(dist.gather_json(facts, launch.device), hosts)


def check_agreement(facts_by_rank: Sequence[dict[str, Any]], hosts: Sequence[str] = ()) -> None:
    """Every rank runs the same code and libraries with the same recipe on the same data."""
    first = facts_by_rank[0]
    names = dict.fromkeys(name for facts in facts_by_rank for name in facts)  # in their order: causes before effects
    for name in names:
        differing = [rank for rank, facts in enumerate(facts_by_rank) if facts.get(name) != first.get(name)]
        if differing:
            rank = differing[0]
            on, on_first = (f" on {hosts[number]}" if hosts else "" for number in (rank, 0))
            more = f", as {len(differing) - 1} more rank(s) have" if len(differing) > 1 else ""
            raise UserError(
                f"rank {rank} has another {name} than rank 0 ({facts_by_rank[rank].get(name)}{on} instead of "
                f"{first.get(name)}{on_first}){more}. {_how_to_agree(name)}"
            )


def _how_to_agree(name: str) -> str:
    if "precision" in name:
        return (
            "Their devices cannot do the same. Take nodes of one kind, or write a precision that all have: in the DeepSpeed "
            "JSON for the student, `teacher_options.dtype` for the teacher"
        )
    return (
        "Is every node on the same commit with the same changes and the same installed packages, and are recipe, DeepSpeed "
        "JSON, teacher and shards the same files everywhere?"
    )


def my_share(shards: Sequence[Shard], launch: dist.Launch) -> Sequence[Shard]:
    """The files that this rank verifies. Ranks that see the same files, on one host, share them; every other copy is
    read as a whole: what is right on one node's disk says nothing about another's."""
    copies = dist.gather_json(_copy_identity(shards), launch.device)
    sharers = [rank for rank, copy in enumerate(copies) if copy == copies[launch.rank]]
    return shards[sharers.index(launch.rank) :: len(sharers)]


def _copy_identity(shards: Iterable[Shard]) -> str:
    """Names the very files: host, device and inode of each. Two mounts on one host are two copies."""
    digest = hashlib.sha256(f"{socket.gethostname()} {_boot_id()}".encode())
    for shard in shards:
        about = shard.path.stat()
        digest.update(f" {about.st_dev}:{about.st_ino}".encode())
    return digest.hexdigest()


def _boot_id() -> str:
    """Two nodes cloned from one image may have one name; they were not booted as one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


def corrupt_shards(shards: Iterable[Shard], progress: Callable[[], None]) -> list[str]:
    """Shard files that are not what the manifest's hash says: every byte is read."""

    def digest_of(path: Path) -> str:
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
                progress()
        return digest.hexdigest()

    return [
        str(shard.path) for shard in shards if read_again(shard.path, partial(digest_of, shard.path)) != shard.xxh3_128
    ]


def check_problems(found_by_rank: Sequence[dict[str, Any]], data: str) -> None:
    """Every rank raises the same error, so that none is left waiting for the others."""
    for found in found_by_rank:
        if found["problem"]:
            raise UserError(found["problem"])
    damaged = list(dict.fromkeys(path for found in found_by_rank for path in found["shards"]))
    if damaged:
        hosts = sorted({found["host"] for found in found_by_rank if found["shards"]})
        raise UserError(
            f"{', '.join(damaged[:3])}{' and others' if len(damaged) > 3 else ''}: damaged (on {', '.join(hosts)}), the hash is not the "
            f"manifest's. `{module_command('data_prep', 'verify', data)}` says where; copy the files again or prepare them again"
        )


def stale_build_locks() -> list[Path]:
    """Locks that a killed compilation left in torch's extension cache: a later compilation would wait for them for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    locks = root.rglob("lock") if root.is_dir() else iter(())
    return [lock for lock in locks if time.time() - lock.stat().st_mtime > STALE_LOCK_AGE_S]


def nearest_directory(path: Path) -> Path:
    """`path` itself or the nearest directory above it that exists."""
    return next(directory for directory in (path, *path.absolute().parents) if directory.is_dir())


@contextlib.contextmanager
def without_trace(run_dir: Path) -> Iterator[None]:
    """Remove the directories that the block makes on the way to `run_dir`, unless they hold files."""
    new = [directory for directory in (run_dir, *run_dir.absolute().parents) if not directory.exists()]
    try:
        yield
    finally:
        for directory in new:
            with contextlib.suppress(OSError):
                directory.rmdir()
