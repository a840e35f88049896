"""Speed at which rows are fed to training, relative to bare memory-map copies; properties of the order of samples.

    python benchmarks/bench_feed.py [--tokenizer MODEL] [--quick] [--json FILE]

Speed: sample numbers in, torch int64 batches of 512-token rows out, one thread, from shards of real text in 22 languages.
The baseline copies the same rows one by one from the same memory maps, without sampling. `separate_over_joined` in the JSON is the
least of three batch sizes: the speed of rows with their documents (`documents: separate`), by that of rows without. Order: every property is counted
over 10^6 samples and 100 languages.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks import measure  # noqa: E402
from data_prep.shards import ShardSet  # noqa: E402
from pipeline.data.batches import PLAN_WINDOW, BatchOptions, BatchSource, Prefetcher  # noqa: E402
from pipeline.data.sampler import TemperatureSampler, temperature_weights  # noqa: E402

SEQ_LEN = 512
ROWS_100_LANGUAGES = np.minimum((np.random.default_rng(0).pareto(0.6, 100) * 2000 + 300).astype(np.int64), 3_000_000)


def make_shards(work: Path, tokenizer: Path) -> ShardSet:
    command = [sys.executable, "-m", "data_prep", "prepare", "--input", "samples/cc100", "--tokenizer", str(tokenizer)]
    subprocess.run([*command, "--output", str(work / "shards")], cwd=REPO, check=True, capture_output=True)
    return ShardSet(work / "shards")


def bare_copies(shards: ShardSet, places: list[tuple[str, int]], batch_size: int) -> None:
    """The rows, read by a loop over memory maps. Sampling is done beforehand."""
    streams = {language: shards.shards(language)[0].tokens for language in shards.languages}
    for start in range(0, len(places), batch_size):
        batch = np.empty((batch_size, SEQ_LEN), np.int64)
        for position, (language, row) in enumerate(places[start : start + batch_size]):
            batch[position, 0], batch[position, -1] = 0, 2
            batch[position, 1:-1] = streams[language][row * 510 : (row + 1) * 510]
        torch.from_numpy(batch)


def feed(source: BatchSource, first: int, num_samples: int, batch_size: int) -> None:
    for start in range(first, first + num_samples, batch_size):
        torch.from_numpy(source.batch(np.arange(start, start + batch_size)))


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def speed(shards: ShardSet, batch_size: int, num_samples: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of new samples, so that no plan is used twice."""
    source = BatchSource(shards, BatchOptions(SEQ_LEN, 0.3, 0, heldout_rows=1))
    ratios, rates = [], []
    for number in range(rounds):
        first = number * num_samples
        places = source.locate(np.arange(first, first + num_samples))
        source = BatchSource(shards, BatchOptions(SEQ_LEN, 0.3, 0, heldout_rows=1))
        bare = cpu_seconds(lambda places=places: bare_copies(shards, places, batch_size))
        fed = cpu_seconds(lambda first=first, source=source: feed(source, first, num_samples, batch_size))
        ratios.append(bare / fed)
        rates.append(num_samples / fed / 1e3)
    return {
        f"feed of batches of {batch_size}, share of bare row copies": statistics.median(ratios),
        f"feed of batches of {batch_size}, thousand rows/s": statistics.median(rates),
    }


def separate_over_joined(shards: ShardSet, batch_size: int, num_samples: int, rounds: int) -> float:
    """Rows per second with each row's documents, by rows per second without: the median over rounds of new samples."""
    ratios = []
    for number in range(rounds):
        seconds = {}
        for documents in ("joined", "separate"):
            source = BatchSource(shards, BatchOptions(SEQ_LEN, 0.3, 0, heldout_rows=1, documents=documents))
            batches = np.arange(number * num_samples, (number + 1) * num_samples).reshape(-1, batch_size)
            seconds[documents] = cpu_seconds(
                lambda source=source, batches=batches: [*map(source.training_batch, batches)]
            )
        ratios.append(seconds["joined"] / seconds["separate"])
    return statistics.median(ratios)


