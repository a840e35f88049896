"""Shards to batches: `BatchSource` turns sample numbers into rows, `Prefetcher` gathers the next batches in a thread.

    sample numbers -> TemperatureSampler -> HeldOut (rows for training) -> ShardSet -> int64 [n, seq_len]

There are no worker processes: one thread gathers each batch from the memory maps, a few batches ahead of the training.

Shape suffixes: B rows of the batch, L tokens of a row, S documents of a row.
"""

from __future__ import annotations

import json
import queue
import shlex
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from data_prep.shards import DataError, ShardSet
from pipeline.data.sampler import HeldOut, TemperatureSampler

LARGEST_HELDOUT_SHARE = 0.1
ORDER_VERSION = 1  # part of the fingerprint: raise it when the sampler's order changes
PLAN_WINDOW = 8192  # samples whose places are computed together, which costs a tenth of doing it batch by batch


class Batch(NamedTuple):
    """Token ids, and the lengths of each row's documents (padded with 0) where documents are kept apart."""

    input_ids_BL: torch.Tensor
    segments_BS: torch.Tensor | None

    def pinned(self) -> Batch:
        """The batch in pinned memory, from which a GPU copies asynchronously."""
        segments_BS = None if self.segments_BS is None else self.segments_BS.pin_memory()
        return Batch(self.input_ids_BL.pin_memory(), segments_BS)


@dataclass(frozen=True)
class BatchOptions:
    """Which rows of the shards are read, and in which order."""

    seq_len: int  # tokens of a row
    alpha: float  # temperature: shares of languages are proportional to size ** alpha
    seed: int
    heldout_rows: int  # per language, at most a tenth of it; never trained on
    max_epochs: float | None = None  # how often a language is repeated at most
    languages: Sequence[str] | None = None  # None: all in the shards
    unit: str = "tokens"  # what a language's size is counted in: tokens, documents or bytes
    weights: Mapping[str, float] | None = None  # shares by language, instead of the temperature
    # Samples of the planned run. With it, `max_epochs` lowers a small language's share from the start. Without it, the
    # language is left out after its last epoch.
    total_samples: int | None = None
    documents: str = "joined"  # separate: a `Batch` has the documents' lengths


