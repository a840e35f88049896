"""`prepare`: every language of the input to shards, in parallel and resumable, with the same bytes for any number of workers.

    files --Source--> text --cut_blocks--> blocks --WorkerPool--> ids --ShardWriter--> LANG/NNNNN.tok --Journal--> manifest

A `LanguageJob` for each language reads its text and writes its shards in order. The jobs share the tokenising processes.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.blocks import BLOCK_BYTES
from data_prep.clean import CleanOptions
from data_prep.discovery import LanguageRules, survey
from data_prep.disk import check_free_space, estimated_bytes
from data_prep.id_check import COMPARED, RECORD, check_languages
from data_prep.intake import announce, check_field, check_left_out, same_texts, write_list
from data_prep.journal import Journal
from data_prep.language_job import LanguageJob, LanguageJobSettings, Stopped, check_sources
from data_prep.manifest import DATA_SETS, begin_output, commits_of, describe, finish
from data_prep.progress import BYTES, Progress
from data_prep.reference import assumption, describe_reference
from data_prep.shard_layout import Identity
from data_prep.shards import MANIFEST_NAME, DataError
from data_prep.sources import ReadOptions, Source
from data_prep.tokenizer import FastTokenizer, Tokenizer, open_tokenizer
from data_prep.workers import WorkerDied, WorkerPool

DEFAULT_SHARD_TOKENS = 1 << 28  # 1 GiB
WORKERS_PER_JOB = 6  # one .xz stream decompresses as fast as 8 to 10 cores tokenise


@dataclass
class PrepareConfig:
    """The options of the command `prepare`; its `--help` describes them."""

    inputs: list[str]
    tokenizer: Path
    output: Path
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    rules: LanguageRules = field(default_factory=LanguageRules)
    reading: ReadOptions = field(default_factory=ReadOptions)
    clean: CleanOptions = field(default_factory=CleanOptions)
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    block_bytes: int = BLOCK_BYTES
    redo: list[str] = field(default_factory=list)
    may_add: bool = False
    quiet: bool = False
    strict_input: bool = False
    unit: str = "line"  # what SentencePiece encodes at a time: line | word
    engine: str = "auto"  # what encodes for a tokenizer.json: auto | kitoken | tokenizers


def prepare(config: PrepareConfig) -> list[str]:
    """Prepare the input. Returns the languages that are still to be prepared; if none, the manifest has been written."""
    surveyed = survey(config.inputs, config.rules, config.reading, commits_of(config.output))
    everything = surveyed.sources
    chosen = {config.rules.language: everything[config.rules.language]} if config.rules.language else everything
    check_redo(config, everything, chosen)
    if not config.quiet:
        announce(surveyed, chosen)
    if config.strict_input:
        check_left_out(surveyed)
    tokenizer = open_tokenizer(config.tokenizer, config.unit, config.engine)
    about = describe(tokenizer, config.clean, config.shard_tokens, config.block_bytes, config.reading)
    if surveyed.commits:
        about[DATA_SETS] = {name: [commit] for name, commit in sorted(surveyed.commits.items())}
    check_field(config.output, chosen, config.redo)
    if not config.quiet and (note := assumption(config.tokenizer, tokenizer.path)):
        print(note, file=sys.stderr)
    if not config.quiet and isinstance(tokenizer, FastTokenizer) and tokenizer.note:
        print(f"note: tokenizers makes the ids, which takes longer than kitoken: {tokenizer.note}.", file=sys.stderr)
    compared = check_languages(config.tokenizer, tokenizer, to_compare(config, chosen))
    about[RECORD] = describe_reference(config.tokenizer, tokenizer.path)
    begin_output(config.output, about, list(everything), config.may_add)
    write_list(config.output, surveyed)
    discard(config)
    identity = Identity(tokenizer.sha256, tokenizer.vocab_size, about["options_xxh3_128"])
    try:
        failures = run_language_jobs(config, chosen, tokenizer, identity, compared)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise DataError(
            f"Stopped writing to {config.output}: {reason}. Every finished shard is kept. Fix that and run the same "
            "command again."
        ) from error
    if failures:
        raise DataError(f"{len(failures)} of {len(chosen)} languages could not be finished. " + " | ".join(failures))
    for same in same_texts(config.output, list(chosen)):
        print(f"warning: {same}", file=sys.stderr)
    return finish(config.output)


def to_compare(config: PrepareConfig, sources: dict[str, list[Source]]) -> dict[str, list[Source]]:
    """The languages whose ids have not been compared with those of the reference tokenizer."""

    def is_compared(language: str) -> bool:
        last = Journal.read(config.output / language).last
        return last is not None and (last.complete or COMPARED in last.counts)

    # a journal that `--redo` deletes may be corrupt, so it is not read
    return {name: sources[name] for name in sources if name in config.redo or not is_compared(name)}


def check_redo(config: PrepareConfig, everything: Collection[str], chosen: Collection[str]) -> None:
    """Raise `DataError` if a language in `config.redo` would be deleted and not prepared again."""
    for language in config.redo:
        if language not in everything:
            raise DataError(f"--redo {language}: the input has no such language, only {', '.join(everything)}.")
        if language not in chosen:
            raise DataError(
                f"--redo {language}: with --language {config.rules.language} only that language is prepared, so the shards of "
                f"{language} would only be deleted. Nothing was deleted. Give --language {language}, or leave one of the two out."
            )


def discard(config: PrepareConfig) -> None:
    """Delete the shards of the languages in `config.redo`."""
    for language in config.redo:
        directory = config.output / language
        if directory.is_dir():
            with Journal(directory).locked():  # raises if another run is writing it
                (config.output / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(directory, ignore_errors=True)


def run_language_jobs(
    config: PrepareConfig,
    sources: dict[str, list[Source]],
    tokenizer: Tokenizer,
    identity: Identity,
    compared: Mapping[str, Counter[str]],
) -> list[str]:
    """Run the jobs of all unfinished languages, the largest first, a few at a time, each in a thread.

    Args:
        compared: by language, counts of the lines whose ids were compared before the first shard

    Returns:
        One sentence for each language that could not be finished.
    """
    failures: list[str] = []
    names = [name for name in sources if not finished_already(name, sources[name], config.output, failures)]
    if not names:
        return failures
    todo = {name: sources[name] for name in sorted(names, key=lambda name: (-size_of(sources[name]), name))}
    with WorkerPool(tokenizer, config.clean, config.num_workers) as pool:  # before any thread starts, because it forks
        needed = sum(still_needed(config.output / name, todo[name], tokenizer) for name in todo)
        free = check_free_space(config.output, needed)
        with closing(PrepareProgress(sum(map(size_of, todo.values())), needed, free, config.quiet)) as progress:
            settings = LanguageJobSettings(
                output=config.output,
                identity=identity,
                clean=config.clean,
                shard_tokens=config.shard_tokens,
                block_bytes=config.block_bytes,
                window=2 * config.num_workers + 2,
                on_progress=progress.update,
                compared=compared,
                engine=tokenizer.engine,
            )
            num_threads = min(len(todo), 1 + config.num_workers // WORKERS_PER_JOB)
            with ThreadPoolExecutor(num_threads, thread_name_prefix="language") as threads:
                jobs = [
                    threads.submit(_run_job, LanguageJob(name, todo[name], pool, settings), failures) for name in todo
                ]
                try:
                    for job in jobs:
                        job.result()
                finally:
                    settings.stop.set()
    return sorted(failures)


def _run_job(job: LanguageJob, failures: list[str]) -> None:
    """Run one job. If it fails with a `DataError` of its language, a sentence is added and the other jobs continue."""
    settings = job.settings
    if settings.stop.is_set():
        return
    try:
        job.run()
    except Stopped:
        return
    except BaseException as error:
        if not isinstance(error, DataError) or isinstance(error, WorkerDied):
            settings.stop.set()
            raise
        failures.append(f"{job.language}: {error}")
    settings.on_progress(job.language, size_of(job.sources), 0)


def size_of(sources: list[Source]) -> int:
    """Bytes of all files."""
    return sum(source.stamp()["bytes"] for source in sources)


def finished_already(language: str, sources: list[Source], output: Path, failures: list[str]) -> bool:
    """Whether a language is finished. If its input has changed since, a sentence is added to `failures`."""
    journal = Journal.read(output / language)
    if not journal.complete:
        return False
    try:
        check_sources(language, sources, journal)
    except DataError as error:
        failures.append(f"{language}: {error}")
    return True


def still_needed(directory: Path, sources: list[Source], tokenizer: Tokenizer) -> int:
    """Estimated bytes of the shards that a language still needs."""
    written = sum(shard["bytes"] for shard in Journal.read(directory).shards)
    return max(0, estimated_bytes(sources, tokenizer) - written)


class PrepareProgress:
    """Progress over the bytes of the input files, with time left, tokens per second and disk space."""

    def __init__(self, total_bytes: int, needed_bytes: int, free_bytes: int, quiet: bool) -> None:
        self._disk = f"disk {needed_bytes / 1e9:.2f} of {free_bytes / 1e9:.0f} GB free"
        self._progress = Progress("prepare", total_bytes, BYTES, is_shown=not quiet)
        self._lock = threading.Lock()
        self._read: dict[str, int] = {}
        self._tokens = 0

    def update(self, language: str, position: int, num_tokens: int) -> None:
        """Report the bytes of a language's sources that have been read, and new tokens. Jobs call this from their threads."""
        with self._lock:
            self._tokens += num_tokens
            step = max(0, position - self._read.get(language, 0))
            self._read[language] = max(position, self._read.get(language, 0))
            rate = self._tokens / max(self._progress.seconds, 0.1) / 1e6
            self._progress.note(f"{language}, {rate:.2f} M tokens/s, {self._disk}")
            self._progress.update(step)

    def close(self) -> None:
        self._progress.close()
