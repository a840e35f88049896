"""Figures 2, 5 and 7: ranks are killed, asked to stop and suspended from outside, at random moments and named points."""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.dist.fork_server import Job
from tests.dist.runs import end_group
from tests.faults.sweeps.lab import Lab, Outcome, newest_step, same_end, steps_done, wait_until

INTERVAL = 20
SETTINGS = {"steps": 240, "save_every": INTERVAL, "eval_every": 240}
STEP_PAUSE = [{"kind": "pause", "seconds": 0.01}]  # as in real runs, writing a save takes a few steps, not fifty
IN_STARTUP = 5  # every 5th kill hits an attempt that has not begun to train
STARTUP_S = 1.5
HANG_TIMEOUT_S = 3.0
SLOW_TIMEOUT_S = 30.0  # for the start, and for a save that is just being begun
EXTRA_S = 10.0  # what a suspended rank may cost beyond the timeout
# Every place of a save, for rank 0 of two and for rank 1: the files of a rank, then what rank 0 alone does
NAMED_POINTS = (
    [(0, "mkdir", 1), (0, "rename", 1), (0, "link", 1)]
    + [(0, "fsync", call) for call in range(1, 8)]
    + [(1, "fsync", call) for call in (1, 2, 3)]
)


@dataclass
class Sweep:
    """Faults of one kind in a row, one attempt per fault. Finished runs are compared with an undisturbed one."""

    lab: Lab
    name: str
    ranks: int
    num_faults: int
    choice: random.Random
    faults: int = 0
    kept: int = 0
    lost: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    runs: int = 0
    exact: int = 0

    @property
    def kept_if_exact(self) -> int:
        """Faults at which the promise was kept; none where a run ended differently."""
        return self.kept if self.exact == self.runs else 0

    @property
    def exactness(self) -> str:
        return f"{self.exact} of {self.runs} runs end bit for bit as without faults"

    def run(self, settings: dict[str, Any], strike: Any) -> None:
        """Until `num_faults` have happened. `strike(sweep, job, run_dir)` returns whether its promise was kept."""
        while self.faults < self.num_faults:
            run_dir = self.lab.fresh(f"{self.name}{self.ranks}-{self.runs}")
            self.runs += 1
            while not (run_dir / "DONE").exists():
                job = self.lab.begin(run_dir, self.ranks, settings, faults=STEP_PAUSE)
                try:
                    if self.faults < self.num_faults:
                        self._one_attempt(job, run_dir, strike)
                    assert job.wait() == 0 or not (run_dir / "DONE").exists()
                finally:
                    end_group(job)
            self.exact += same_end(run_dir, self.lab.untouched(self.ranks, settings, faults=STEP_PAUSE))
            shutil.rmtree(run_dir)

    def _one_attempt(self, job: Job, run_dir: Path, strike: Any) -> None:
        """Wait for a moment, then strike. An attempt that ends before does not count."""
        begun_at = newest_step(run_dir)
        if self.name == "kill" and self.faults % IN_STARTUP == IN_STARTUP - 1:
            time.sleep(self.choice.uniform(0.0, STARTUP_S))
        else:
            # past the first save, so that the crash-loop guard sees progress; then anywhere within two intervals
            goal = begun_at + INTERVAL + self.choice.randrange(2 * INTERVAL)
            if not wait_until(lambda: job.poll() is not None or steps_done(run_dir) >= goal, 120):
                raise TimeoutError(f"no step {goal} in {run_dir}")
            time.sleep(self.choice.uniform(0.0, 0.03))
        if job.poll() is None:
            self.kept += strike(self, job, run_dir)
            self.faults += 1


