"""Speed of `prepare` compared with a bare SentencePiece loop and `datasets.map`, and its use of disk and memory.

    python benchmarks/bench_prepare.py [--tokenizer MODEL] [--quick] [--units] [--text DIR] [--json FILE]

Each contender is a process of its own that starts, loads its tokenizer, and reads the same file. Measured are the CPU seconds of
the process and its children, pinned to one core. The text is samples/ and the documentation of the installed packages, repeated.
"per megabyte" is the cost of the copies after the first, without the start. Compare ratios within one run, on an idle machine.
bench_prepare_workers.py measures two workers on two cores.

The last figures compare two ways of encoding, block by block in one process (`prepare_units.py`): `--engine auto` with `--engine
tokenizers` for three kinds of tokenizer.json, and `--unit word` with `--unit line` for the SentencePiece model. Their text is
samples/cc100, or a directory of LANG.txt or LANG.txt.xz; languages need more than 1 MB each, which is the size of a block, for
the figures of a long preparation. `--units` prints these alone.
"""

from __future__ import annotations

import argparse
import lzma
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks import measure, prepare_units  # noqa: E402
from data_prep.blocks import cut_blocks  # noqa: E402
from data_prep.clean import CleanOptions  # noqa: E402
from data_prep.encode import encode_block  # noqa: E402
from data_prep.shard_layout import Identity  # noqa: E402
from data_prep.shard_writer import ShardWriter  # noqa: E402
from data_prep.shards import ShardSet  # noqa: E402
from data_prep.sources import Source  # noqa: E402
from data_prep.tokenizer import SentencePieceTokenizer  # noqa: E402

TOKENIZER = REPO / "artifacts" / "teacher" / "sentencepiece.bpe.model"
BARE_LOOP = """
import sys, sentencepiece
processor = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as file:
    while lines := file.readlines(1 << 20):
        processor.encode([line for line in lines if line.strip()], out_type=int, num_threads=1)
"""
DATASETS_MAP = """
import sys, datasets, transformers
datasets.disable_progress_bars()
tokenizer = transformers.XLMRobertaTokenizer.from_pretrained(sys.argv[1])
text = datasets.load_dataset("text", data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])
text.map(lambda batch: {"ids": tokenizer(batch["text"])["input_ids"]}, batched=True, remove_columns=["text"])
"""


