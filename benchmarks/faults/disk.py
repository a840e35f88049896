"""Figure 8: the disk is full, at every point where a save writes, and for real."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.faults.lab import Lab, Outcome, newest_step, same_end, same_student, wait_until
from pipeline.runtime.checkpoint_files import committed_steps, corruption
from tests.dist.fork_server import ForkServer
from tests.dist.runs import end_group

SETTINGS = {"steps": 8, "save_every": 2, "eval_every": 8}
FULL_AT = 6  # the third of four saves; by then there are checkpoints to keep, to link from and to prune
# (rank, operation, n-th call): ENOSPC there. fsync is where a full disk often shows only.
CALLS = [(0, "mkdir", 1), (0, "link", 1), (0, "rename", 1)]
CALLS += [(0, "fsync", call) for call in range(1, 8)] + [(1, "fsync", call) for call in (1, 2, 3)]
FILE_SIZES = (0, 100, 4_000, 20_000, 30_000)  # bytes at which the kernel refuses to let a file grow
AFTER_RENAME = ("fsync", 7)  # the parent's entry: the checkpoint has its name by then
TMPFS = ["unshare", "--user", "--map-root-user", "--mount"]
TMPFS_BYTES = 32 << 20


def full_disks(lab: Lab, quick: bool) -> Outcome:
    """Every point on either rank by an injected error, file sizes by the kernel, and a file system that is full."""
    calls = [{"kind": "at call", "rank": r, "operation": o, "call": c, "error": errno.ENOSPC} for r, o, c in CALLS]
    sizes = [{"kind": "file size", "rank": rank, "bytes": size} for rank in (0, 1) for size in FILE_SIZES]
    faults = calls[::5] + sizes[2::5] if quick else calls + sizes
    kept = [_full_at(lab, fault) for fault in faults]
    real = _on_a_full_file_system(lab)
    measured = f"{len(faults)} points of a save on either of two ranks: the run goes on, ends bit for bit as untouched"
    return Outcome(
        "disk full at each write point: previous checkpoint whole, nothing left over, the run goes on",
        len(faults) + (real is not None),
        sum(kept) + bool(real),
        measured + ("" if real is None else ", and a file system of 32 MiB that was full through a save"),
        "the cut file keeps its name and `latest` may point at it",
    )


def _full_at(lab: Lab, fault: dict[str, Any]) -> bool:
    """One save meets a full disk. The run must warn, keep what it had, go on, and end as if nothing had been."""
    run_dir = lab.fresh("full")
    settings = {**SETTINGS, "checkpoint.keep": 3}
    code = lab.live(run_dir, 2, settings, faults=[{**fault, "save": FULL_AT}])
    steps = committed_steps(run_dir / "checkpoints")
    whole = all(corruption(run_dir / "checkpoints" / f"step-{step:08d}") is None for step in steps)
    leftovers = list((run_dir / "checkpoints").glob("*.tmp"))
    warned = "warning: checkpoint of step 6 not written" in run_dir.with_suffix(".log").read_text()
    spared = fault.get("operation") == "link"  # no link: the file is written once more, and the save succeeds
    expected = [4, 6, 8] if spared else [2, 4, 8]
    named = (fault.get("operation"), fault.get("call")) == AFTER_RENAME
    as_expected = (warned != spared and steps == expected) or (named and FULL_AT in steps)
    same = same_end(run_dir, lab.untouched(2, settings))
    return code == 0 and whole and not leftovers and as_expected and same


# -- a real one


def _on_a_full_file_system(lab: Lab) -> bool | None:
    """The same inside a small tmpfs, in a mount namespace of its own; None where the system has none to give."""
    if not shutil.which("unshare") or subprocess.run([*TMPFS, "true"], capture_output=True).returncode:
        return None
    with tempfile.TemporaryDirectory() as mount:
        script = f'mount -t tmpfs -o size={TMPFS_BYTES} none "$1" && shift && exec "$@"'
        command = [*TMPFS, "sh", "-c", script, "sh", mount, sys.executable, "-m", "benchmarks.faults.disk"]
        done = subprocess.run([*command, mount, str(lab.recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["kept"]


def main(mount: Path, recipe: Path) -> None:
    """In the namespace: fill the file system under a running run, wait for a save to fail, make room, let it end."""
    settings = {"steps": 120, "save_every": 10, "eval_every": 120}
    pause = [{"kind": "pause", "seconds": 0.03}]
    with tempfile.TemporaryDirectory() as elsewhere, ForkServer() as server:
        roomy, tight = Lab(Path(elsewhere), server, recipe), Lab(mount, server, recipe)
        run_dir, ballast = mount / "run", mount / "ballast"
        log = run_dir.with_suffix(".log")
        job = tight.begin(run_dir, 2, settings, faults=pause)
        try:
            assert wait_until(lambda: newest_step(run_dir) >= 10), log.read_text()
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            assert shutil.disk_usage(mount).free == 0
            failed = wait_until(lambda: "not written, going on" in log.read_text() or job.poll() is not None, 60)
            held = newest_step(run_dir)
            ballast.unlink()
            code = job.wait(120)
        finally:
            end_group(job)
        whole = roomy.untouched(2, settings, faults=pause)
        same = same_student(run_dir, whole)  # not the curves: they lack what found no room
        kept = code == 0 and failed and held >= 10 and same

        print(json.dumps({"kept": kept, "code": code, "failed": failed, "held": held}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
