"""Shards to batches: `BatchSource` turns sample numbers into rows, `Prefetcher` keeps the next batches ready.

    sample numbers -> TemperatureSampler -> HeldOut (rows that may be trained on) -> ShardSet -> int64 [n, seq_len]

There are no worker processes: a whole batch is gathered from the memory maps at once, one thread ahead of the training.
"""

from __future__ import annotations

import json
import queue
import shlex
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from data_prep.shards import DataError, ShardSet, padded
from pipeline.data.sampler import HeldOut, TemperatureSampler

LARGEST_HELDOUT_SHARE = 0.1
ORDER_VERSION = 1  # part of the fingerprint: raise it when the sampler's order changes
PLAN_WINDOW = 8192


class Batch(NamedTuple):
    """Rows of token ids and, where documents are kept apart, the lengths of each row's documents, filled up with 0."""

    input_ids_BL: torch.Tensor
    segments_BS: torch.Tensor | None

    def pinned(self) -> Batch:
        """The same in memory that a GPU copies from by itself."""
        segments_BS = None if self.segments_BS is None else self.segments_BS.pin_memory()
        return Batch(self.input_ids_BL.pin_memory(), segments_BS)


class BatchSource:
    """Rows for training and for evaluation, as pure functions of sample numbers.

    `unit` is what the temperature counts (tokens, documents or bytes of text); `weights` by language replaces it.
    `total_samples`, the planned run, lets `max_epochs` lower a small language's share from the start instead of dropping
    it when it has had its epochs. With `documents="separate"` a `Batch` says where documents end.
    """

    def __init__(
        self,
        shards: ShardSet,
        seq_len: int,
        alpha: float,
        seed: int,
        heldout_rows_per_language: int,
        max_epochs: float | None = None,
        languages: Sequence[str] | None = None,
        *,
        unit: str = "tokens",
        weights: Mapping[str, float] | None = None,
        total_samples: int | None = None,
        documents: str = "joined",
    ) -> None:
        self.shards, self.seq_len, self._separate = shards, seq_len, documents == "separate"
        self.languages = sorted(set(languages)) if languages else list(shards.languages)
        rows = [shards.num_rows(language, seq_len) for language in self.languages]
        self.rows_per_language = dict(zip(self.languages, rows, strict=True))
        self.heldout_counts = heldout = [heldout_count(count, heldout_rows_per_language) for count in rows]
        self._check_num_rows(rows, heldout)
        self._split = HeldOut(rows, heldout)
        self._sampler = TemperatureSampler(
            self._split.training_per_language,
            alpha,
            seed,
            max_epochs,
            sizes=self._sizes(unit),
            weights=None if weights is None else self._weights_in_order(weights),
            total_samples=total_samples,
        )
        if total_samples:
            self._sampler.check_bounds(np.array([total_samples - 1]))
        self._plan = lru_cache(maxsize=4)(self._plan_of_window)
        # everything that decides which tokens sample number n is made of
        self.order = {
            "order_version": ORDER_VERSION,
            "shards": shards.fingerprint,
            "languages": self.languages,
            "seq_len": seq_len,
            "alpha": alpha,
            "seed": seed,
            "unit": unit,
            "weights": dict(weights) if weights else None,
            "heldout": heldout,
            "max_epochs": max_epochs,
            "total_samples": total_samples if max_epochs is not None else None,
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
        small = [
            f"{language} ({self.shards.num_tokens(language)} tokens)"
            for language, count, kept in zip(self.languages, rows, heldout, strict=True)
            if count - kept < 1
        ]
        if small:
            need = (self.seq_len - 2) * (2 if any(heldout) else 1)
            enough = [
                language for language, count, kept in zip(self.languages, rows, heldout, strict=True) if count > kept
            ]
            named = f"languages=[{','.join(enough)}]"
            leave_out = f"--set {shlex.quote(named)}" if enough else "prepare other languages"
            raise DataError(
                f"Too little text at sequence length {self.seq_len} in {', '.join(small)}: one row for training and the "
                f"held-out rows need {need} tokens. Prepare more text, use a shorter row (--set seq_len={self._longest_row()}), or "
                f"leave them out ({leave_out})."
            )

    def _longest_row(self) -> int:
        """The sequence length at which every language has a row for training and one held out."""
        return max(3, min(self.shards.num_tokens(language) for language in self.languages) // 2 + 2)

    @property
    def shares(self) -> dict[str, float]:
        """Each language's share of the samples, for the whole run."""
        return dict(zip(self.languages, self._sampler.weights.tolist(), strict=True))

    @property
    def uncapped_shares(self) -> dict[str, float]:
        """The same before `max_epochs` lowered it."""
        return dict(zip(self.languages, self._sampler.uncapped_weights.tolist(), strict=True))

    def locate(self, sample_numbers: np.ndarray) -> list[tuple[str, int]]:
        """Language and row in the shards of each sample: what a report on a bad batch names."""
        language_index, rows = self._place(sample_numbers)
        return [(self.languages[index], int(row)) for index, row in zip(language_index, rows, strict=True)]

    def shard_files(self, language: str, row: int) -> list[str]:
        """The shard files, below the data directory, that a row's tokens lie in: one, or two where it spans an end."""
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
        if len(numbers) and windows.min() == windows.max():  # almost every batch; a tenth of the time of what follows
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
        """Many samples at once cost a tenth of the same samples batch by batch."""
        end = (window + 1) * PLAN_WINDOW
        if self._sampler.num_samples is not None:
            end = min(end, self._sampler.num_samples)
        language_index, number = self._sampler(np.arange(window * PLAN_WINDOW, end))
        return language_index, self._split.training_rows(language_index, number)

    def batch(self, sample_numbers: np.ndarray) -> np.ndarray:
        """int64 [n, seq_len]; row i belongs to sample_numbers[i], whatever else is in the batch."""
        return self.shards.gather(self.languages, *self._place(sample_numbers), self.seq_len)

    def segments(self, sample_numbers: np.ndarray) -> np.ndarray:
        """Document boundaries for attention that must not cross them: lengths per row, padded with 0 (ShardSet.segments)."""
        located = self.locate(sample_numbers)
        return padded([self.shards.segments(language, [row], self.seq_len)[0] for language, row in located])

    def training_batch(self, sample_numbers: np.ndarray) -> Batch:
        """What the training reads: rows, and their documents where these are kept apart."""
        segments = self.segments(sample_numbers) if self._separate else None
        return _as_batch(self.batch(sample_numbers), segments)

    def heldout(self, language: str) -> np.ndarray:
        """The held-out rows of a language, int64 [h, seq_len]; none of them is ever in a batch."""
        return self.shards.rows(language, self._heldout_rows(language), self.seq_len)

    def heldout_batch(self, languages: Sequence[str]) -> Batch:
        """The held-out rows of several languages, one after the other."""
        rows = np.concatenate([self.heldout(language) for language in languages])
        if not self._separate:
            return _as_batch(rows, None)
        parts = [self.shards.segments(name, self._heldout_rows(name), self.seq_len) for name in languages]
        return _as_batch(rows, padded([lengths for part in parts for lengths in part]))

    def _heldout_rows(self, language: str) -> np.ndarray:
        if language not in self.languages:
            raise DataError(f"No held-out rows of {language!r}; this run uses {', '.join(self.languages)}.")
        return self._split.heldout_rows(self.languages.index(language))


def _as_batch(rows: np.ndarray, segments: np.ndarray | None) -> Batch:
    return Batch(torch.from_numpy(rows), None if segments is None else torch.from_numpy(segments))


def heldout_count(num_rows: int, wanted: int) -> int:
    """At most a tenth of a language, at least one row, unless none is wanted."""
    return min(wanted, max(1, int(num_rows * LARGEST_HELDOUT_SHARE)))


class Prefetcher:
    """Batches for an iterator of sample-number arrays, gathered by one thread up to `depth` batches ahead.

    Iterate over it; use it as a context manager or call `close`. An error in the thread is raised in the consumer.
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
        """Wait for a free place; False once the consumer has closed."""
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