class BatchSource:
    """Rows for training and for evaluation, as pure functions of sample numbers.

    Raises `DataError` if a language has too little text, or the options do not fit the shards.
    """

    def __init__(self, shards: ShardSet, options: BatchOptions) -> None:
        self.shards, self.options, self.seq_len = shards, options, options.seq_len
        self.languages = sorted(set(options.languages)) if options.languages else list(shards.languages)
        rows = [shards.num_rows(language, self.seq_len) for language in self.languages]
        self.rows_per_language = dict(zip(self.languages, rows, strict=True))
        self.heldout_counts = heldout = [heldout_count(count, options.heldout_rows) for count in rows]
        self._check_num_rows(rows, heldout)
        self._split = HeldOut(rows, heldout)
        sizes: Sequence[float] = self._sizes(options.unit)
        if options.weights is not None:
            sizes = self._weights_in_order(options.weights)
        self._sampler = TemperatureSampler(
            self._split.training_per_language,
            options.alpha if options.weights is None else None,
            options.seed,
            options.max_epochs,
            sizes=sizes,
            total_samples=options.total_samples,
        )
        if options.total_samples:
            self._sampler.check_bounds(np.array([options.total_samples - 1]))
        self._plan = lru_cache(maxsize=4)(self._plan_of_window)
        # everything that decides which tokens sample number n has
        self.order = {
            "order_version": ORDER_VERSION,
            "shards": shards.fingerprint,
            "languages": self.languages,
            "seq_len": options.seq_len,
            "alpha": options.alpha,
            "seed": options.seed,
            "unit": options.unit,
            "weights": dict(options.weights) if options.weights else None,
            "heldout": heldout,
            "max_epochs": options.max_epochs,
            "total_samples": options.total_samples if options.max_epochs is not None else None,
        }
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(self.order, sort_keys=True).encode())

    def _sizes(self, unit: str) -> list[int]:
        counts = {
            "tokens": self.shards.num_tokens,
            "documents": self.shards.num_documents,
            "bytes": self.shards.num_bytes,
        }
        if unit not in counts:
            raise DataError(f"The sampling unit is {unit!r}; it must be one of {', '.join(counts)}.")
        return [counts[unit](language) for language in self.languages]

    def _weights_in_order(self, weights: Mapping[str, float]) -> list[float]:
        if set(weights) != set(self.languages):
            raise DataError(
                f"Sampling weights are given for {', '.join(sorted(weights))}; the run's languages are "
                f"{', '.join(self.languages)}. Give one weight for each of them."
            )
        return [weights[language] for language in self.languages]

    def _check_num_rows(self, rows: list[int], heldout: list[int]) -> None:
        counts = zip(self.languages, rows, heldout, strict=True)
        small = [language for language, count, held_out in counts if count - held_out < 1]
        if small:
            need = (self.seq_len - 2) * (2 if any(heldout) else 1)
            shown = ", ".join(f"{language} ({self.shards.num_tokens(language)} tokens)" for language in small)
            enough = [language for language in self.languages if language not in small]
            named = f"languages=[{','.join(enough)}]"
            leave_out = f"--set {shlex.quote(named)}" if enough else "prepare other languages"
            raise DataError(
                f"Too little text at sequence length {self.seq_len} in {shown}: one row for training and the "
                f"held-out rows need {need} tokens. Prepare more text, use a shorter row (--set seq_len={self._longest_row()}), or "
                f"leave them out ({leave_out})."
            )

    def _longest_row(self) -> int:
        """The longest row for which every language has one for training and one held out, in tokens."""
        return max(3, min(self.shards.num_tokens(language) for language in self.languages) // 2 + 2)

    @property
    def shares(self) -> dict[str, float]:
        """Each language's share of all samples of the run."""
        return dict(zip(self.languages, self._sampler.weights.tolist(), strict=True))

    @property
    def uncapped_shares(self) -> dict[str, float]:
        """`shares` before `max_epochs` lowered them."""
        return dict(zip(self.languages, self._sampler.uncapped_weights.tolist(), strict=True))

    def locate(self, sample_numbers: np.ndarray) -> list[tuple[str, int]]:
        """Language and row in the shards of each sample, for reports on a batch."""
        language_index, rows = self._place(sample_numbers)
        return [(self.languages[index], int(row)) for index, row in zip(language_index, rows, strict=True)]

    def shard_files(self, language: str, row: int) -> list[str]:
        """The shard files, relative to the data directory, that hold a row's tokens; two where a shard ends in the row."""
        width, start, files = self.seq_len - 2, 0, []
        for shard in self.shards.shards(language):
            end = start + shard.num_tokens
            if start < (row + 1) * width and row * width < end:
                files.append(f"{language}/{shard.path.name}")
            start = end
        return files

    def _place(self, sample_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language index and row in the shards of each sample."""
        numbers = np.asarray(sample_numbers, dtype=np.int64).reshape(-1)
        self._sampler.check_bounds(numbers)
        windows = numbers // PLAN_WINDOW
        if len(numbers) and windows.min() == windows.max():  # almost every batch, in a tenth of the time
            window = int(windows[0])
            language_index, rows = self._plan(window)
            inside = numbers - window * PLAN_WINDOW
            return language_index[inside], rows[inside]
        language_index, rows = np.empty_like(numbers), np.empty_like(numbers)
        for window in np.unique(windows).tolist():
            mine = windows == window
            inside = numbers[mine] - window * PLAN_WINDOW
            language_index[mine], rows[mine] = (column[inside] for column in self._plan(window))
        return language_index, rows

    def _plan_of_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Language index and row of the `PLAN_WINDOW` samples of a window."""
        end = (window + 1) * PLAN_WINDOW
        if self._sampler.num_samples is not None:
            end = min(end, self._sampler.num_samples)
        language_index, number = self._sampler(np.arange(window * PLAN_WINDOW, end))
        return language_index, self._split.training_rows(language_index, number)

    def batch(self, sample_numbers: np.ndarray) -> np.ndarray:
        """Token ids, int64 [n, seq_len]. Row i depends on sample_numbers[i] alone."""
        return self.shards.gather(self.languages, *self._place(sample_numbers), self.seq_len)

    def training_batch(self, sample_numbers: np.ndarray) -> Batch:
        """The rows of these samples, with their documents where these are kept apart."""
        return self._batch_of(*self._place(sample_numbers))

    def _batch_of(self, language_index: np.ndarray, rows: np.ndarray) -> Batch:
        """Row rows[i] of language language_index[i] for every i."""
        places = self.languages, language_index, rows, self.seq_len
        ids_BL = torch.from_numpy(self.shards.gather(*places))
        apart = self.options.documents == "separate"
        return Batch(ids_BL, torch.from_numpy(self.shards.gather_segments(*places)) if apart else None)

    def heldout(self, language: str) -> np.ndarray:
        """The held-out rows of a language, int64 [h, seq_len]. None of them is ever in a training batch."""
        return self.shards.rows(language, self._heldout_rows(language), self.seq_len)

    def heldout_batch(self, languages: Sequence[str]) -> Batch:
        """The held-out rows of several languages, one after the other."""
        rows = [self._heldout_rows(language) for language in languages]
        numbers = [self.languages.index(language) for language in languages]
        return self._batch_of(np.repeat(numbers, [len(some) for some in rows]), np.concatenate(rows))

    def _heldout_rows(self, language: str) -> np.ndarray:
        if language not in self.languages:
            raise DataError(f"No held-out rows of {language!r}; this run uses {', '.join(self.languages)}.")
        return self._split.heldout_rows(self.languages.index(language))


def heldout_count(num_rows: int, requested: int) -> int:
    """Held-out rows of a language: at most a tenth of its rows, and at least one unless none is requested."""
    return min(requested, max(1, int(num_rows * LARGEST_HELDOUT_SHARE)))


class Prefetcher:
    """Iterator of batches for arrays of sample numbers, gathered by one thread up to `depth` batches ahead.

    Use it as a context manager or call `close`. An error in the thread is raised in the consumer. `wait_s` counts the
    seconds for which the consumer waited.
    """

    def __init__(
        self, source: BatchSource, sample_numbers: Iterable[np.ndarray], pin_memory: bool = False, depth: int = 4
    ) -> None:
        self.wait_s = 0.0
        self._source, self._pin_memory = source, pin_memory
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(sample_numbers),), name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self, sample_numbers: Iterator[np.ndarray]) -> None:
        try:
            for numbers in sample_numbers:
                batch = self._source.training_batch(numbers)
                if not self._put(batch.pinned() if self._pin_memory else batch):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        """Wait for a free place in the queue. Returns False once the consumer has closed."""
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Batch]:
        while not self._closing.is_set():
            start = time.perf_counter()
            item = self._ready.get()
            self.wait_s += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()
