"""Figure 9: ten thousand tiny steps with every kind of fault, compared with the same steps without faults."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.dist.fork_server import Job
from tests.dist.runs import curve, end_group
from tests.faults.sweeps.lab import Lab, Outcome, newest_step, same_student, steps_done

# As little as a step can be: two ranks, a row of eight tokens each, one layer, one relation.
TINY = {"global_batch": 2, "micro_batch_per_gpu": 1, "seq_len": 8, "heldout_rows": 1, "metrics.log_every": 20}
TINY |= {"relations.heads": 4, "relations.teacher_layer": 1, "relations.pairs": {"v-v": 1.0}, "student.layers": 1}
TINY |= {"guard.hang_timeout_s": 30, "checkpoint.keep": 3}
FAULTS = ("kill", "preempt", "stop file", "kill in a save", "full disk", "full disk")
POISON_EVERY = 997  # steps, in both runs: the loss is NaN on one rank, and all ranks skip the step
SAMPLE_S = 0.5
FLAT_PER_1000_STEPS = {"memory_kib": 1024, "files": 0.1}


def soak(lab: Lab, quick: bool) -> Outcome:
    """Faults at random distances until the run is done. An undisturbed run is watched for leaks."""
    steps, save_every = (200, 40) if quick else (10_000, 100)
    settings = {**TINY, "steps": steps, "save_every": save_every, "eval_every": steps}
    poison = {"kind": "nan", "rank": 1, "steps": list(range(60, steps, POISON_EVERY))}
    undisturbed = lab.fresh("undisturbed")
    watched = _watch(lab.begin(undisturbed, 2, settings, faults=[poison]), undisturbed)
    run_dir, choice, faults = lab.fresh("soak"), random.Random(9), Counter[str]()
    restarts = 0
    while not (run_dir / "DONE").exists():
        restarts += 1
        assert restarts < 1000
        _one_attempt(lab, run_dir, settings, poison, choice, faults)
    same = same_student(run_dir, undisturbed) and curve(run_dir) == curve(undisturbed)
    growth = {name: _slope_per_1000_steps(watched, name) for name in ("memory_kib", "files")}
    # over 200 steps a slope is noise
    flat = quick or all(growth[name] < limit for name, limit in FLAT_PER_1000_STEPS.items())
    return Outcome(
        f"soak: {steps} steps with random faults end in the same student; memory and open files flat",
        1,
        int(same and flat),
        f"{sum(faults.values())} faults ({', '.join(f'{count} {name}' for name, count in sorted(faults.items()))}) in {restarts} attempts, "
        f"{len(poison['steps'])} poisoned steps; weights and curve {'equal bit for bit' if same else 'DIFFER'}; per 1000 steps {growth['memory_kib']:+.0f} KiB resident "
        f"of {watched[-1]['memory_kib'] // 1024} MiB and {growth['files']:+.2f} open files of {watched[-1]['files']}",
        "not measured",
        {"faults": dict(faults), "growth_per_1000_steps": growth, "samples": watched[:: max(1, len(watched) // 50)]},
    )


def _one_attempt(
    lab: Lab,
    run_dir: Path,
    settings: dict[str, Any],
    poison: dict[str, Any],
    choice: random.Random,
    counts: Counter[str],
) -> None:
    """One attempt and the fault that ends it. A full disk ends no attempt; it is followed by another fault."""
    first, every = newest_step(run_dir), settings["save_every"]
    faults, fault = [poison], choice.choice(FAULTS)
    third_save = (first // every + 3) * every
    if fault == "full disk":
        faults.append({"kind": "file size", "save": third_save, "rank": choice.randrange(2), "bytes": 2000})
        counts[fault] += third_save <= settings["steps"] - every
        fault = choice.choice(("kill", "preempt"))
    if fault == "kill in a save":
        faults.append(
            {"kind": "at call", "save": third_save, "rank": 0, "operation": "fsync", "call": choice.randrange(1, 9)}
        )
    job = lab.begin(run_dir, 2, settings, faults=faults)
    goal = third_save + choice.randrange(4 * every)
    try:
        while job.poll() is None:
            if steps_done(run_dir) >= goal and _strike(fault, job, run_dir, choice):
                counts[fault] += 1
                break
            time.sleep(0.02)
        counts[fault] += fault == "kill in a save" and job.poll() not in (None, 0)
        if fault in ("preempt", "stop file"):
            assert job.wait() == 0
    finally:
        end_group(job)
        job.wait()


def _strike(fault: str, job: Job, run_dir: Path, choice: random.Random) -> bool:
    """False where the fault was arranged inside the rank and has not happened by now."""
    if fault == "stop file":
        (run_dir / "STOP").touch()
    elif fault != "kill in a save":
        os.kill(choice.choice(job.ranks), signal.SIGKILL if fault == "kill" else signal.SIGUSR1)
    return fault != "kill in a save"


# -- leaks


def _watch(job: Job, run_dir: Path) -> list[dict[str, int]]:
    """Resident memory and open files of rank 0 to the end of the run. Rank 0 does everything that a rank can do."""
    samples: list[dict[str, int]] = []
    process = Path(f"/proc/{job.ranks[0]}")
    try:
        while job.poll() is None:
            try:
                pages, files = int((process / "statm").read_text().split()[1]), len(list((process / "fd").iterdir()))
            except OSError:
                break
            memory_kib = pages * os.sysconf("SC_PAGE_SIZE") // 1024
            samples.append({"step": steps_done(run_dir), "memory_kib": memory_kib, "files": files})
            time.sleep(SAMPLE_S / 5 if len(samples) < 20 else SAMPLE_S)
        assert job.wait() == 0, run_dir.with_suffix(".log").read_text()[-3000:]
    finally:
        end_group(job)
    return samples


def _slope_per_1000_steps(samples: list[dict[str, int]], name: str) -> float:
    """Least squares over the second half of the run: growth after everything has been used once."""
    half = [sample for sample in samples if sample["step"] >= samples[-1]["step"] / 2]
    steps = np.array([sample["step"] for sample in half], dtype=float)
    if np.ptp(steps) == 0:
        return 0.0
    return float(1000 * np.polyfit(steps, [sample[name] for sample in half], 1)[0])
