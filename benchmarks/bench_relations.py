"""The relation loss alone, forward and backward: CPU seconds of one thread and peak memory, against the naive baseline.

    OMP_NUM_THREADS=1 python benchmarks/bench_relations.py [--quick] [--json FILE] [--plot FILE.png]

One relation (Q with Q) per line. Variants take turns, and figures are medians. The second table is peak memory over
sequence length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from matplotlib.figure import Figure

from benchmarks.measure import arguments, markdown_table, publish
from benchmarks.naive_baseline import added_peak_mb, interleaved_cpu_seconds, naive_relation
from pipeline.distillation.relations import relation_kl
from pipeline.distillation.relations.backends import BACKENDS

# name, B, L, teacher width, student width, heads
SHAPES = [
    ("large, L512", 4, 512, 1024, 384, 64),
    ("base, L128", 16, 128, 768, 384, 48),
]
LENGTHS = [512, 1024, 2048, 4096, 8192]
LONGEST_NAIVE = 2048  # the maps of 48 heads of longer rows do not fit into the memory of an ordinary machine


def variants_of(teacher: torch.Tensor, student: torch.Tensor, heads: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of each variant; `student` is a leaf."""

    def runner(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            loss().backward()

        return run

    variants = {"naive": runner(lambda: naive_relation(teacher, student, heads))}
    for name in BACKENDS:
        if name == "triton":  # has kernels for GPUs only
            continue
        variants[name] = runner(lambda name=name: relation_kl(teacher, student, heads, backend=name))
    return variants


def inputs(rows: int, length: int, width_T: int, width_S: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    teacher, student = torch.randn(rows, length, width_T), torch.randn(rows, length, width_S)
    return teacher.to(dtype), student.to(dtype).requires_grad_()


def compare(quick: bool) -> list[list]:
    """One row per shape, precision and variant: CPU seconds, speed-up, peak MB, how many times less than the baseline's."""
    rows = []
    for name, batch, length, width_T, width_S, heads in SHAPES:
        batch = 1 if quick else batch
        for dtype in (torch.float32, torch.bfloat16):
            variants = variants_of(*inputs(batch, length, width_T, width_S, dtype), heads)
            seconds = interleaved_cpu_seconds(variants, 2 if quick else 7)
            for variant, run in variants.items():
                peak, naive_peak = added_peak_mb(run), added_peak_mb(variants["naive"])
                gain = seconds["naive"] / seconds[variant]
                rows.append(
                    [f"{name}, B{batch}", str(dtype)[6:], variant, seconds[variant], gain, peak, naive_peak / peak]
                )
    return rows


def over_length(quick: bool) -> dict[str, dict[int, float]]:
    """Peak MB above the inputs, one row of L tokens, 768 -> 384, 48 heads, fp32."""
    peaks: dict[str, dict[int, float]] = {}
    for length in LENGTHS[: 2 if quick else None]:
        for variant, run in variants_of(*inputs(1, length, 768, 384, torch.float32), 48).items():
            if variant != "naive" or length <= LONGEST_NAIVE:
                peaks.setdefault(variant, {})[length] = added_peak_mb(run)
    return peaks


def draw(peaks: dict[str, dict[int, float]], file: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for variant, by_length in peaks.items():
        axes.loglog(list(by_length), list(by_length.values()), marker="o", base=2, label=variant)
    axes.set(xlabel="tokens per row", ylabel="peak memory above inputs, MB", title="One relation, 48 heads, 768 -> 384")
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw peak memory over length")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, peaks = compare(options.quick), over_length(options.quick)
    header = ["shape", "precision", "variant", "CPU s", "x naive", "peak MB", "naive peak / own"]
    publish("Relation loss, forward and backward", header, rows, {"rows": rows, "peak_mb": peaks}, options.json)
    lengths = [[variant, *(by_length.get(n, "-") for n in LENGTHS)] for variant, by_length in peaks.items()]
    print(markdown_table(["peak MB at", *map(str, LENGTHS)], lengths))
    if options.plot:
        draw(peaks, options.plot)


if __name__ == "__main__":
    main()
