"""Checks before step 1: can this run save, do all ranks run the same thing, are the shards valid.

In: the run directory, the size of a checkpoint, facts about every rank. Out: nothing, or a `UserError` that names the rank or
the file and the fix.
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

from data_prep.command_line import module_command
from data_prep.durable_files import sync, unique_name
from data_prep.file_hashes import xxh3_128_of_file
from data_prep.shards import Shard, read_again
from pipeline.errors import UserError
from pipeline.runtime import dist
from pipeline.runtime.noncritical_files import make_way_for_file
from pipeline.runtime.run_paths import RunPaths

STALE_LOCK_AGE_S = 600.0
SHARED_PATIENCE_S = 10.0  # a network file system may show another node's file a little later


def nearest_directory(path: Path) -> Path:
    """`path` itself or the nearest directory above it that exists."""
    return next(directory for directory in (path, *path.absolute().parents) if directory.is_dir())


@contextlib.contextmanager
def without_trace(run_dir: Path) -> Iterator[None]:
    """Remove the directories that the block makes on the way to `run_dir`, unless they contain files."""
    new = [directory for directory in (run_dir, *run_dir.absolute().parents) if not directory.exists()]
    try:
        yield
    finally:
        for directory in new:
            with contextlib.suppress(OSError):
                directory.rmdir()


def check_run_dir(run_dir: Path) -> None:
    """Check that a file can be written, synced and renamed in `run_dir`. Raises `UserError`."""
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
        raise UserError(f"the run directory {run_dir} cannot be written to ({error}); use another --run-dir") from None


def check_disk(run_dir: Path, checkpoint_bytes: int, num_checkpoints: int, num_present: int) -> None:
    """Check that there is space for the checkpoints that are kept and for one more while it is written. Raises `UserError`."""
    needed = checkpoint_bytes * max(1, num_checkpoints + 1 - num_present)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"{run_dir} has {free / 2**30:.1f} GiB free; {num_checkpoints} checkpoints and the one being written take "
            f"{needed / 2**30:.1f} GiB more. Free space, lower checkpoint.keep, or use a --run-dir on another disk"
        )


def milestones_warning(run_dir: Path, checkpoint_bytes: int, num_milestones: int) -> str | None:
    """A warning where the disk is too small for all milestones. They are written over weeks and may be moved meanwhile."""
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
    """Why rank 0 cannot save in `run_dir`, or None. Prints warnings about what may cause trouble later."""
    try:
        check_run_dir(run_dir)
        check_disk(run_dir, checkpoint_bytes, num_checkpoints, num_present)
    except (UserError, OSError) as error:  # on rank 0 alone an exception would leave the other ranks waiting
        return str(error)
    if warning := milestones_warning(run_dir, checkpoint_bytes, num_milestones):
        print(f"warning: {warning}", flush=True)
    for lock in stale_build_locks():
        print(f"warning: a killed compilation left a lock; if a start hangs: rm {shlex.quote(str(lock))}", flush=True)
    return None


def check_shared(run_dir: Path, launch: dist.Launch) -> None:
    """Check that `run_dir` is the same directory on all ranks: each must find the file that rank 0 writes into it."""
    name = dist.broadcast_json(f".shared-{secrets.token_hex(8)}")  # a new name: no node has cached it as missing
    token = run_dir / name
    if launch.is_main:
        with contextlib.suppress(OSError):  # then rank 0 does not find it either
            token.touch()
    dist.barrier()
    deadline = time.monotonic() + SHARED_PATIENCE_S
    while not (found := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = dist.gather_json([socket.gethostname(), found])
    if launch.is_main:
        with contextlib.suppress(OSError):
            token.unlink()
    if blind := sorted({host for host, found in ranks if not found}):
        raise UserError(
            f"{run_dir} is not one directory for all ranks: what rank 0 writes there on {ranks[0][0]} is not found on "
            f"{', '.join(blind)}. Use a --run-dir on a file system that all nodes share"
        )


def ensure_run_dir(paths: RunPaths) -> None:
    """Make `checkpoints/`, and sync the directories above it so that their names survive a power failure."""
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    for directory in (paths.directory, *paths.directory.absolute().parents[:2]):
        with contextlib.suppress(OSError):  # a directory without read permission
            sync(directory)


def remove_markers(run_dir: Path) -> None:
    """Remove the marker files of an earlier attempt."""
    for marker in RunPaths(run_dir).end_markers:
        with contextlib.suppress(OSError):
            make_way_for_file(marker)
            marker.unlink(missing_ok=True)


def agree(facts: dict[str, Any]) -> None:
    """Raise a `UserError` on every rank where the facts differ. The facts themselves are sent only if their hashes differ."""
    text = json.dumps(facts, sort_keys=True)
    if len(set(dist.gather_json(hashlib.sha256(text.encode()).hexdigest()))) > 1:
        hosts = dist.gather_json(socket.gethostname())
        check_agreement(dist.gather_json(facts), hosts)


def check_agreement(facts_by_rank: Sequence[dict[str, Any]], hosts: Sequence[str] = ()) -> None:
    """Raise a `UserError` for the first fact that differs between ranks: code, libraries, recipe or data."""
    first = facts_by_rank[0]
    names = dict.fromkeys(name for facts in facts_by_rank for name in facts)  # in this order: causes before effects
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
            "Their devices cannot do the same. Use nodes of one kind, or write a precision that all have: in the DeepSpeed "
            "JSON for the student, `teacher_options.dtype` for the teacher"
        )
    return (
        "Is every node on the same commit with the same changes and the same installed packages, and are recipe, DeepSpeed "
        "JSON, teacher and shards the same files everywhere?"
    )


def my_share(shards: Sequence[Shard], launch: dist.Launch) -> Sequence[Shard]:
    """The shards that this rank verifies.

    Ranks on one host that see the same files divide them. Each other copy is read completely: valid files on one node's disk
    do not show that those on another node's are valid.
    """
    copies = dist.gather_json(_copy_identity(shards))
    sharers = [rank for rank, copy in enumerate(copies) if copy == copies[launch.rank]]
    return shards[sharers.index(launch.rank) :: len(sharers)]


def _copy_identity(shards: Iterable[Shard]) -> str:
    """Identifies the files by host, device and inode. Two mounts on one host are two copies."""
    digest = hashlib.sha256(f"{socket.gethostname()} {_boot_id()}".encode())
    for shard in shards:
        try:
            about = shard.path.stat()
        except OSError:  # its verification says why; until then it counts as a copy of its own
            digest.update(f" {shard.path}".encode())
        else:
            digest.update(f" {about.st_dev}:{about.st_ino}".encode())
    return digest.hexdigest()


def _boot_id() -> str:
    """Differs between two nodes that have the same name because they were cloned from one image."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


