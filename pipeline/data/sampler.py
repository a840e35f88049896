"""The row of sample number n, as a pure function of (seed, n). The state of the sampler is one integer.

    sample number -> cycle and place in it -> language (exact integer quotas) -> row (keyed permutation of its rows)

Every rank computes any sample directly, in any order. To resume, it starts counting at another number, and 1 or 8 ranks
see the same global order. Languages are drawn with weights ~ size ** alpha. At the end of every cycle each language has
its share to within one sample, and its rows have been visited equally often to within one visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shards import DataError

_U = np.uint64
_WEIGHT_BITS = 32  # weights are integers that add up to 2**32
_SMALLEST_CYCLE = 4096
_ROUNDS = 4
_LANGUAGE_STREAM, _ROW_STREAM, _HELDOUT_STREAM = 1, 2, 3


def mix(*parts: Any) -> np.ndarray:
    """One uniformly distributed 64-bit key from several integers or arrays of integers."""
    key = np.asarray(_U(0x6A09E667F3BCC909))
    with np.errstate(over="ignore"):
        for part in parts:
            key = (key ^ np.asarray(part).astype(_U)) * _U(0xD6E8FEB86659FD93)
            key = (key ^ (key >> _U(32))) * _U(0xD6E8FEB86659FD93)
            key = key ^ (key >> _U(29))
    return key


class KeyedPermutation:
    """Feistel permutations of [0, size), one size per group, with cycle walking.

    An image outside [0, size) is permuted again until it is inside. The halves may differ by one bit, so the domain is
    less than twice the size.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray) -> None:
        self.sizes = np.asarray(sizes, dtype=_U)
        bits = np.array([max(2, (int(size) - 1).bit_length()) for size in self.sizes], dtype=_U)
        self._low_bits = bits // _U(2)
        self._low_mask = (_U(1) << self._low_bits) - _U(1)
        self._high_mask = (_U(1) << (bits - self._low_bits)) - _U(1)

    def __call__(self, values: np.ndarray, group: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Image of each value under the permutation of its group and key. All arrays have the same length."""
        low_bits, low_mask = self._low_bits[group], self._low_mask[group]
        high_mask, sizes = self._high_mask[group], self.sizes[group]
        out = self._rounds(values.astype(_U), keys, low_bits, low_mask, high_mask)
        outside = np.flatnonzero(out >= sizes)
        while len(outside):
            walked = self._rounds(out[outside], keys[outside], low_bits[outside], low_mask[outside], high_mask[outside])
            out[outside] = walked
            outside = outside[walked >= sizes[outside]]
        return out.astype(np.int64)

    @staticmethod
    def _rounds(
        values: np.ndarray, keys: np.ndarray, low_bits: np.ndarray, low_mask: np.ndarray, high_mask: np.ndarray
    ) -> np.ndarray:
        low, high = values & low_mask, values >> low_bits
        round_key = keys.copy()
        for number in range(_ROUNDS):
            half, mask = (low, high_mask) if number % 2 == 0 else (high, low_mask)
            noise = (half + round_key) * _U(0x9E3779B97F4A7C15)
            noise ^= noise >> _U(32)
            noise *= _U(0xD6E8FEB86659FD93)
            noise >>= _U(29)
            noise &= mask
            if number % 2 == 0:
                high ^= noise
            else:
                low ^= noise
            round_key ^= round_key << _U(13)
            round_key ^= round_key >> _U(7)
        return (high << low_bits) | low


@dataclass(frozen=True)
class _Phase:
    """A part of the run with one set of weights. A new phase begins where a language has reached `max_epochs`."""

    start: int
    end: int
    boundaries: np.ndarray  # cumulative integer weights, [languages + 1]
    cycle: int
    visits_before: np.ndarray  # how often each language was drawn before `start`


class TemperatureSampler:
    """`language_index, row = sampler(sample_numbers)` for any array of sample numbers.

    Args:
        rows_per_language: number of rows of each language, at least 1.
        alpha: temperature: shares are proportional to size ** alpha. None: shares are proportional to `sizes`.
        seed: of the order.
        max_epochs: how often a language's rows are repeated at most; then it is left out and the others share its part.
        sizes: tokens, documents or bytes of each language, or weights; None: its rows.
        total_samples: samples of the planned run. `max_epochs` then lowers a language's share from the start, so that
            its epochs last to the end of the run.

    Raises:
        DataError: a language has no rows, or a limit or weight is not positive.
    """

    def __init__(
        self,
        rows_per_language: Sequence[int] | np.ndarray,
        alpha: float | None = 0.3,
        seed: int = 0,
        max_epochs: float | None = None,
        *,
        sizes: Sequence[float] | np.ndarray | None = None,
        total_samples: int | None = None,
    ) -> None:
        self.rows_per_language = np.asarray(rows_per_language, dtype=np.int64)
        self.seed = seed
        if len(self.rows_per_language) == 0 or self.rows_per_language.min() < 1:
            raise DataError("Every language needs at least one row to be sampled; leave out those without rows.")
        if max_epochs is not None and max_epochs <= 0:
            raise DataError(f"max_epochs is {max_epochs}; it must be above 0 (or left out for no limit).")
        base = self.rows_per_language if sizes is None else np.asarray(sizes)
        count = len(self.rows_per_language)
        self.weights = _normalised(base, count) if alpha is None else temperature_weights(base, alpha)
        self.uncapped_weights = self.weights
        caps = None
        if max_epochs is not None:
            caps = np.maximum(1, np.floor(self.rows_per_language * max_epochs)).astype(np.int64)
            if total_samples is not None:
                self.weights = fill_to_caps(self.weights, caps / total_samples)
        self._phases = _phases(self.weights, caps)
        self._starts = np.array([phase.start for phase in self._phases], dtype=np.int64)
        self._rows = KeyedPermutation(self.rows_per_language)

    @property
    def cycle(self) -> int:
        """Samples after which every language has its exact share (until `max_epochs` changes the shares)."""
        return self._phases[0].cycle

    @property
    def num_samples(self) -> int | None:
        """Number of samples under `max_epochs`; None: unlimited."""
        return None if self._phases[-1].end == _ENDLESS else self._phases[-1].end

    def __call__(self, sample_numbers: Any) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        language, visit = self.visits(numbers.reshape(-1))
        epoch, place = np.divmod(visit, self.rows_per_language[language])
        row = self._rows(place, language, mix(self.seed, _ROW_STREAM, language, epoch))
        return language.reshape(numbers.shape), row.reshape(numbers.shape)

    def visits(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language of each sample, and how often that language was drawn before it."""
        self.check_bounds(numbers)
        language, visit = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
        phase_of = np.searchsorted(self._starts, numbers, side="right") - 1
        for index in np.unique(phase_of):
            chosen = np.flatnonzero(phase_of == index)
            phase = self._phases[index]
            cycles = (numbers[chosen] - phase.start) // phase.cycle
            for cycle in np.unique(cycles):
                mine = chosen[cycles == cycle]
                language[mine], visit[mine] = self._visits_of_cycle(phase, int(cycle), numbers[mine])
        return language, visit

    def _visits_of_cycle(self, phase: _Phase, cycle: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin = phase.start + cycle * phase.cycle
        length = min(phase.cycle, phase.end - begin)
        key = np.broadcast_to(mix(self.seed, _LANGUAGE_STREAM, begin), numbers.shape)
        permutation = KeyedPermutation([length])
        place = permutation(numbers - begin, np.zeros(len(numbers), np.int64), key)
        before, after = (_drawn(phase.boundaries, begin - phase.start + offset) for offset in (0, length))
        ends = np.cumsum(after - before)
        language = np.searchsorted(ends, place, side="right")
        starts = ends - (after - before)
        return language, phase.visits_before[language] + before[language] + place - starts[language]

    def check_bounds(self, numbers: np.ndarray) -> None:
        """Raise `ValueError` or `DataError` if this sampler does not have these sample numbers."""
        if len(numbers) and int(numbers.min()) < 0:
            raise ValueError(f"sample numbers count from 0, got {int(numbers.min())}")
        if self.num_samples is not None and len(numbers) and int(numbers.max()) >= self.num_samples:
            raise DataError(
                f"Sample {int(numbers.max())} was requested, but under max_epochs there are {self.num_samples} samples. "
                "Raise max_epochs, lower steps, or prepare more text."
            )


_ENDLESS = 1 << 62


def temperature_weights(sizes: np.ndarray, alpha: float) -> np.ndarray:
    """Shares proportional to size ** alpha: with 1 as in the data, with 0 all languages equal."""
    raw = np.asarray(sizes, dtype=np.float64)
    smoothed = (raw / raw.sum()) ** alpha
    return smoothed / smoothed.sum()


def fill_to_caps(weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """Lower every share to its cap and give the rest to the others in proportion, until none is above (water-filling)."""
    if caps.sum() <= 1:
        return caps / caps.sum()
    filled, capped = weights.copy(), np.zeros(len(weights), bool)
    while np.any(over := (filled > caps) & ~capped):
        capped |= over
        free = 1 - caps[capped].sum()
        filled = np.where(capped, caps, weights * free / weights[~capped].sum())
    return filled


def _normalised(weights: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (count,) or not np.all(np.isfinite(given)) or np.any(given <= 0):
        raise DataError(f"Sampling weights must be {count} positive numbers, one per language; got {list(given)}.")
    return given / given.sum()


def _phases(weights: np.ndarray, caps: np.ndarray | None) -> list[_Phase]:
    drawn = np.zeros(len(weights), np.int64)
    active = np.ones(len(weights), bool)
    phases: list[_Phase] = []
    start = 0
    while active.any():
        boundaries = _integer_boundaries(np.where(active, weights, 0.0))
        shares = np.diff(boundaries)
        length = _ENDLESS - start
        if caps is not None:  # at most the share, rounded up, is drawn, so no language exceeds its cap within them
            lasts = [int(caps[i] - drawn[i]) * (1 << _WEIGHT_BITS) // int(shares[i]) for i in np.flatnonzero(active)]
            length = min(lasts)
            exhausted = np.flatnonzero(active)[np.array(lasts) == length]
        if length:
            cycle = _cycle_length(shares[active])
            phases.append(_Phase(start, start + length, boundaries, cycle, drawn.copy()))
        if caps is None:
            return phases
        drawn += _drawn(boundaries, length)
        start += length
        active[exhausted] = False
    return phases


def _integer_boundaries(weights: np.ndarray) -> np.ndarray:
    """Cumulative weights as integers up to 2**32; an active language has at least 1."""
    total = 1 << _WEIGHT_BITS
    shares = np.where(weights > 0, np.maximum(1, np.round(weights / weights.sum() * total)), 0).astype(np.int64)
    shares[int(shares.argmax())] += total - int(shares.sum())
    return np.concatenate([[0], np.cumsum(shares)]).astype(np.int64)


def _cycle_length(shares: np.ndarray) -> int:
    """The power of two for which the rarest language is drawn at least once per cycle, so that no quota is negative."""
    needed = -(-(1 << _WEIGHT_BITS) // int(shares.min()))
    return max(_SMALLEST_CYCLE, 1 << (needed - 1).bit_length())


def _drawn(boundaries: np.ndarray, num_samples: int) -> np.ndarray:
    """How often each language is drawn in the first `num_samples` of a phase. The exact sum is `num_samples`."""
    high, low = num_samples >> _WEIGHT_BITS, num_samples & ((1 << _WEIGHT_BITS) - 1)
    cumulative = boundaries.astype(_U) * _U(high) + ((boundaries.astype(_U) * _U(low)) >> _U(_WEIGHT_BITS))
    return np.diff(cumulative.astype(np.int64))


class HeldOut:
    """A stateless split of each language's rows: the first places of a fixed permutation are held out of the training.

    The split depends on the number of rows alone, not on the run's seed, so runs can be compared on the same text.
    """

    def __init__(self, rows_per_language: Sequence[int], heldout_per_language: Sequence[int]) -> None:
        self.heldout_per_language = np.asarray(heldout_per_language, dtype=np.int64)
        self.training_per_language = np.asarray(rows_per_language, dtype=np.int64) - self.heldout_per_language
        self._permutation = KeyedPermutation(rows_per_language)

    def heldout_rows(self, language_index: int) -> np.ndarray:
        """The held-out rows of a language."""
        places = np.arange(self.heldout_per_language[language_index], dtype=np.int64)
        return self._place_to_row(np.full(len(places), language_index), places)

    def training_rows(self, language_index: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The row of each training number in [0, rows - heldout)."""
        return self._place_to_row(language_index, number + self.heldout_per_language[language_index])

    def _place_to_row(self, language_index: np.ndarray, places: np.ndarray) -> np.ndarray:
        return self._permutation(places, language_index, mix(_HELDOUT_STREAM, language_index))
