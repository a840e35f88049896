"""Faults: random `kill -9` during `prepare`, and random corruption of finished shards, which `verify` must find.

python benchmarks/bench_prepare_faults.py            200 kills, 400 corruptions (about 10 minutes on two cores)
python benchmarks/bench_prepare_faults.py --quick    a few of each, as the tests in tests/faults
"""

from __future__ import annotations

import filecmp
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks import measure  # noqa: E402
from data_prep.shards import DataError, ShardSet  # noqa: E402
from data_prep.verify import verify  # noqa: E402

LANGUAGES = ("tr", "hi", "sw", "he")
SMALL_UNITS = ("--shard-tokens", "4000", "--block-bytes", "12000")


class KillTrials:
    """A corpus, the output of an undisturbed run, and any number of disturbed runs."""

    def __init__(self, work: Path, tokenizer: Path) -> None:
        self.work, self.tokenizer = work, tokenizer
        self.corpus = work / "corpus"
        self.corpus.mkdir(parents=True)
        for language in LANGUAGES:
            text = lzma.open(REPO / "samples" / "cc100" / f"{language}.txt.xz").read()
            (self.corpus / f"{language}.txt.xz").write_bytes(lzma.compress(text))
        start = time.perf_counter()
        self.expected = work / "expected"
        subprocess.run(self._command(self.expected, 2), cwd=REPO, check=True, capture_output=True)
        self.duration_s = time.perf_counter() - start

    def _command(self, output: Path, num_workers: int) -> list[str]:
        names = ["--input", str(self.corpus), "--tokenizer", str(self.tokenizer), "--output", str(output)]
        return [sys.executable, "-m", "data_prep", "prepare", *names, "--workers", str(num_workers), *SMALL_UNITS]

    def one(self, rng: random.Random) -> tuple[bool, int, int]:
        """Kill a run at random moments, then let it finish. Returns: same bytes?, kills that hit, shards that these kept."""
        output = self.work / "disturbed"
        shutil.rmtree(output, ignore_errors=True)
        hits = kept = 0
        for _ in range(rng.choice([1, 1, 2, 3])):
            process = subprocess.Popen(
                self._command(output, rng.choice([1, 2])),
                cwd=REPO,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            try:
                process.wait(rng.uniform(0.25, 1.0) * self.duration_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                hits += 1
                kept += len(list(output.glob("*/*.tok")))
        done = subprocess.run(self._command(output, rng.choice([1, 2])), cwd=REPO, capture_output=True, check=False)
        return done.returncode == 0 and same_files(self.expected, output), hits, kept


def same_files(one: Path, other: Path) -> bool:
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


def flip_bit(root: Path, rng: random.Random) -> Path:
    path = any_file(root, rng)
    data = bytearray(path.read_bytes())
    place = rng.randrange(8 * len(data))
    data[place // 8] ^= 1 << (place % 8)
    path.write_bytes(data)
    return path


def cut_off(root: Path, rng: random.Random) -> Path:
    path = any_file(root, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return path


def remove(root: Path, rng: random.Random) -> Path:
    path = any_file(root, rng)
    path.unlink()
    return path


def swap(root: Path, rng: random.Random) -> Path:
    first, second = rng.sample(sorted(root.glob("*/*.tok")), 2)
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    return first


def any_file(root: Path, rng: random.Random) -> Path:
    """A shard with probability 0.9, otherwise a manifest, `prepare.json` or journal."""
    shards = sorted(root.glob("*/*.tok"))
    records = [root / "manifest.json", root / "prepare.json", *sorted(root.glob("*/journal.jsonl"))]
    return rng.choice(shards) if rng.random() < 0.9 else rng.choice(records)


CORRUPTIONS: dict[str, Callable[[Path, random.Random], Path]] = {
    "bit flip": flip_bit,
    "truncation": cut_off,
    "missing file": remove,
    "swapped files": swap,
}


def corrupt_once(finished: Path, work: Path, kind: str, rng: random.Random) -> tuple[bool, bool]:
    """Corrupt a copy. Returns: does `verify` name the file?, does opening raise if a size changed?"""
    copy = work / "corrupt"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished, copy)
    path = CORRUPTIONS[kind](copy, rng)
    is_shard = path.suffix == ".tok"
    size_changed = is_shard and (
        not path.is_file() or path.stat().st_size != (finished / path.relative_to(copy)).stat().st_size
    )
    try:
        named = any(str(path) in problem for problem in verify(copy))
    except DataError as error:
        named = str(path) in str(error)
    if path.name == "prepare.json" and not path.exists():
        named = True  # shards may be copied without it; it is only needed to continue
    try:
        ShardSet(copy)
        rejected = False
    except DataError:
        rejected = True
    return named, rejected or not size_changed


def make_tokenizer(work: Path) -> Path:
    from tests.conftest import make_tiny_tokenizer

    return make_tiny_tokenizer(work / "tokenizer")


def main() -> None:
    options = measure.arguments(__doc__).parse_args()
    num_kills, num_corruptions = (5, 20) if options.quick else (200, 400)
    rng = random.Random(0)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        trials = KillTrials(work, make_tokenizer(work))
        results = [trials.one(rng) for _ in range(num_kills)]
        rows.append(["kill -9 during prepare, then rerun", num_kills, sum(same for same, _, _ in results)])
        hits, kept = sum(hit for _, hit, _ in results), sum(kept for _, _, kept in results)
        passed: Counter[str] = Counter()
        rejected = 0
        for number in range(num_corruptions):
            kind = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
            named, opening_ok = corrupt_once(trials.expected, work, kind, rng)
            passed[kind] += named
            rejected += opening_ok
        rows += [
            [f"{kind}: named by verify", num_corruptions // len(CORRUPTIONS), passed[kind]] for kind in CORRUPTIONS
        ]
        rows.append(["size changes rejected at opening (others need not be)", num_corruptions, rejected])
    figures = {"rows": rows, "kills_that_hit": hits, "shards_kept_by_killed_runs": kept}
    measure.publish("Preparation under kills and corruption", ["trial", "tried", "passed"], rows, figures, options.json)
    print(f"{hits} kills hit a running process; {kept} finished shards were kept across them.")


if __name__ == "__main__":
    main()
