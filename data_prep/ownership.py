"""One writer per directory: a lock file that names its owner, for run, export, evaluation and shard directories.

In: the path of a lock file. Out: an `Ownership`, held until `release` or the end of the process, or an `InUseError` that names
the owner. The lock is `flock` if the file system shares it between all its clients. Otherwise (NFS without locks, Lustre's
`localflock`) it is the file itself: its owner touches it every few seconds, and loses it when it is dead or has not touched it
for `PATIENCE_S`. Ages are differences of the file system's own times, so the clocks of the machines do not matter.
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
PATIENCE_S = 45.0  # an owner on another machine that has not touched its file for this time is considered dead
RECHECK_S = 1.0  # if two processes take over a dead owner's file, the later one wins; both check after this time
POLL_S = 0.2
EXIT_LOST = 2
_NODE_LOCAL = {
    "localflock",
    "nolock",
    "local_lock=flock",
    "local_lock=all",
}  # mount options: other nodes do not see the lock


class InUseError(DataError):
    """Another process owns the directory."""


@dataclass
class Owner:
    """A process, identified uniquely by its number, its start time and its machine."""

    host: str
    pid: int
    started: int  # clock ticks since the machine's boot
    machine: str  # host, boot and process namespace, within which `pid` is unique
    since: str
    job: str = ""  # Slurm's job number and the number of its restarts
    by_flock: bool = True
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def myself(cls) -> Owner:
        """This process."""
        job = os.environ.get("SLURM_JOB_ID", "")
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, start_ticks(pid) or 0, _machine(), since, job and f"{job}.{restarts}")

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """The owner that the file names; None if the file is missing, or empty because it was just created."""
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
                f"{path} is not a lock file of this program. Move it away, or write to another directory."
            ) from None

    def text(self) -> bytes:
        """The content of the lock file."""
        return json.dumps({"owner": vars(self)}).encode() + b"\n"

    def is_dead(self) -> bool | None:
        """Whether the process has ended; None if this machine cannot tell."""
        job, _, restarts = self.job.rpartition(".")
        mine, _, my_restarts = Owner.myself().job.rpartition(".")
        if job and job == mine and restarts != my_restarts:
            return True  # Slurm restarts a job only after all its processes have ended
        if self.machine != _machine():
            return None
        return start_ticks(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def start_ticks(pid: int) -> int | None:
    """Start time of a process, in clock ticks since boot; None if there is no such process or it is a zombie."""
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
    """A lock that this process holds.

    Args:
        path: the lock file.
        me: this process.
        descriptor: the open lock file.
        on_loss: is called if another process has taken the lock over; by default it ends this process.
    """

    def __init__(self, path: Path, me: Owner, descriptor: int, on_loss: Callable[[Path], None] | None = None) -> None:
        self.path, self._me, self._descriptor = path, me, descriptor
        self._on_loss = on_loss or _end_process
        self._pid = os.getpid()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the file and release the lock. A fork of the owner releases nothing."""
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
            with contextlib.suppress(OSError, DataError):  # the file system may be unreachable for a while
                if self._is_mine():
                    os.utime(self.path)
                elif not self._released.is_set():
                    self._on_loss(self.path)
                    return

    def _is_mine(self) -> bool:
        owner = Owner.read(self.path)
        return owner is None or owner.token == self._me.token


def _end_process(path: Path) -> None:
    """End this process: another one has taken the directory over, and there must not be two writers."""
    print(
        f"error: {path} now belongs to another process, because this one did not touch it for {PATIENCE_S:.0f} s. Stopped.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)


def own(path: Path, what: str) -> Ownership:
    """Acquire a lock.

    Args:
        path: the lock file. Its directory exists.
        what: what is owned, for messages.

    Raises:
        InUseError: another process owns it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        has_flock = _flock(descriptor, path, what)
        if not _is_same_file(path, descriptor):  # its last owner has removed it meanwhile
            os.close(descriptor)
            descriptor = -1
            return own(path, what)
        me = Owner.myself()
        me.by_flock = has_flock
        before = Owner.read(path)
        if before is not None and not (has_flock and before.by_flock):
            _wait_until_dead(path, before, what)
        if has_flock:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, me.text(), 0)
        else:
            _write_and_recheck(path, me, what)
        return Ownership(path, me, descriptor)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise


def own_when_free(path: Path, what: str) -> Ownership:
    """As `own`, but wait while another process owns it. For work of a moment."""
    while True:
        with contextlib.suppress(InUseError):
            return own(path, what)
        time.sleep(POLL_S / 4)


@contextlib.contextmanager
def owned_directory(directory: Path, what: str) -> Iterator[None]:
    """Own `directory` by a lock file in it. The directory is created if necessary, and removed if it is empty at the end."""
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


def sibling_lock(path: Path) -> Path:
    """The lock file for a path that is itself replaced by renaming, in the directory of that path."""
    path = path.absolute()
    return path.with_name(f".{path.name}.owner.lock")


def _flock(descriptor: int, path: Path, what: str) -> bool:
    """Whether the lock was acquired; False if the file system has no lock that all its clients see."""
    if _is_node_local(path):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(what, Owner.read(path)) from None
    except OSError:
        return False
    return True


def _in_use(what: str, owner: Owner | None) -> InUseError:
    return InUseError(f"{what} is in use by {owner or 'another process'}. Wait for it, or stop it first.")


def _is_node_local(path: Path) -> bool:
    """Whether the mount options make locks visible to this node only."""
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


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _wait_until_dead(path: Path, owner: Owner, what: str) -> None:
    """Return when the owner is known to be dead. Raise `InUseError` as soon as it is known to be alive."""
    is_dead = owner.is_dead()
    if is_dead:
        return
    if is_dead is False:
        raise _in_use(what, owner)
    if _age_s(path) > PATIENCE_S:
        return
    first, deadline = _touched(path), time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if _touched(path) != first:
            raise _in_use(what, owner)
        time.sleep(POLL_S)


def _touched(path: Path) -> int:
    """Time of the last touch in ns, or -1 if the file was removed. Opening makes a network file system ask its server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return -1


def _age_s(path: Path) -> float:
    """Seconds since the last touch, by the clock of the file system."""
    probe = unique_name(path, ".probe")
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - _touched(path)) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _write_and_recheck(path: Path, me: Owner, what: str) -> None:
    """Acquire the lock without flock: the last process that writes its name owns it, and the others notice."""
    replace_file(path, me.text())
    time.sleep(RECHECK_S)
    now = Owner.read(path)
    if now is None or now.token != me.token:
        raise _in_use(what, now)
