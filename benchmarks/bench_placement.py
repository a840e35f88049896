"""Memory of a teacher that is complete on every rank, and of one whose parameters are partitioned over the ranks.

    OMP_NUM_THREADS=1 python benchmarks/bench_placement.py [--ranks 2 4] [--defaults] [--quick] [--json FILE]

Real gloo ranks, `teacher_options.placement: replicated` and `zero3`, and a student that is small compared with its teacher.
With `--defaults` also a `zero3` that keeps gathered parameters, as DeepSpeed does by default. Memory: most bytes of live
tensors on a rank in the second optimizer step, from torch's profiler. `tests/dist/` shows that both placements give the
same losses.
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
DEFAULTS = "zero3, DeepSpeed's defaults"


def case(name: str, ranks: int, hidden: int, layers: int) -> Case:
    placement = "replicated" if name == "replicated" else "zero3"
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
    small_buckets = {"reduce_bucket_size": 100_000}  # the default, 2 GB, would hide everything else
    shape = teacher_shape(layers, hidden, 1000)
    keep = name == DEFAULTS
    return Case(f"{name}, {ranks} ranks", recipe, shape, ranks=ranks, zero=small_buckets, keep_gathered=keep)


def teacher_megabytes(hidden: int, layers: int) -> float:
    """Megabytes of the cut teacher in fp32: complete layers below the tapped one, and the projections of that one."""
    return 4e-6 * ((layers - 1) * 12 * hidden**2 + 3 * hidden**2 + 1514 * hidden)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (--quick: 2)")
    parser.add_argument("--defaults", action="store_true", help="measure DeepSpeed's defaults too")
    options = parser.parse_args()
    hidden, layers = (192, 4) if options.quick else (768, 12)
    ranks = [2] if options.quick else options.ranks
    names = [*PLACEMENTS, DEFAULTS] if options.defaults else PLACEMENTS
    cases = [case(name, number, hidden, layers) for number in ranks for name in names]
    with tempfile.TemporaryDirectory() as temporary:
        reports = run_for_real(cases, Path(temporary))
    teacher_mb = teacher_megabytes(hidden, layers)
    rows = [[c.name, teacher_mb, max(r["peak_bytes"] for r in reports[c.name]) / 1e6] for c in cases]
    header = ["placement", "teacher, MB", "a rank's peak in a step, MB"]
    figures = {"rows": [dict(zip(header, row, strict=True)) for row in rows]}
    publish(f"Teacher of {layers} x {hidden}, fp32, by placement", header, rows, figures, options.json)


if __name__ == "__main__":
    main()