def waiting(shards: ShardSet, step_s: float, num_steps: int) -> float:
    """Share of the time that a training loop with steps of `step_s` waits for its 16 x 128 batches."""
    source = BatchSource(shards, BatchOptions(128, 0.3, 0, heldout_rows=8))

    def numbers() -> Iterator[np.ndarray]:
        return (np.arange(step * 16, (step + 1) * 16) for step in range(num_steps))

    start = time.perf_counter()
    with Prefetcher(source, numbers()) as batches:
        for _ in batches:
            time.sleep(step_s)
        return batches.wait_s / (time.perf_counter() - start)


def order(num_samples: int) -> dict[str, float | str]:
    """Counts for every property of the sampler."""
    rows = ROWS_100_LANGUAGES
    sampler, numbers = TemperatureSampler(rows, 0.3, seed=1), np.arange(num_samples)
    language, row = sampler(numbers)
    differing = 0
    for num_ranks in (1, 2, 4, 8):
        for rank in range(num_ranks):
            mine = numbers[rank::num_ranks]
            again = TemperatureSampler(rows, 0.3, seed=1)(mine)
            differing += int((again[0] != language[mine]).sum() + (again[1] != row[mine]).sum())
    jumps = np.random.default_rng(2).integers(0, num_samples, 2000)
    for jump in jumps:
        again = TemperatureSampler.__call__(sampler, [jump])
        differing += int(again[0][0] != language[jump]) + int(again[1][0] != row[jump])
    cycles = num_samples // sampler.cycle
    counts = np.bincount(language[: cycles * sampler.cycle], minlength=100)
    share_error = np.abs(counts - temperature_weights(rows, 0.3) * cycles * sampler.cycle).max()
    visits = [
        np.bincount(row[: cycles * sampler.cycle][language[: cycles * sampler.cycle] == i], minlength=n)
        for i, n in enumerate(rows)
    ]
    jump_s = []
    for number in range(50):
        start = time.perf_counter()
        sampler([10**12 + number * 10**6])
        jump_s.append(time.perf_counter() - start)
    return {
        f"samples that differ on 1, 2, 4, 8 ranks or after 2000 jumps, of {num_samples}": differing,
        "largest share error at a cycle's end over 100 languages, samples": float(share_error),
        "largest difference in visits between rows of a language": int(
            max(count.max() - count.min() for count in visits)
        ),
        "jump to sample 10^12, ms (median)": 1e3 * statistics.median(jump_s),
    }


def main() -> None:
    parser = measure.arguments(__doc__)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=REPO / "artifacts" / "teacher" / "sentencepiece.bpe.model",
        help="SentencePiece model",
    )
    options = parser.parse_args()
    if not options.tokenizer.is_file():
        parser.error(f"{options.tokenizer} does not exist: `make demo` makes it, or give --tokenizer")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        shards = make_shards(Path(directory), options.tokenizer)
        figures: dict[str, float | str] = {}
        apart, rounds = {}, 3 if options.quick else 11
        for batch_size in (16, 64, 256):
            figures |= speed(shards, batch_size, 16384, rounds)
            apart[str(batch_size)] = separate_over_joined(shards, batch_size, PLAN_WINDOW, rounds)
            figures[f"rows with their documents in batches of {batch_size}, by rows without"] = apart[str(batch_size)]
        step_s = 0.05
        figures[f"time waited for data with steps of {step_s} s, percent"] = 100 * waiting(
            shards, step_s, 20 if options.quick else 200
        )
    figures |= order(50_000 if options.quick else 1_000_000)
    rows = list(figures.items())
    of_json = {"figures": figures, "separate_over_joined": min(apart.values()), "separate_over_joined_by_batch": apart}
    measure.publish("Feeding rows to training", ["figure", "value"], rows, of_json, options.json)


if __name__ == "__main__":
    main()
