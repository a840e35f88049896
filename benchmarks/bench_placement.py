"""A teacher whole on every rank, against one whose parameters are spread over the ranks: memory and losses.

    OMP_NUM_THREADS=1 python benchmarks/bench_placement.py [--quick] [--json FILE]

Real gloo ranks, `teacher_options.placement: replicated` and `zero3`, a student that is small beside its teacher. Memory: most
bytes of tensors alive on a rank in the second optimizer step, from torch's profiler. That both placements come to the same
losses is held by `tests/dist/`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_plan import run_for_real
from benchmarks.measure import arguments, publish
from benchmarks.plan_cases import Case, teacher_shape

PLACEMENTS = ("replicated", "zero3")


def case(placement: str, ranks: int, hidden: int, layers: int) -> Case:
    recipe = {
        "teacher_options.placement": placement,
        "relations.heads": 12,
        "relations.teacher_layer": layers,
        "student.layers": 2,
        "student.hidden": 96,
        "student.heads": 12,
        "seq_len": 32,
        "global_batch": ranks,
        "micro_batch_per_gpu": 1,
    }
    small_buckets = {"reduce_bucket_size": 100_000}  # the default, 2 GB, would hide all else
    shape = teacher_shape(layers, hidden, 1000)
    return Case(f"{placement}, {ranks} ranks", recipe, shape, ranks=ranks, zero=small_buckets)


def teacher_megabytes(hidden: int, layers: int) -> float:
    """fp32 parameters of the cut teacher: whole layers below the tapped one, of which the projections are left."""
    return 4e-6 * ((layers - 1) * 12 * hidden**2 + 3 * hidden**2 + 1514 * hidden)


def main() -> None:
    options = arguments(__doc__).parse_args()
    hidden, layers = (192, 4) if options.quick else (768, 12)
    ranks = (2,) if options.quick else (2, 4)
    cases = [case(placement, number, hidden, layers) for number in ranks for placement in PLACEMENTS]
    with tempfile.TemporaryDirectory() as temporary:
        reports = run_for_real(cases, Path(temporary))
    whole = teacher_megabytes(hidden, layers)
    rows = [[c.name, whole, max(r["peak_bytes"] for r in reports[c.name]) / 1e6] for c in cases]
    header = ["placement", "teacher, MB", "a rank's peak in a step, MB"]
    figures = {"rows": [dict(zip(header, row, strict=True)) for row in rows]}
    publish(f"Teacher of {layers} x {hidden}, fp32, by placement", header, rows, figures, options.json)


if __name__ == "__main__":
    main()
