"""Compare the predictions of `python -m pipeline plan` with the memory, operations and traffic of real steps on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/bench_plan.py [--quick] [--json FILE]

Memory: peak bytes of tensors in the second optimizer step under a real DeepSpeed engine, from torch's profiler.
Operations: torch's counter over one real micro-batch. Traffic: bytes that real gloo ranks pass to their collectives.
Times, and everything that only a GPU does, are not measured. `--quick` runs small shapes on two clusters, as the tests do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks.measure import arguments, publish  # noqa: E402
from benchmarks.plan_cases import Case, clusters, measured_flops, shapes  # noqa: E402
from pipeline.planning.communication import Collective  # noqa: E402

# What torch.distributed calls the collectives of communication.py.
REAL_NAMES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
}
HEADER = ["case", "figure", "predicted", "measured", "predicted / measured"]
Row = list[Any]


def run_for_real(cases: list[Case], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every rank's report of every case."""
    options, report = directory / "options.json", directory / "report.json"
    options.write_text(json.dumps({"cases": [case.for_ranks(directory) for case in cases]}))
    command = [sys.executable, "benchmarks/plan_ranks.py", str(options), str(report)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"plan_ranks.py ended with {result.returncode}\n{result.stderr[-3000:]}")
    return json.loads(report.read_text())


def memory_row(case: Case, reports: list[dict[str, Any]], directory: Path) -> Row:
    """Peak MB of the rank that holds most."""
    predicted = case.plan(directory).memory
    measured = max(report["peak_bytes"] for report in reports)
    return [
        case.name,
        f"memory, MB ({predicted.moment})",
        predicted.total / 1e6,
        measured / 1e6,
        predicted.total / measured,
    ]


def operations_row(case: Case, directory: Path) -> Row:
    """GFLOP of one micro-batch."""
    plan = case.plan(directory)
    predicted, measured = plan.step.flops / plan.setting.accumulation, measured_flops(case, directory)
    return [case.name, "operations, GFLOP", predicted / 1e9, measured / 1e9, predicted / measured]


def traffic_rows(case: Case, reports: list[dict[str, Any]], directory: Path) -> list[Row]:
    """kB per kind of collective in one optimizer step."""
    rows = []
    planned: list[Collective] = case.plan(directory).collectives
    for kind, real in REAL_NAMES.items():
        predicted = sum(c.total_bytes for c in planned if c.kind == kind)
        measured = max(report["collectives"].get(real, [0, 0])[1] for report in reports)
        if predicted or measured > 1000:  # smaller ones are single numbers: norms and flags
            rows.append([case.name, f"{kind}, kB", predicted / 1e3, measured / 1e3, predicted / measured])
    return rows


def compare(one_rank: list[Case], many_ranks: list[Case]) -> list[Row]:
    """All rows of the table. Each case runs once."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        reports = run_for_real([*one_rank, *many_ranks], directory)
        rows = [memory_row(case, reports[case.name], directory) for case in one_rank]
        rows += [operations_row(case, directory) for case in one_rank]
        for case in many_ranks:
            rows += traffic_rows(case, reports[case.name], directory)
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    size = 1 if options.quick else 2
    rows = compare(shapes(size), clusters(size)[:2] if options.quick else clusters(size))
    figures = {"rows": [dict(zip(HEADER, row, strict=True)) for row in rows]}
    publish("The plan against real steps on a CPU", HEADER, rows, figures, options.json)


if __name__ == "__main__":
    main()
