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

from pipeline.runtime.checkpoint import committed_steps, damage
from tests.dist.fork_server import ForkServer
from tests.dist.runs import end_group
from tests.faults.sweeps.lab import Lab, Outcome, newest_step, same_end, same_student, wait_until

SETTINGS = {"steps": 8, "save_every": 2, "eval_every": 8}
FULL_AT = 6  # the third of four saves; by then there are checkpoints to keep, to link from and to prune
# (rank, operation, number of the call): ENOSPC there. A full disk often shows only in fsync.
CALLS = [(0, "mkdir", 1), (0, "link", 1), (0, "rename", 1)]
CALLS += [(0, "fsync", call) for call in range(1, 8)] + [(1, "fsync", call) for call in (1, 2, 3)]
FILE_SIZES = (0, 100, 4_000, 20_000, 30_000)  # bytes past which the kernel lets no file grow
AFTER_RENAME = ("fsync", 7)  # the parent's entry: the checkpoint has its name by then
TMPFS = ["unshare", "--user", "--map-root-user", "--mount"]
TMPFS_BYTES = 32 << 20


def full_disks(lab: Lab, quick: bool) -> Outcome:
    """Injected errors at every point of a save on either rank, limits of the file size, and a file system that is full."""
    calls = [{"kind": "at call", "rank": r, "operation": o, "call": c, "error": errno.ENOSPC} for r, o, c in CALLS]
    sizes = [{"kind": "file size", "rank": rank, "bytes": size} for rank in (0, 1) for size in FILE_SIZES]
    faults = calls[::5] + sizes[2::5] if quick else calls + sizes
    kept = [_full_at(lab, fault) for fault in faults]
    real = _on_a_full_file_system(lab)
    measured = f"{len(faults)} points of a save on either of two ranks: the run continues and ends bit for bit as without faults"
    return Outcome(
        "disk full at each write point: previous checkpoint valid, nothing left over, the run continues",
        len(faults) + (real is not None),
        sum(kept) + bool(real),
        measured + ("" if real is None else ", and a file system of 32 MiB that was full through a save"),
        "the cut file keeps its name and `latest` may point at it",
    )


def _full_at(lab: Lab, fault: dict[str, Any]) -> bool:
    """One save meets a full disk. The run must warn, keep its checkpoints, continue, and end as without the fault."""
    run_dir = lab.fresh("full")
    settings = {**SETTINGS, "checkpoint.keep": 3}
    code = lab.run(run_dir, 2, settings, faults=[{**fault, "save": FULL_AT}])
    steps = committed_steps(run_dir / "checkpoints")
    valid = all(damage(run_dir / "checkpoints" / f"step-{step:08d}") is None for step in steps)
    leftovers = list((run_dir / "checkpoints").glob("*.tmp"))
    warned = "warning: checkpoint of step 6 not written" in run_dir.with_suffix(".log").read_text()
    spared = fault.get("operation") == "link"  # without links the file is written again, and the save succeeds
    expected = [4, 6, 8] if spared else [2, 4, 8]
    named = (fault.get("operation"), fault.get("call")) == AFTER_RENAME
    as_expected = (warned != spared and steps == expected) or (named and FULL_AT in steps)
    same = same_end(run_dir, lab.untouched(2, settings))
    return code == 0 and valid and not leftovers and as_expected and same


# -- a real full file system


def _on_a_full_file_system(lab: Lab) -> bool | None:
    """The same inside a small tmpfs in its own mount namespace; None where the system allows none."""
    if not shutil.which("unshare") or subprocess.run([*TMPFS, "true"], capture_output=True).returncode:
        return None
    with tempfile.TemporaryDirectory() as mount:
        script = f'mount -t tmpfs -o size={TMPFS_BYTES} none "$1" && shift && exec "$@"'
        command = [*TMPFS, "sh", "-c", script, "sh", mount, sys.executable, "-m", "tests.faults.sweeps.disk"]
        done = subprocess.run([*command, mount, str(lab.recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["kept"]


def main(mount: Path, recipe: Path) -> None:
    """In the namespace: fill the file system of a running run, wait for a save to fail, free space, let the run end."""
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
            failed = wait_until(lambda: "not written" in log.read_text() or job.poll() is not None, 60)
            held = newest_step(run_dir)
            ballast.unlink()
            code = job.wait(120)
        finally:
            end_group(job)
        undisturbed = roomy.untouched(2, settings, faults=pause)
        same = same_student(run_dir, undisturbed)  # not the curves: points are missing that did not fit on the disk
        kept = code == 0 and failed and held >= 10 and same

        print(json.dumps({"kept": kept, "code": code, "failed": failed, "held": held}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