def kill(sweep: Sweep, job: Job, run_dir: Path) -> bool:
    """SIGKILL to a random rank. Kept: the checkpoint before the one that was being written is there, or a newer one."""
    os.kill(sweep.choice.choice(job.ranks), signal.SIGKILL)
    end_group(job)
    job.wait()
    done, there = steps_done(run_dir), newest_step(run_dir)
    sweep.lost.append(max(0, done - there))
    return there >= (done // INTERVAL - 1) * INTERVAL


def preempt(sweep: Sweep, job: Job, run_dir: Path) -> bool:
    """USR1 or TERM to one rank. Kept: exit code 0, marker, and the newest checkpoint is the last step done."""
    began_s = time.time()
    os.kill(sweep.choice.choice(job.ranks), sweep.choice.choice([signal.SIGUSR1, signal.SIGTERM]))
    code = job.wait(120)
    if (run_dir / "DONE").exists():  # it was the last step: there was nothing to lose
        return code == 0
    sweep.seconds.append((run_dir / "PREEMPTED").stat().st_mtime - began_s)
    sweep.lost.append(steps_done(run_dir) - newest_step(run_dir))
    return code == 0 and sweep.lost[-1] == 0


def freeze(sweep: Sweep, job: Job, run_dir: Path) -> bool:
    """SIGSTOP to one rank. Kept: stacks of every rank on disk, the job ended in time, no process left.

    The exit code is not 0 (4, or 137 where the launcher sees the killed rank first), unless the rank, which is resumed for
    its stacks, finishes the run in those seconds.
    """
    stacks = run_dir / "logs"
    began = time.monotonic()
    os.kill(sweep.choice.choice(job.ranks), signal.SIGSTOP)
    code = job.wait(120)
    sweep.seconds.append(time.monotonic() - began)
    timeout_s = HANG_TIMEOUT_S if sweep.seconds[-1] < SLOW_TIMEOUT_S else SLOW_TIMEOUT_S
    gone = all(not Path(f"/proc/{pid}").exists() for pid in job.ranks)
    written = sum("training/trainer.py" in file.read_text() for file in stacks.glob("stacks-rank*.txt"))
    if (run_dir / "DONE").exists():  # it was in its last steps and has ended
        return code == 0 and gone
    return code != 0 and gone and written == len(job.ranks) and sweep.seconds[-1] < timeout_s + EXTRA_S


# -- figure 2


def kills(lab: Lab, quick: bool) -> Outcome:
    """Figure 2: random moments, named points, and the same trainer with DeepSpeed's own checkpoints."""
    from tests.faults.sweeps.stock import killed_with_stock_checkpoints

    choice = random.Random(2)
    sweeps = [Sweep(lab, "kill", ranks, count, choice) for ranks, count in ((2, 3),) if quick]
    sweeps = sweeps or [Sweep(lab, "kill", 2, 120, choice), Sweep(lab, "kill", 1, 80, choice)]
    for sweep in sweeps:
        sweep.run(SETTINGS, kill)
    points = NAMED_POINTS[::5] if quick else NAMED_POINTS
    at_points = [_killed_at(lab, *point) for point in points]
    random_kills = sum(sweep.faults for sweep in sweeps)
    runs, exact = sum(sweep.runs for sweep in sweeps), sum(sweep.exact for sweep in sweeps)
    lost = [steps for sweep in sweeps for steps in sweep.lost]
    stock = Counter() if quick else killed_with_stock_checkpoints(lab)
    return Outcome(
        "kill -9 of any rank: at most the checkpoint being written is lost",
        random_kills + len(points),
        sum(sweep.kept for sweep in sweeps) + sum(at_points) if exact == runs else 0,
        f"{random_kills} at random moments, {len(points)} at named points of a save; {exact} of {runs} runs end bit for "
        f"bit as without faults; steps lost: median {statistics.median(lost):.0f}, most {max(lost)} (a save every {INTERVAL})",
        "; ".join(f"{count} {how}" for how, count in sorted(stock.items())) or "not measured",
        {"steps_lost": lost, "stock": dict(stock)},
    )


def _killed_at(lab: Lab, rank: int, operation: str, call: int) -> bool:
    """SIGKILL at the n-th call of an operation in the third save; the run is then brought to its end."""
    settings = {"steps": 8, "save_every": 2, "eval_every": 8}
    run_dir = lab.fresh("point")
    fault = {"kind": "at call", "save": 6, "rank": rank, "operation": operation, "call": call}
    code = lab.run(run_dir, 2, settings, faults=[fault])
    there = newest_step(run_dir)
    said = run_dir.with_suffix(".log").read_text()[-1500:]
    again = lab.run(run_dir, 2, settings)
    kept = code != 0 and there in (4, 6) and again == 0 and same_end(run_dir, lab.untouched(2, settings))
    if not kept:
        said_again = run_dir.with_suffix(".log").read_text()[-1500:]
        print(
            f"not kept: SIGKILL of rank {rank} at {operation} {call}: code {code}, newest step {there}, then code {again}\n"
            f"-- output of the killed attempt:\n{said}\n-- of the next one:\n{said_again}",
            file=sys.stderr,
            flush=True,
        )
    return kept


# -- figures 5 and 7


def preemptions(lab: Lab, quick: bool) -> Outcome:
    """Figure 5."""
    sweep = Sweep(lab, "preempt", 2, 2 if quick else 50, random.Random(5))
    sweep.run(SETTINGS, preempt)
    return Outcome(
        "preemption by a signal to one rank: no step lost",
        sweep.faults,
        sweep.kept_if_exact,
        f"{max(sweep.lost, default=0)} steps lost; signal to committed: median {statistics.median(sweep.seconds):.2f} s, max "
        f"{max(sweep.seconds):.2f} s; {sweep.exactness}",
        "has no handler: the steps since the last save are lost",
        {"seconds": sweep.seconds},
    )


def frozen_ranks(lab: Lab, quick: bool) -> Outcome:
    """Figure 7."""
    settings = {**SETTINGS, "guard.hang_timeout_s": HANG_TIMEOUT_S, "guard.slow_timeout_s": SLOW_TIMEOUT_S}
    sweep = Sweep(lab, "freeze", 2, 1 if quick else 20, random.Random(7))
    sweep.run(settings, freeze)
    return Outcome(
        f"SIGSTOP of one rank: stacks of all ranks, job ended within T + {EXTRA_S:.0f} s, no process left",
        sweep.faults,
        sweep.kept_if_exact,
        f"T = {HANG_TIMEOUT_S:.0f} s; ended after median {statistics.median(sweep.seconds):.1f} s, max "
        f"{max(sweep.seconds):.1f} s; {sweep.exactness}",
        "waits for its collective timeout (30 min by default)",
        {"seconds": sweep.seconds},
    )
