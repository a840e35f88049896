"""The sampler: exact shares, even visits, any order, any number of ranks, held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards import DataError
from pipeline.data.sampler import HeldOut, KeyedPermutation, TemperatureSampler, fill_to_caps, temperature_weights

LANGUAGES_100 = np.minimum((np.random.default_rng(0).pareto(0.6, 100) * 2000 + 300).astype(np.int64), 3_000_000)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5), key=st.integers(0, 2**63))
def test_a_keyed_permutation_is_a_permutation(sizes: list[int], key: int) -> None:
    permutation = KeyedPermutation(sizes)
    group = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate([np.arange(size) for size in sizes])
    images = permutation(values, group, np.full(len(values), key, np.uint64))
    for index, size in enumerate(sizes):
        assert sorted(images[group == index].tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    size, permutation = 1000, KeyedPermutation([1000])
    zeros = np.zeros(size, np.int64)
    images = np.stack([permutation(np.arange(size), zeros, np.full(size, key, np.uint64)) for key in range(200)])
    correlations = [abs(np.corrcoef(np.arange(size), image)[0, 1]) for image in images]
    assert np.mean(correlations) < 0.05
    fixed_points = (images == np.arange(size)).sum()
    assert 120 < fixed_points < 290  # 200 expected
    neighbours_kept = (np.diff(images, axis=1) == 1).mean()
    assert neighbours_kept < 0.003  # 0.001 expected
    first = np.bincount(images[:, 0] // 100, minlength=10)
    assert first.max() < 45  # 20 expected


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_shares_are_exact_at_every_cycle_end_over_100_languages(alpha: float) -> None:
    rows = LANGUAGES_100 if alpha < 1 else np.maximum(LANGUAGES_100 // 300, 20)
    sampler = TemperatureSampler(rows, alpha, seed=3)
    language, _ = sampler(np.arange(4 * sampler.cycle))
    for cycles in (1, 2, 3, 4):
        counts = np.bincount(language[: cycles * sampler.cycle], minlength=len(rows))
        expected = temperature_weights(rows, alpha) * cycles * sampler.cycle
        assert np.abs(counts - expected).max() <= 1


def test_rows_of_a_language_are_visited_equally_often() -> None:
    rows = np.array([7, 300, 4000])
    sampler = TemperatureSampler(rows, 0.5, seed=1)
    language, row = sampler(np.arange(11 * sampler.cycle))
    for index, count in enumerate(rows):
        visits = np.bincount(row[language == index], minlength=count)
        assert visits.max() - visits.min() <= 1
        assert len(visits) == count


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 10**12), seed=st.integers(0, 5))
def test_any_order_and_any_start_give_the_same_samples(start: int, seed: int) -> None:
    sampler = TemperatureSampler([5, 50, 500], 0.3, seed)
    numbers = np.arange(start, start + 200)
    language, row = sampler(numbers)
    order = np.random.default_rng(seed).permutation(200)
    shuffled_language, shuffled_row = TemperatureSampler([5, 50, 500], 0.3, seed)(numbers[order])
    assert np.array_equal(shuffled_language, language[order])
    assert np.array_equal(shuffled_row, row[order])
    assert [int(part) for part in sampler(int(start))] == [language[0], row[0]]
    assert (row < np.array([5, 50, 500])[language]).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_together_see_the_global_order(num_ranks: int) -> None:
    sampler, global_batch, steps = TemperatureSampler(LANGUAGES_100, 0.3, seed=9), 64, 300
    global_order = np.stack(sampler(np.arange(global_batch * steps)))
    share = global_batch // num_ranks
    pieces = [
        np.stack(TemperatureSampler(LANGUAGES_100, 0.3, seed=9)(step * global_batch + rank * share + np.arange(share)))
        for step in range(steps)
        for rank in range(num_ranks)
    ]
    assert np.array_equal(np.concatenate(pieces, axis=1), global_order)


def test_seeds_give_other_orders_with_the_same_shares() -> None:
    first, second = (TemperatureSampler([50, 500], 0.3, seed) for seed in (0, 1))
    one, other = first(np.arange(first.cycle)), second(np.arange(first.cycle))
    assert np.bincount(one[0]).tolist() == np.bincount(other[0]).tolist()
    assert (one[0] != other[0]).any()
    assert np.mean(one[1] == other[1]) < 0.1


def test_rows_of_a_language_come_in_another_order_under_another_seed() -> None:
    """Compared visit by visit, because another order of the languages could hide the same order of the rows."""
    orders = []
    for seed in (0, 1):
        sampler = TemperatureSampler([50, 500], 0.3, seed)
        numbers = np.arange(sampler.cycle)  # a full cycle: its visits of a language count from 0 without a gap
        (language, row), (_, visit) = sampler(numbers), sampler.visits(numbers)
        mine = language == 1
        orders.append(row[mine][visit[mine].argsort()][:400])
    assert np.mean(orders[0] == orders[1]) < 0.1


def test_cycles_and_epochs_come_in_another_order_each_time() -> None:
    sampler = TemperatureSampler([40, 400], 0.3, seed=0)
    language, row = sampler(np.arange(2 * sampler.cycle))
    assert (language[: sampler.cycle] != language[sampler.cycle :]).mean() > 0.1
    first, second = row[language == 0][:40], row[language == 0][40:80]
    assert (first != second).mean() > 0.5


def test_max_epochs_is_used_up_and_never_exceeded() -> None:
    rows = np.array([5, 100, 1000])
    sampler = TemperatureSampler(rows, 0.3, seed=1, max_epochs=2)
    assert sampler.num_samples is not None
    language, row = sampler(np.arange(sampler.num_samples))
    counts = np.bincount(language, minlength=3)
    assert (counts <= 2 * rows).all()
    assert (counts >= 2 * rows - 2).all()
    for index in range(3):
        assert np.bincount(row[language == index]).max() == 2
    with pytest.raises(DataError, match="under max_epochs there are"):
        sampler([sampler.num_samples])


def test_with_a_planned_length_capped_languages_last_to_the_end() -> None:
    rows = np.array([5, 100, 1000])
    sampler = TemperatureSampler(rows, 0.3, seed=1, max_epochs=2, total_samples=1000)
    language, _ = sampler(np.arange(1000))
    assert np.bincount(language).tolist() == pytest.approx([10, 200, 790], abs=2)
    last = language[500:]
    assert (last == 0).sum() == pytest.approx(5, abs=4)


def test_water_filling_gives_the_rest_to_the_others_in_proportion() -> None:
    filled = fill_to_caps(np.array([0.2, 0.2, 0.4, 0.2]), np.array([0.1, 1.0, 1.0, 1.0]))
    assert filled.tolist() == pytest.approx([0.1, 0.225, 0.45, 0.225])
    assert fill_to_caps(np.array([0.5, 0.5]), np.array([0.1, 0.3])).tolist() == pytest.approx([0.25, 0.75])


def test_sizes_replace_rows_and_without_a_temperature_they_are_the_weights() -> None:
    by_weight = TemperatureSampler([10, 10], alpha=None, sizes=[3, 1])
    assert np.bincount(by_weight(np.arange(by_weight.cycle))[0]).tolist() == [3072, 1024]
    by_size = TemperatureSampler([10, 10], alpha=1.0, sizes=[700, 300])
    assert by_size.weights.tolist() == pytest.approx([0.7, 0.3])
    rare = TemperatureSampler([10, 10], alpha=None, sizes=[1, 1e-6])
    language, _ = rare(np.arange(rare.cycle))
    assert (language == 1).sum() in (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows_per_language": [5, 0]}, "at least one row"),
        ({"rows_per_language": []}, "at least one row"),
        ({"rows_per_language": [5], "max_epochs": 0}, "max_epochs is 0"),
        ({"rows_per_language": [5, 6], "alpha": None, "sizes": [1]}, "must be 2 positive numbers"),
        ({"rows_per_language": [5, 6], "alpha": None, "sizes": [1, -1]}, "must be 2 positive numbers"),
        ({"rows_per_language": [5, 6], "alpha": None, "sizes": [1, float("nan")]}, "must be 2 positive numbers"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TemperatureSampler(**arguments)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(2, 200), min_size=1, max_size=6), requested=st.integers(1, 20))
def test_held_out_and_training_rows_together_are_the_language(rows: list[int], requested: int) -> None:
    heldout = [min(requested, count - 1) for count in rows]
    split = HeldOut(rows, heldout)
    for index, count in enumerate(rows):
        held_out = split.heldout_rows(index)
        numbers = np.arange(count - heldout[index])
        trained = split.training_rows(np.full(len(numbers), index), numbers)
        assert sorted([*held_out, *trained]) == list(range(count))
        assert len(held_out) == heldout[index]


def test_a_larger_held_out_split_contains_the_smaller() -> None:
    few, many = HeldOut([500], [5]).heldout_rows(0), HeldOut([500], [20]).heldout_rows(0)
    assert many[:5].tolist() == few.tolist()
