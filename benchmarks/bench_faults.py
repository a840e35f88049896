"""Kill, preempt and freeze real training runs at random moments, and count what was lost.

    python benchmarks/bench_faults.py [--quick] [--json FILE]        (make faults)

Every life is a real `pipeline/train.py` on a tiny teacher (4 x 48, real text, fp32). A faulty run is started again until it
is done; its weights, moments and every logged loss must then equal those of a run that nobody touched, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

from benchmarks.measure import arguments, publish  # noqa: E402
from pipeline.errors import EXIT_HUNG  # noqa: E402
from pipeline.runtime.checkpoint import KINDS, CheckpointReader, newest_whole  # noqa: E402
from tests.conftest import (  # noqa: E402
    make_tiny_shards,
    make_tiny_teacher,
    make_tiny_tokenizer,
    write_fp32_config,
    write_tiny_recipe,
)
from tests.dist.runs import curve, end_group, launcher, start, train  # noqa: E402

SAVE_EVERY = 10
MAX_LIVES = 1000


@dataclass
class Tally:
    """What happened under one kind of fault."""

    name: str
    ranks: int
    wanted: int
    faults: int = 0
    runs: int = 0
    exact_runs: int = 0
    lost_steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self) -> list[Any]:
        lost = max(self.lost_steps, default=0)
        took = f"{statistics.median(self.seconds):.1f} / {max(self.seconds):.1f}" if self.seconds else ""
        return [self.name, self.ranks, self.faults, f"{self.exact_runs} of {self.runs}", lost, took]


class Lab:
    """Teacher, shards, recipe and untouched runs that faulty ones are compared with."""

    def __init__(self, directory: Path, steps: int):
        self.directory, self.steps = directory, steps
        tokenizer = make_tiny_tokenizer(directory / "tokenizer")
        (directory / "teacher").mkdir()
        teacher = make_tiny_teacher(directory / "teacher", tokenizer)
        recipe = write_tiny_recipe(directory / "tiny.yaml", teacher, make_tiny_shards(directory / "shards", tokenizer))
        config = write_fp32_config(directory / "fp32.json")
        overrides = {"steps": steps, "save_every": SAVE_EVERY, "eval_every": steps, "guard.hang_timeout_s": 5}
        self.arguments = ["--deepspeed", str(config), "--recipe", str(recipe)]
        for key, value in overrides.items():
            self.arguments += ["--set", f"{key}={value}"]
        self._untouched: dict[int, Path] = {}

    def untouched(self, ranks: int) -> Path:
        if ranks not in self._untouched:
            self._untouched[ranks] = self.directory / f"untouched{ranks}"
            train("deepspeed", ranks, self._untouched[ranks], self.arguments)
        return self._untouched[ranks]

    def begin(self, run_dir: Path, ranks: int) -> Popen:
        command = [*launcher("deepspeed", ranks), *self.arguments, "--run-dir", str(run_dir)]
        return start(command, run_dir.with_suffix(".log"))

    def is_exact(self, run_dir: Path, ranks: int) -> bool:
        whole = self.untouched(ranks)
        return (
            curve(run_dir) == curve(whole)
            and _state(run_dir).keys() == _state(whole).keys()
            and all(torch.equal(tensor, _state(whole)[key]) for key, tensor in _state(run_dir).items())
        )


def _state(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint, _ = newest_whole(run_dir / "checkpoints")
    assert checkpoint is not None
    reader = CheckpointReader(checkpoint)
    shapes = reader.state["parameters"]
    return {
        (kind, name): reader.read(kind, name, 0, int(torch.Size(shape).numel()))
        for kind in KINDS
        for name, shape in shapes.items()
    }


def steps_done(run_dir: Path) -> int:
    """The last step in metrics.jsonl of a run that may be writing to it."""
    try:
        return max(curve(run_dir), default=0)
    except (OSError, ValueError):
        return 0


def ranks_of(process: Popen) -> list[int]:
    """The training processes below a launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            session = int((path / "stat").read_text().rsplit(")", 1)[1].split()[3])
        except (OSError, ValueError):
            continue
        if session == process.pid and any(w.startswith(b"--local_rank") for w in words):
            found.append(int(path.name))
    return sorted(found)


def suffer(lab: Lab, tally: Tally, choice: random.Random, fault: Callable[[Lab, Tally, Popen, Path], None]) -> None:
    """Runs under faults, one fault a life, until enough faults were seen; a run without luck is left to finish."""
    while tally.faults < tally.wanted:
        run_dir = lab.directory / f"{tally.name.replace(' ', '-')}{tally.runs}"
        tally.runs += 1
        for _ in range(MAX_LIVES):
            process = lab.begin(run_dir, tally.ranks)
            goal = steps_done(run_dir) + choice.randrange(1, max(2, lab.steps // 3))
            try:
                while process.poll() is None and (steps_done(run_dir) < goal or tally.faults >= tally.wanted):
                    time.sleep(0.02)
                if process.poll() is None:
                    before = steps_done(run_dir)
                    fault(lab, tally, process, run_dir)
                    tally.faults += 1
                    newest, problems = newest_whole(run_dir / "checkpoints")
                    assert not problems, problems
                    tally.lost_steps.append(max(0, before - (int(newest.name[5:]) if newest else 0)))
            finally:
                end_group(process)
            if (run_dir / "DONE").exists():
                break
        tally.exact_runs += lab.is_exact(run_dir, tally.ranks)


def kill(lab: Lab, tally: Tally, process: Popen, run_dir: Path) -> None:
    """SIGKILL to one random rank; the launcher ends the others."""
    os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
    process.wait(60)


def preempt(lab: Lab, tally: Tally, process: Popen, run_dir: Path) -> None:
    """SIGUSR1 to one rank: all save and end with exit code 0. The time counts from the signal to the end of the job."""
    began = time.monotonic()
    os.kill(ranks_of(process)[-1], signal.SIGUSR1)
    assert process.wait(120) == 0
    tally.seconds.append(time.monotonic() - began)


def freeze(lab: Lab, tally: Tally, process: Popen, run_dir: Path) -> None:
    """SIGSTOP to one rank: the others dump their stacks and the job ends, non-zero, with no process left."""
    began = time.monotonic()
    os.kill(ranks_of(process)[-1], signal.SIGSTOP)
    assert process.wait(120) in (EXIT_HUNG, 1, 255)
    tally.seconds.append(time.monotonic() - began)
    assert list((run_dir / "logs").glob("stacks-rank*.txt"))


def main() -> None:
    options = arguments(__doc__).parse_args()
    counts = (2, 2, 1) if options.quick else (200, 50, 20)
    choice = random.Random(0)
    tallies = [
        Tally("kill -9 of a random rank", 2, counts[0]),
        Tally("preemption by USR1", 2, counts[1]),
        Tally("SIGSTOP of a rank", 2, counts[2]),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab(Path(temporary), steps=30 if options.quick else 120)
        for tally, fault in zip(tallies, (kill, preempt, freeze), strict=True):
            suffer(lab, tally, choice, fault)
    header = ["fault", "ranks", "faults", "runs equal bit for bit", "most steps lost", "seconds, median / max"]
    figures = {tally.name: tally.row()[1:] for tally in tallies}
    publish(f"Faults (a save every {SAVE_EVERY} steps)", header, [t.row() for t in tallies], figures, options.json)
    if any(tally.exact_runs != tally.runs for tally in tallies):
        sys.exit("error: a run under faults did not end as the untouched one")


if __name__ == "__main__":
    main()
