"""Gain of a second tokenising process: `prepare` and bare SentencePiece, each with one and with two processes.

    python benchmarks/bench_prepare_workers.py            four minutes on two idle cores
    python benchmarks/bench_prepare_workers.py --quick    one round on little text

All contenders alternate for several rounds in one run. A ratio is the median of the ratios of the rounds. "steady" is the cost of
the text after the first copy, without the start of the processes. Two bare processes are the upper bound: their loss is caused by
memory and shared caches and not by `prepare`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks import measure  # noqa: E402
from benchmarks.bench_prepare import TOKENIZER, Bench, collect_text  # noqa: E402

# Forks NUMBER processes, each on its own core; with "shared" the model is loaded before the fork, with "own" by each process.
# Prints the wall and CPU seconds of each process for encoding the text six times.
BARE = """
import os, sys, time, sentencepiece
model, text, number, kind = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
lines = open(text, encoding="utf-8").read().split("\\n")
blocks = [[line for line in lines[start:start + 5000] if line.strip()] for start in range(0, len(lines), 5000)]
load = lambda: sentencepiece.SentencePieceProcessor(model_file=model)
processor = load() if kind == "shared" else None
pipes = [os.pipe() for _ in range(number)]
for core, (_, writing) in enumerate(pipes):
    if os.fork() == 0:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
        processor = processor or load()
        processor.encode(blocks[0], return_type="numpy", num_threads=1)
        wall, cpu = time.perf_counter(), time.process_time()
        for block in blocks * 6:
            processor.encode(block, return_type="numpy", num_threads=1)
        os.write(writing, f"{time.perf_counter() - wall} {time.process_time() - cpu}".encode())
        os._exit(0)
    os.close(writing)
for reading, _ in pipes:
    print(os.read(reading, 100).decode())
"""


def bare(model: Path, text: Path, number: int, kind: str) -> tuple[float, float]:
    """Wall seconds of the slowest process and CPU seconds of all, for processes that encode the text simultaneously."""
    command = [sys.executable, "-c", BARE, str(model), str(text), str(number), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall_and_cpu = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    return max(wall for wall, _ in wall_and_cpu), sum(cpu for _, cpu in wall_and_cpu)


def one_round(bench: Bench, rounds: dict[str, list[float]]) -> None:
    for size, source in (("total", bench.plain), ("start", bench.once)):
        for num_workers in (1, 2):
            cpu, wall = bench.prepare(source, num_workers, one_core=False)
            rounds.setdefault(f"{size} {num_workers} wall", []).append(wall)
            rounds.setdefault(f"{size} {num_workers} cpu", []).append(cpu)
    for number, kind in ((1, "own"), (2, "own"), (2, "shared")):
        wall, cpu = bare(bench.tokenizer, bench.once, number, kind)
        rounds.setdefault(f"bare {number} {kind} wall", []).append(wall)
        rounds.setdefault(f"bare {number} {kind} cpu", []).append(cpu)


def report(options: argparse.Namespace, rounds: dict[str, list[float]], text_bytes: int, load: float) -> None:
    for number in (1, 2):
        for clock in ("wall", "cpu"):
            pairs = zip(rounds[f"total {number} {clock}"], rounds[f"start {number} {clock}"], strict=True)
            rounds[f"steady {number} {clock}"] = [total - start for total, start in pairs]

    def row(name: str, above: str, below: str, factor: float = 1.0) -> list[object]:
        values = [factor * a / b for a, b in zip(rounds[above], rounds[below], strict=True)]
        return [name, statistics.median(values), f"{min(values):.2f} to {max(values):.2f}"]

    rows = [
        row("prepare, two workers, times one: wall, steady", "steady 1 wall", "steady 2 wall"),
        row("prepare, two workers, times one: wall, full process", "total 1 wall", "total 2 wall"),
        row("prepare, CPU seconds of two workers, share of one's: steady", "steady 2 cpu", "steady 1 cpu"),
        row("prepare, CPU seconds of two workers, share of one's: full process", "total 2 cpu", "total 1 cpu"),
        row("two bare processes, times one: wall, each its own model", "bare 1 own wall", "bare 2 own wall", 2),
        row("two bare processes, times one: wall, one model shared", "bare 1 own wall", "bare 2 shared wall", 2),
        row("two bare processes, CPU seconds each, share of one's: own model", "bare 2 own cpu", "bare 1 own cpu", 0.5),
        row("two bare processes, CPU seconds each, share of one's: shared", "bare 2 shared cpu", "bare 1 own cpu", 0.5),
    ]
    for number in (1, 2):
        name = f"prepare, {number} worker{'s' * (number > 1)}, full process: wall s, CPU s"
        wall, cpu = (statistics.median(rounds[f"total {number} {clock}"]) for clock in ("wall", "cpu"))
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f} CPU"])
    rows.append(["load average of the minute before the first round", f"{load:.1f}", ""])
    title = f"A second tokenising process: {text_bytes / 1e6:.0f} MB of text, {len(rounds['total 1 wall'])} rounds"
    measure.publish(title, ["figure", "median", "rounds"], rows, {"rows": rows, "seconds": rounds}, options.json)


def main() -> None:
    parser = measure.arguments(__doc__)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="SentencePiece model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not options.tokenizer.is_file():
        parser.error(f"{options.tokenizer} does not exist: `make demo` makes it, or give --tokenizer")
    load, rounds = os.getloadavg()[0], dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.tokenizer, collect_text(8_500_000), 3 if options.quick else 24)
        for _ in range(1 if options.quick else options.rounds):
            one_round(bench, rounds)
    report(options, rounds, bench.text_bytes, load)


if __name__ == "__main__":
    main()
