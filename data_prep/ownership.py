"""One writer per directory: a lock file that names its owner, for run, export, evaluation and shard directories.

In: the path of a lock file. Out: `Ownership`, held until `release` or the end of the process; `Taken` names the process
that has it and since when. The lock is `flock` where the file system has it for all its clients. Elsewhere (NFS without
locks, Lustre's `localflock`) it is the file itself: its owner touches it every few seconds, and an owner that is dead, or
has not touched it for a while, loses it. Time is always the file's own, so no clock of any machine matters.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.durable_files import replace_file, unique_name
from data_prep.shards import DataError

HEARTBEAT_S = 5.0
PATIENCE_S = 45.0  # an owner elsewhere that has not touched its file for so long is dead
SETTLE_S = 1.0  # two that take over a dead owner's file at once: the later one stays, and both look again after this
POLL_S = 0.2
EXIT_LOST = 2
_NODE_LOCAL = {"localflock", "nolock", "local_lock=flock", "local_lock=all"}  # mount options: other nodes do not see it


class Taken(DataError):
    """Another process owns the directory."""


@dataclass
class Owner:
    """A process for good: its number, when it started, on which machine, and what it said it does."""

    host: str
    pid: int
    started: int  # clock ticks since the machine's boot
    machine: str  # boot and process namespace: where the number means something
    since: str
    job: str = ""  # Slurm's number of the job and how often it was requeued
    by_flock: bool = True
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def myself(cls) -> Owner:
        job = os.environ.get("SLURM_JOB_ID", "")
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, start_ticks(pid) or 0, _machine(), since, job and f"{job}.{restarts}")

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Whoever the file names; None where it is gone, or empty as between its making and its first line."""
        try:
            text = path.read_bytes().strip(b"\0 \n")
        except FileNotFoundError:
            return None
        if not text:
            return None
        try:
            return cls(**json.loads(text)["owner"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path} is not a lock of this program. Move it away, or write to another directory."
            ) from None

    def text(self) -> bytes:
        return json.dumps({"owner": vars(self)}).encode() + b"\n"

    def is_dead(self) -> bool | None:
        """True or False where that can be known from here, else None."""
        job, _, restarts = self.job.rpartition(".")
        mine, _, my_restarts = Owner.myself().job.rpartition(".")
        if job and job == mine and restarts != my_restarts:
            return True  # Slurm begins a job again only after all of it has ended
        if self.machine != _machine():
            return None
        return start_ticks(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def start_ticks(pid: int) -> int | None:
    """When a process started; None where there is none, or only what its parent has not collected yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


class Ownership:
    """A lock that this process holds. `on_loss` is called where another process has taken it over meanwhile."""

    def __init__(self, path: Path, me: Owner, descriptor: int, on_loss: Callable[[Path], None] | None = None) -> None:
        self.path, self._me, self._descriptor = path, me, descriptor
        self._on_loss = on_loss or _end_process
        self._pid = os.getpid()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the file and let go. A fork of the owner releases nothing."""
        if self._released.is_set() or self._pid != os.getpid():
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError, DataError):
            if self._is_mine():
                self.path.unlink()
        os.close(self._descriptor)

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, DataError):  # a file system that is away for a while
                if self._is_mine():
                    os.utime(self.path)
                elif not self._released.is_set():
                    self._on_loss(self.path)
                    return

    def _is_mine(self) -> bool:
        owner = Owner.read(self.path)
        return owner is None or owner.token == self._me.token


def _end_process(path: Path) -> None:
    """Two writers must not be: whoever stood still for so long that another took over writes nothing more."""
    print(
        f"error: {path} now belongs to another process, which found this one silent for {PATIENCE_S:.0f} s. Ended.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)


def own(path: Path, what: str) -> Ownership:
    """Take the lock file `path`, whose directory exists. `what` is what is owned, for the message of `Taken`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        has_flock = _flock(descriptor, path, what)
        if not _is_still(path, descriptor):  # its last holder removed it meanwhile
            os.close(descriptor)
            descriptor = -1
            return own(path, what)
        me = Owner.myself()
        me.by_flock = has_flock
        before = Owner.read(path)
        if before is not None and not (has_flock and before.by_flock):
            _wait_for_the_dead(path, before, what)
        if has_flock:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, me.text(), 0)
        else:
            _write_and_look_again(path, me, what)
        return Ownership(path, me, descriptor)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise


def own_when_free(path: Path, what: str) -> Ownership:
    """The same, waiting for whoever has it: for what takes a moment."""
    while True:
        with contextlib.suppress(Taken):
            return own(path, what)
        time.sleep(POLL_S / 4)


@contextlib.contextmanager
def owned_directory(directory: Path, what: str) -> Iterator[None]:
    """Own `directory`, made if need be, by a file in it; it goes again where it is still empty at the end."""
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with own(directory / LOCK_NAME, what):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


LOCK_NAME = ".owner.lock"


def lock_beside(path: Path) -> Path:
    """The lock file of a directory that is replaced as a whole."""
    path = path.absolute()
    return path.with_name(f".{path.name}.owner.lock")


def _flock(descriptor: int, path: Path, what: str) -> bool:
    """True when the lock is held, False where the file system has none that all its clients see."""
    if _is_node_local(path):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(what, Owner.read(path)) from None
    except OSError:
        return False
    return True


def _taken(what: str, owner: Owner | None) -> Taken:
    return Taken(f"{what} is in use by {owner or 'another process'}. Wait for it, or stop it first.")


def _is_node_local(path: Path) -> bool:
    """Whether the mount's options keep locks to this node."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    real = os.path.realpath(path)
    above = [mount for mount in mounts if os.path.commonpath([real, _unescaped(mount[1])]) == _unescaped(mount[1])]
    options = max(above, key=lambda mount: len(mount[1]))[3].split(",") if above else []
    return not _NODE_LOCAL.isdisjoint(options)


def _unescaped(mount_point: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount_point)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _wait_for_the_dead(path: Path, owner: Owner, what: str) -> None:
    """Return when the owner is known to be dead; `Taken` as soon as it is known to live."""
    dead = owner.is_dead()
    if dead:
        return
    if dead is False:
        raise _taken(what, owner)
    if _age_s(path) > PATIENCE_S:
        return
    first, deadline = _touched(path), time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if _touched(path) != first:
            raise _taken(what, owner)
        time.sleep(POLL_S)


def _touched(path: Path) -> int:
    """When the file was last touched, asked anew: opening is what makes a network file system look."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:  # released
        return -1


def _age_s(path: Path) -> float:
    """Time since the last touch, both ends by the clock of the file system."""
    probe = unique_name(path, ".probe")
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - _touched(path)) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _write_and_look_again(path: Path, me: Owner, what: str) -> None:
    """Without flock: the last one to put its name there has it, and the others find that out."""
    replace_file(path, me.text())
    time.sleep(SETTLE_S)
    now = Owner.read(path)
    if now is None or now.token != me.token:
        raise _taken(what, now)
