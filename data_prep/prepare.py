"""`prepare`: every language of the input to shards, in parallel, resumable, the same bytes for any number of workers.

    input files --cut_blocks--> blocks --WorkerPool--> ids --ShardWriter--> LANG/NNNNN.tok --Journal--> manifest.json

The output directory remembers what it was begun with (`prepare.json`) and refuses everything else.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import xxhash
from tqdm import tqdm

from data_prep.clean import MAX_LINE_BYTES, CleanOptions
from data_prep.encode import Tokenizer, WorkerPool
from data_prep.journal import Journal
from data_prep.lane import Lane, LaneSettings, Stopped
from data_prep.layout import FORMAT_NAME, FORMAT_VERSION, Identity, write_durably
from data_prep.shards import MANIFEST_NAME, DataError
from data_prep.sources import BLOCK_BYTES, MAX_DOCUMENT_BYTES, Source, discover

RUN_NAME = "prepare.json"
DEFAULT_SHARD_TOKENS = 1 << 28
CORES_PER_READER = 6  # one .xz stream decompresses as fast as 8 to 10 cores tokenise


@dataclass
class PrepareConfig:
    inputs: list[Path]
    tokenizer: Path
    output: Path
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    language: str | None = None
    redo: list[str] = field(default_factory=list)
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    clean: CleanOptions = field(default_factory=CleanOptions)
    quiet: bool = False


def prepare(config: PrepareConfig) -> Path:
    """Run to the end; the path of the manifest. Raises DataError naming every language that could not be finished."""
    everything = discover(config.inputs, None if config.language is None else config.language)
    tokenizer = Tokenizer(config.tokenizer)
    about = describe(tokenizer, config)
    begin_output(config.output, about, list(everything))
    for language in config.redo:
        shutil.rmtree(config.output / language, ignore_errors=True)
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)
    identity = Identity(tokenizer.sha256, tokenizer.vocab_size, about["options_xxh3_128"])
    failures = run_lanes(config, everything, tokenizer, identity)
    if failures:
        raise DataError(
            f"{len(failures)} of {len(everything)} languages could not be finished: " + " | ".join(failures)
        )
    return write_manifest(config.output)


def describe(tokenizer: Tokenizer, config: PrepareConfig) -> dict[str, Any]:
    """Everything that decides over the bytes of the shards, beside the text itself."""
    options = {
        "shard_tokens": config.shard_tokens,
        "block_bytes": BLOCK_BYTES,
        "max_document_bytes": MAX_DOCUMENT_BYTES,
        "max_line_bytes": MAX_LINE_BYTES,
        "sentencepiece": sentencepiece.__version__,
        **config.clean.as_dict(),
    }
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "pieces": tokenizer.num_pieces,
            "sentencepiece": sentencepiece.__version__,
        },
        "options": options,
        "options_xxh3_128": xxhash.xxh3_128_hexdigest(json.dumps(options, sort_keys=True).encode()),
    }


def begin_output(output: Path, about: dict[str, Any], languages: list[str]) -> None:
    """Make the directory, or make sure that it was begun with the same tokenizer and options."""
    run_file = output / RUN_NAME
    try:
        if run_file.is_file():
            begun = json.loads(run_file.read_text(encoding="utf-8"))
            refuse_differences(output, begun, about)
            missing = sorted(set(languages) - set(begun["languages"]))
            if not missing:
                return
            languages = sorted({*languages, *begun["languages"]})
            (output / MANIFEST_NAME).unlink(missing_ok=True)
        elif output.exists() and any(output.iterdir()):
            raise DataError(f"{output} exists and is no output of prepare. Give --output a new or empty directory.")
        output.mkdir(parents=True, exist_ok=True)
        write_durably(run_file, json.dumps({**about, "languages": languages}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"Cannot write to {output}: {error.strerror}. Give --output a writable directory.") from error


def refuse_differences(output: Path, begun: dict[str, Any], about: dict[str, Any]) -> None:
    for part in ("tokenizer", "options"):
        differing = [
            f"{key} {begun[part].get(key)!r} there, {value!r} now"
            for key, value in about[part].items()
            if begun[part].get(key) != value
        ]
        if differing:
            raise DataError(
                f"{output} was begun with another {part} ({'; '.join(differing)}). Nothing was changed. Use the same, "
                "or give --output a new directory."
            )


def run_lanes(
    config: PrepareConfig, sources: dict[str, list[Source]], tokenizer: Tokenizer, identity: Identity
) -> list[str]:
    """All languages, the largest first; what went wrong, one sentence per language."""
    sizes = {name: sum(source.stamp()["bytes"] for source in files) for name, files in sources.items()}
    failures: list[str] = []
    progress = Progress(sum(sizes.values()), quiet=config.quiet)
    settings = LaneSettings(
        config.output, identity, config.shard_tokens, 2 * config.num_workers + 2, progress.update, threading.Event()
    )
    num_lanes = min(len(sources), 1 + config.num_workers // CORES_PER_READER)
    pool = WorkerPool(tokenizer, config.clean, config.num_workers)

    def run_lane(language: str) -> None:
        if settings.stop.is_set():
            return
        try:
            Lane(language, sources[language], pool, settings).run()
            progress.finish(language, sizes[language])
        except DataError as error:
            failures.append(f"{language}: {error}")
        except Stopped:
            pass
        except BaseException:
            settings.stop.set()
            raise

    try:
        with ThreadPoolExecutor(num_lanes, thread_name_prefix="lane") as lanes:
            largest_first = sorted(sources, key=lambda name: (-sizes[name], name))
            try:
                for done in [lanes.submit(run_lane, language) for language in largest_first]:
                    done.result()
            except BaseException:
                settings.stop.set()
                raise
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise DataError(
            f"Stopped writing {config.output}: {reason}. Every finished shard is kept; make room and run the same "
            "command again."
        ) from error
    finally:
        pool.close()
        progress.close()
    return sorted(failures)


def write_manifest(output: Path) -> Path:
    """`manifest.json` from the journals, once every language that the directory was begun with is finished."""
    begun = json.loads((output / RUN_NAME).read_text(encoding="utf-8"))
    languages: dict[str, Any] = {}
    for language in begun.pop("languages"):
        journal = Journal.read(output / language)
        if not journal.complete:
            raise DataError(
                f"{output}: {language} is not finished, so there is no {MANIFEST_NAME} yet. Run prepare for it, then "
                f"`python -m data_prep merge {output}`."
            )
        assert journal.last is not None
        languages[language] = {
            "tokens": sum(shard["tokens"] for shard in journal.shards),
            "documents": sum(shard["documents"] for shard in journal.shards),
            "text_bytes": journal.last.counts["text_bytes"],
            "counts": journal.last.counts,
            "sources": [
                {key: value for key, value in source.items() if key != "mtime_ns"} for source in journal.last.finished
            ],
            "shards": journal.shards,
        }
    path = output / MANIFEST_NAME
    write_durably(path, json.dumps({**begun, "languages": languages}, indent=1, ensure_ascii=False) + "\n")
    return path


class Progress:
    """A bar over the bytes of the input files, with tokens per second."""

    def __init__(self, total_bytes: int, quiet: bool) -> None:
        self._bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            desc="prepare",
            disable=quiet,
            file=sys.stderr,
            mininterval=0.5,
        )
        self._lock = threading.Lock()
        self._read: dict[str, int] = {}
        self._tokens = 0

    def update(self, language: str, position: int, num_tokens: int) -> None:
        with self._lock:
            self._tokens += num_tokens
            step = position - self._read.get(language, 0)
            self._read[language] = position
            if step > 0:
                self._bar.update(step)
            elapsed = max(self._bar.format_dict["elapsed"], 1e-9) if not self._bar.disable else 1.0
            self._bar.set_postfix_str(f"{language} {self._tokens / elapsed / 1e6:.2f} M tokens/s", refresh=False)

    def finish(self, language: str, size: int) -> None:
        self.update(language, size, 0)

    def close(self) -> None:
        self._bar.close()
