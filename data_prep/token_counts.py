"""Counting how often each id of a vocabulary occurs in each language.

In: a shard directory, or sources as `prepare` reads them. Out: a `TokenCounts`, by which `vocabulary.py` chooses pieces.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from data_prep.blocks import cut_blocks
from data_prep.broken import BrokenLines
from data_prep.clean import CleanOptions
from data_prep.encode import Encoded
from data_prep.progress import progress
from data_prep.quality import warnings_of
from data_prep.shard_layout import TOKEN_DTYPE
from data_prep.shards import EOS_ID, ShardSet
from data_prep.sources import Source
from data_prep.tokenizer import Tokenizer
from data_prep.workers import WorkerPool

TOKENS_PER_STEP = 1 << 24
SAMPLE_TOKENS = 20_000  # of each language, to check the smaller tokenizer on


@dataclass
class TokenCounts:
    """For each language, how often each id occurs, and a sample of its text."""

    vocab_size: int
    end_id: int = EOS_ID  # ends a line
    counts: dict[str, np.ndarray] = field(default_factory=dict)  # int64 [vocab_size]
    samples: dict[str, np.ndarray] = field(default_factory=dict)  # the first ids, complete lines: int64

    def add(self, language: str, parts: Iterable[np.ndarray]) -> None:
        """Count the ids of one language, given in order."""
        total = np.zeros(self.vocab_size, dtype=np.int64)
        sample = np.empty(0, dtype=np.int64)
        for ids in parts:
            total += np.bincount(ids, minlength=self.vocab_size)
            if len(sample) < SAMPLE_TOKENS:
                sample = np.concatenate([sample, ids[: SAMPLE_TOKENS - len(sample)].astype(np.int64)])
        ends = np.flatnonzero(sample == self.end_id)
        self.counts[language] = total
        self.samples[language] = sample[: ends[-1] + 1] if len(ends) else sample


def token_counts_of_shards(shards: ShardSet) -> TokenCounts:
    """The counts of all languages of a shard directory."""
    counts = TokenCounts(shards.vocab_size, shards.eos_id)
    for language in progress(shards.languages, "counting", "language"):
        counts.add(language, _parts(shards, language))
    return counts


def _parts(shards: ShardSet, language: str) -> Iterator[np.ndarray]:
    for shard in shards.shards(language):
        for start in range(0, len(shard.tokens), TOKENS_PER_STEP):
            yield shard.tokens[start : start + TOKENS_PER_STEP]


def token_counts_of_text(texts: dict[str, list[Source]], tokenizer: Tokenizer, num_workers: int) -> TokenCounts:
    """The counts of text, encoded as `prepare` encodes it. Nothing is written."""
    counts = TokenCounts(tokenizer.vocab_size, tokenizer.special_ids.get("eos", EOS_ID))
    with WorkerPool(tokenizer, CleanOptions(), num_workers) as pool:
        for language, sources in progress(texts.items(), "counting", "language"):
            blocks = _encoded(sources, language, pool, num_workers)
            counts.add(language, (np.frombuffer(block.tokens, TOKEN_DTYPE) for block in blocks))
    return counts


def _encoded(sources: list[Source], language: str, pool: WorkerPool, num_workers: int) -> Iterator[Encoded]:
    """The encoded blocks in order, with a window in flight. Raises at the end if the text is in another encoding."""
    pending: deque[tuple[int, int, bytes, Future[Encoded]]] = deque()
    broken, counts = BrokenLines(sources, CleanOptions().broken_text), Counter[str]()

    def finished() -> Encoded:
        index, first_line, text, encoded = pending.popleft()
        broken.add(index, text, first_line, encoded.result().counts, is_end=False)
        counts.update(encoded.result().counts)
        return encoded.result()

    for index, source in enumerate(sources):
        first_line = 0
        for block in cut_blocks(source.chunks()):
            pending.append((index, first_line, block.text, pool.submit(block.text, language)))
            first_line += block.text.count(b"\n")
            if len(pending) > 2 * num_workers:
                yield finished()
        counts.update(source.counts)
    while pending:
        yield finished()
    for warning in [broken.warning(counts), *warnings_of(counts)]:
        if warning:
            print(f"warning: {language}: {warning}", file=sys.stderr)
