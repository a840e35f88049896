"""Ten promises of a run that survives faults, each tested under real faults, counted, and compared with stock DeepSpeed.

    python -m tests.faults.sweeps [--quick] [--only exact,kills,...] [--json FILE]        (make faults)

Every attempt is a real `pipeline/train.py` with a tiny teacher (lab.py). Ranks are forked from one process that has
imported everything (tests/dist/fork_server.py). The full sweep takes most of an hour on one or two cores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import arguments, publish
from pipeline.errors import EXIT_USER, did_you_mean
from tests.dist.fork_server import ForkServer
from tests.faults.sweeps import corruption, cost, disk, exact, kills, soak
from tests.faults.sweeps.lab import Lab, Outcome

FIGURES: dict[str, Callable[[Lab, bool], Outcome]] = {
    "exact": exact.interrupted_equals_uninterrupted,
    "kills": kills.kills,
    "corruption": corruption.corrupted_checkpoints,
    "layouts": exact.ranks_and_stages_change,
    "preempt": kills.preemptions,
    "nan": exact.not_a_number,
    "frozen": kills.frozen_ranks,
    "disk": disk.full_disks,
    "soak": soak.soak,
    "cost": cost.cost_of_saving,
}
HEADER = ["", "promise", "kept", "measured", "stock DeepSpeed 0.19.8"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(FIGURES)}")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(FIGURES)
    for name in names:
        if name not in FIGURES:
            print(f"error: unknown figure {name!r}; {did_you_mean(name, list(FIGURES))}", file=sys.stderr)
            sys.exit(EXIT_USER)
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    broken = []
    for name in names:
        # one directory for each: a sweep leaves gigabytes
        with tempfile.TemporaryDirectory() as temporary, ForkServer() as server:
            began = time.monotonic()
            outcome = FIGURES[name](Lab(Path(temporary), server), options.quick)
        rows.append(outcome.row(1 + list(FIGURES).index(name)))
        seconds = round(time.monotonic() - began)
        figures[name] = {"trials": outcome.trials, "kept": outcome.kept, "seconds": seconds, **outcome.figures}
        print(f"{name}: {outcome.kept} of {outcome.trials} in {seconds} s", file=sys.stderr, flush=True)
        if outcome.kept != outcome.trials:
            broken.append(name)
    publish("Faults", HEADER, rows, figures, options.json)
    if broken:
        sys.exit(f"error: not every promise was kept: {', '.join(broken)}")


if __name__ == "__main__":
    main()
