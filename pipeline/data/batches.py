"""Shards to batches: `BatchSource` turns sample numbers into rows, `Prefetcher` keeps the next batches ready.

    sample numbers -> TemperatureSampler -> HeldOut (rows that may be trained on) -> ShardSet -> int64 [n, seq_len]

There are no worker processes: a whole batch is gathered from the memory maps at once, one thread ahead of the training.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import xxhash

from data_prep.shards import DataError, ShardSet
from pipeline.data.sampler import HeldOut, TemperatureSampler

LARGEST_HELDOUT_SHARE = 0.1
_ORDER_VERSION = 1  # part of the fingerprint: raise it when the sampler's order changes


class BatchSource:
    """Rows for training and for evaluation, as pure functions of sample numbers."""

    def __init__(
        self,
        shards: ShardSet,
        seq_len: int,
        alpha: float,
        seed: int,
        heldout_rows_per_language: int,
        max_epochs: float | None = None,
        languages: Sequence[str] | None = None,
    ) -> None:
        self.shards, self.seq_len = shards, seq_len
        self.languages = sorted(languages) if languages else list(shards.languages)
        rows = [shards.num_rows(language, seq_len) for language in self.languages]
        heldout = [heldout_count(count, heldout_rows_per_language) for count in rows]
        self._refuse_too_small(rows, heldout)
        self._split = HeldOut(rows, heldout)
        self._sampler = TemperatureSampler(self._split.training_per_language, alpha, seed, max_epochs)
        order = {
            "order_version": _ORDER_VERSION,
            "shards": shards.fingerprint,
            "languages": self.languages,
            "seq_len": seq_len,
            "alpha": alpha,
            "seed": seed,
            "heldout": heldout,
            "max_epochs": max_epochs,
        }
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(order, sort_keys=True).encode())

    def _refuse_too_small(self, rows: list[int], heldout: list[int]) -> None:
        small = [
            f"{language} ({self.shards.num_tokens(language)} tokens)"
            for language, count, kept in zip(self.languages, rows, heldout, strict=True)
            if count - kept < 1
        ]
        if small:
            need = (self.seq_len - 2) * (2 if any(heldout) else 1)
            raise DataError(
                f"Too little text at sequence length {self.seq_len} in {', '.join(small)}: one row for training and the "
                f"held-out rows need {need} tokens. Prepare more text, use a shorter row (--set seq_len=N), or leave them "
                "out (--set languages=[...])."
            )

    def locate(self, sample_numbers: np.ndarray) -> list[tuple[str, int]]:
        """Language and row in the shards of each sample: what a report on a bad batch names."""
        language_index, rows = self._place(sample_numbers)
        return [(self.languages[index], int(row)) for index, row in zip(language_index, rows, strict=True)]

    def _place(self, sample_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        language_index, number = self._sampler(np.asarray(sample_numbers, dtype=np.int64).reshape(-1))
        return language_index, self._split.training_rows(language_index, number)

    def batch(self, sample_numbers: np.ndarray) -> np.ndarray:
        """int64 [n, seq_len]; row i belongs to sample_numbers[i], whatever else is in the batch."""
        language_index, rows = self._place(sample_numbers)
        out = np.empty((len(rows), self.seq_len), dtype=np.int64)
        for index in np.unique(language_index):
            mine = np.flatnonzero(language_index == index)
            out[mine] = self.shards.rows(self.languages[index], rows[mine], self.seq_len)
        return out

    def heldout(self, language: str) -> np.ndarray:
        """The held-out rows of a language, int64 [h, seq_len]; none of them is ever in a batch."""
        if language not in self.languages:
            raise DataError(f"No held-out rows of {language!r}; this run uses {', '.join(self.languages)}.")
        rows = self._split.heldout_rows(self.languages.index(language))
        return self.shards.rows(language, rows, self.seq_len)


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
        self._ready: queue.Queue[torch.Tensor | BaseException | None] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(sample_numbers),), name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self, sample_numbers: Iterator[np.ndarray]) -> None:
        try:
            for numbers in sample_numbers:
                batch = torch.from_numpy(self._source.batch(numbers))
                if not self._put(batch.pin_memory() if self._pin_memory else batch):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: torch.Tensor | BaseException | None) -> bool:
        """Wait for a free place; False once the consumer has closed."""
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[torch.Tensor]:
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