def collect_text(at_least_bytes: int) -> bytes:
    """Real text in CC-100's format: the sample corpus, both sides of the parallel sentences, package documentation."""
    parts = [lzma.open(path).read() for path in sorted((REPO / "samples" / "cc100").glob("*.xz"))]
    for path in sorted((REPO / "samples" / "parallel").glob("*.tsv")):
        columns = [line.split("\t")[:2] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        parts += ["\n".join(column).encode() for column in zip(*columns, strict=True)]
    for path in sorted(Path(sys.prefix).rglob("*")):
        if sum(map(len, parts)) >= at_least_bytes:
            break
        if path.suffix in {".md", ".rst", ".txt"} or path.name.startswith("LICENSE"):
            parts.append(path.read_bytes().decode("utf-8", "ignore").encode())
    return b"\n\n".join(parts) + b"\n\n"


def cpu_seconds(command: list[str], one_core: bool = True) -> tuple[float, float]:
    """CPU seconds of a command with all its children, and wall seconds."""
    pinned = ["taskset", "-c", "0", *command] if one_core else command
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    subprocess.run(pinned if one_core else command, cwd=REPO, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - start


class Bench:
    def __init__(self, work: Path, tokenizer: Path, text: bytes, copies: int) -> None:
        self.work, self.tokenizer, self.text_bytes = work, tokenizer, len(text) * copies
        self.plain, self.packed = work / "en.txt", work / "packed" / "en.txt.xz"
        self.plain.write_bytes(text * copies)
        self.packed.parent.mkdir()
        self.packed.write_bytes(
            b"".join([lzma.compress(text)] * copies)
        )  # a stream per copy: no repeats to profit from
        self.once = work / "once" / "en.txt"
        self.once.parent.mkdir()
        self.once.write_bytes(text)
        self.once_bytes = len(text)

    def prepare(self, source: Path, num_workers: int, one_core: bool = True) -> tuple[float, float]:
        output = self.work / "shards"
        shutil.rmtree(output, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "data_prep",
            "prepare",
            "--input",
            str(source),
            "--tokenizer",
            str(self.tokenizer),
        ]
        return cpu_seconds([*command, "--output", str(output), "--workers", str(num_workers)], one_core)

    def bare(self, source: Path) -> float:
        return cpu_seconds([sys.executable, "-c", BARE_LOOP, str(self.tokenizer), str(source)])[0]

    def unpack(self) -> float:
        return cpu_seconds(["sh", "-c", f"xz -dc '{self.packed}' > /dev/null"])[0]

    def datasets_map(self) -> float:
        """CPU seconds for one copy of the text, scaled to all copies."""
        cache = self.work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        command = [sys.executable, "-c", DATASETS_MAP, str(self.tokenizer.parent), str(self.once), str(cache)]
        return cpu_seconds(command)[0] * self.text_bytes / self.once_bytes


def in_turns(source: Path, model: Path, work: Path) -> float:
    """CPU seconds of the bare call over those of reading, encoding and writing, measured block by block in one process.

    The two alternate within a tenth of a second, so the ratio is also valid on a busy machine.
    """
    tokenizer, bare, full = SentencePieceTokenizer(model), 0.0, 0.0
    writer = ShardWriter(work, "en", 0, Identity(tokenizer.sha256, tokenizer.vocab_size, "00" * 16))
    blocks = cut_blocks(Source("en", source, source.name).chunks())
    while True:
        start = time.process_time()
        block = next(blocks, None)
        if block is None:
            break
        encoded = encode_block(tokenizer, block.text, "en", CleanOptions())
        writer.append(encoded.tokens, encoded.document_lengths)
        full += time.process_time() - start
        lines = [line for line in block.text.decode().split("\n") if line.strip()]
        start = time.process_time()
        tokenizer.processor.encode(lines, out_type=int, num_threads=1)
        bare += time.process_time() - start
    start = time.process_time()
    writer.finish()
    return bare / (full + time.process_time() - start)


def memory_of_a_giant_line(work: Path, tokenizer: Path, text: bytes, line_mb: int) -> tuple[float, float]:
    """Peak resident MiB of a preparing process on ordinary text, and on one line of `line_mb` megabytes."""
    peaks = []
    line = text.replace(b"\n", b" ")
    for name, data in (("ordinary", [text] * 4), ("giant", [line] * (line_mb * 10**6 // len(line)))):
        source = work / name / "en.txt"
        source.parent.mkdir()
        with open(source, "wb") as file:
            file.writelines(data)
        code = (
            "import resource, sys; from data_prep.__main__ import main; main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        arguments = [
            "prepare",
            "--input",
            str(source),
            "--tokenizer",
            str(tokenizer),
            "--output",
            str(work / f"{name}-out"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--workers", "1"],
            cwd=REPO,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
        shutil.rmtree(work / f"{name}-out")
        source.unlink()
    return peaks[0], peaks[1]


def parse() -> argparse.Namespace:
    parser = measure.arguments(__doc__)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="SentencePiece model")
    parser.add_argument("--repeats", type=int, help="rounds of all contenders; the table shows medians")
    parser.add_argument("--units", action="store_true", help="only the engine of a tokenizer.json and the unit `word`")
    parser.add_argument(
        "--text", type=Path, default=REPO / "samples" / "cc100", help="LANG.txt or LANG.txt.xz for these"
    )
    parser.add_argument("--tokenizer-json", nargs="+", default=[], metavar="KIND=DIR",
                        help="tokenizers to measure in place of trained ones; kinds: bpe, byte_bpe, wordpiece")  # fmt: skip
    options = parser.parse_args()
    if not options.tokenizer.is_file():
        parser.error(f"{options.tokenizer} does not exist: `make demo` makes it, or give --tokenizer")
    return options


def main() -> None:
    options = parse()
    copies, repeats = (2, 1) if options.quick else (8, options.repeats or 5)
    text = collect_text(8_500_000)
    rounds: dict[str, list[float]] = {}
    units = encoding_units(options, 1 if options.quick else 3)
    if options.units:
        return

    def note(name: str, value: float) -> None:
        rounds.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.tokenizer, text, copies)
        for _ in range(repeats):
            note("bare", bench.bare(bench.plain))
            note("plain", bench.prepare(bench.plain, 1)[0])
            note("bare once", bench.bare(bench.once))
            note("plain once", bench.prepare(bench.once, 1)[0])
            note("children once", bench.prepare(bench.once, 2)[0])
            note("xz", bench.prepare(bench.packed, 1)[0])
            note("unpack", bench.unpack())
            note("children", bench.prepare(bench.plain, 2)[0])
            note("in turns", in_turns(bench.plain, options.tokenizer, Path(directory)))
        shards = ShardSet(Path(directory) / "shards")
        tokens = shards.num_tokens("en")
        bytes_per_token = sum(shard.num_bytes for shard in shards.all_shards()) / tokens
        note("datasets.map", bench.datasets_map())
        peaks = memory_of_a_giant_line(Path(directory), options.tokenizer, text, 20 if options.quick else 1000)
    report(options, rounds, bench.text_bytes, tokens, bytes_per_token, peaks, units)


def encoding_units(options: argparse.Namespace, times: int) -> dict[str, object]:
    """The keys `tokenizer_json` and `unit_word` of the JSON file, and a table of them."""
    texts = prepare_units.texts_of(options.text)
    given = {kind: Path(path) for kind, _, path in (pair.partition("=") for pair in options.tokenizer_json)}
    with tempfile.TemporaryDirectory() as directory:
        engines = prepare_units.tokenizer_json(texts, Path(directory), given, times)
    unit = prepare_units.unit_word(texts, options.tokenizer, times)
    found = {
        "tokenizer_json": {kind: about["times"] for kind, about in engines.items()},
        "unit_word": unit["times"],
        "units": {"tokenizer_json": engines, "unit_word": unit},
    }
    names = [*engines, "unit word"]
    rows = [[name, *(about["by_language"][name] for about in (*engines.values(), unit))] for name in texts]
    rows.append(["all", *(about["times"] for about in (*engines.values(), unit))])
    measure.publish(
        f"Times as fast, {sum(map(len, texts.values())) / 1e6:.0f} MB of text; ids of a tokenizer.json all equal, of the unit "
        f"word {unit['equal_ids']:.4%}",
        ["language", *names], rows, found, options.json if options.units else None,
    )  # fmt: skip
    return found


def report(
    options: argparse.Namespace,
    rounds: dict[str, list[float]],
    text_bytes: int,
    tokens: int,
    bytes_per_token: float,
    peaks: tuple[float, float],
    units: dict[str, object],
) -> None:
    def ratio(above: list[float], below: list[float]) -> float:
        """Median of the ratios of the rounds."""
        return statistics.median(a / b for a, b in zip(above, below, strict=False))

    def per_megabyte(name: str) -> list[float]:
        return [a - b for a, b in zip(rounds[name], rounds[f"{name} once"], strict=True)]

    bare_and_unpack = [a + b for a, b in zip(rounds["bare"], rounds["unpack"], strict=True)]
    figures = {
        "block by block in turns: prepare .txt, share of the bare call's speed": statistics.median(rounds["in turns"]),
        "per megabyte: prepare .txt, share of the bare loop's speed": ratio(
            per_megabyte("bare"), per_megabyte("plain")
        ),
        "per megabyte: with two worker processes, children included": ratio(
            per_megabyte("bare"), per_megabyte("children")
        ),
        "prepare .txt, share of the bare loop's speed": ratio(rounds["bare"], rounds["plain"]),
        "the same with two worker processes, children included": ratio(rounds["bare"], rounds["children"]),
        "prepare .txt.xz, share of bare loop + xz -dc": ratio(bare_and_unpack, rounds["xz"]),
        "prepare .txt.xz, share of the bare loop alone": ratio(rounds["bare"], rounds["xz"]),
        "prepare .txt, times datasets.map + HF tokenizer": rounds["datasets.map"][0]
        / statistics.median(rounds["plain"]),
        "prepare .txt, M tokens per CPU second": tokens / statistics.median(rounds["plain"]) / 1e6,
        "prepare .txt, MB of text per CPU second": text_bytes / statistics.median(rounds["plain"]) / 1e6,
        "disk, bytes per token": bytes_per_token,
        "peak MiB of the process, ordinary text": peaks[0],
        f"peak MiB of the process, one line of {20 if options.quick else 1000} MB": peaks[1],
    }
    rows = [[name, value] for name, value in figures.items()]
    title = (
        f"Preparation: {text_bytes / 1e6:.0f} MB of text, {len(rounds['bare'])} rounds, start of every process included"
    )
    measure.publish(title, ["figure", "value"], rows, {"figures": figures, "seconds": rounds, **units}, options.json)


if __name__ == "__main__":
    main()