def corrupt_shards(shards: Iterable[Shard], progress: Callable[[], None]) -> list[str]:
    """The paths of shards whose content does not have the manifest's hash. `progress` is called after each block."""
    return [
        str(shard.path)
        for shard in shards
        if read_again(shard.path, partial(xxh3_128_of_file, shard.path, progress)) != shard.xxh3_128
    ]


def check_problems(found_by_rank: Sequence[dict[str, Any]], data: str) -> None:
    """Raise the same `UserError` on every rank where one of them found a problem, so that no rank waits for the others.

    Args:
        found_by_rank: per rank "problem" (text or None), "shards" (paths of corrupt ones) and "host"
        data: the directory of the shards
    """
    for found in found_by_rank:
        if found["problem"]:
            raise UserError(found["problem"])
    corrupt = list(dict.fromkeys(path for found in found_by_rank for path in found["shards"]))
    if corrupt:
        hosts = sorted({found["host"] for found in found_by_rank if found["shards"]})
        raise UserError(
            f"{', '.join(corrupt[:3])}{' and others' if len(corrupt) > 3 else ''}: corrupt (on {', '.join(hosts)}), the hash is not "
            f"the manifest's. `{module_command('data_prep', 'verify', data)}` says where; copy the files again or prepare them again"
        )


def stale_build_locks() -> list[Path]:
    """Locks of a killed compilation in torch's extension cache. A later compilation would wait for them indefinitely."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    locks = root.rglob("lock") if root.is_dir() else iter(())
    return [lock for lock in locks if time.time() - lock.stat().st_mtime > STALE_LOCK_AGE_S]
