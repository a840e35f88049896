"""Ten promises of a run that cannot be lost, each kept under real faults, counted, beside stock DeepSpeed.

    python benchmarks/bench_faults.py [--quick] [--only exact,kills,...] [--json FILE]        (make faults)

Every life is a real `pipeline/train.py` on a tiny teacher (benchmarks/faults/lab.py). Ranks are forked from one process
that has imported everything (tests/dist/fork_server.py). The full sweep takes most of an hour of one core or two.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks.faults import cost, damage, disk, exact, kills, soak  # noqa: E402
from benchmarks.faults.lab import Lab, Outcome  # noqa: E402
from benchmarks.measure import arguments, publish  # noqa: E402
from pipeline.errors import EXIT_USER, did_you_mean  # noqa: E402
from tests.dist.fork_server import ForkServer  # noqa: E402

FIGURES: dict[str, Callable[[Lab, bool], Outcome]] = {
    "exact": exact.interrupted_equals_uninterrupted,
    "kills": kills.kills,
    "damage": damage.corrupted_checkpoints,
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
            print(f"error: there is no figure {name!r}; {did_you_mean(name, list(FIGURES))}", file=sys.stderr)
            sys.exit(EXIT_USER)
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    broken = []
    for name in names:
        # a directory of its own: what is left of a sweep is gigabytes
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
