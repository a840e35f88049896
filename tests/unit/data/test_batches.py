"""Batches: the row of a sample number, held-out rows, prefetching, and where errors are raised."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.shards import DataError, ShardSet
from pipeline.config import load_recipe
from pipeline.data.batches import PLAN_WINDOW, BatchOptions, BatchSource, Prefetcher, heldout_count
from pipeline.training.checks import open_data


@pytest.fixture(scope="module")
def shards(tiny_shards: Path) -> ShardSet:
    return ShardSet(tiny_shards)


def make_source(shards: ShardSet, **changes: object) -> BatchSource:
    settings = {"seq_len": 32, "alpha": 0.3, "seed": 0, "heldout_rows": 4} | changes
    return BatchSource(shards, BatchOptions(**settings))  # type: ignore[arg-type]


def test_every_sample_is_the_row_that_locate_names(shards: ShardSet) -> None:
    source = make_source(shards)
    numbers = np.array([5, 3, 5, 10**6, PLAN_WINDOW - 1, PLAN_WINDOW, 0])
    batch = source.batch(numbers)
    assert batch.dtype == np.int64
    assert batch.shape == (7, 32)
    for row, (language, number) in zip(batch, source.locate(numbers), strict=True):
        assert row.tolist() == shards.rows(language, [number], 32)[0].tolist()
    assert np.array_equal(source.batch(numbers[::-1]), batch[::-1])


def test_held_out_rows_are_never_in_a_batch(shards: ShardSet) -> None:
    source = make_source(shards)
    trained = set(source.locate(np.arange(30_000)))
    for language in source.languages:
        rows = shards.num_rows(language, 32)
        assert {row for name, row in trained if name == language} <= set(range(rows))
        heldout = source.heldout(language).tolist()
        assert len(heldout) == heldout_count(rows, 4)
        missing = set(range(rows)) - {row for name, row in trained if name == language}
        assert sorted(shards.rows(language, sorted(missing), 32).tolist()) == sorted(heldout)


def test_held_out_rows_do_not_depend_on_the_seed(shards: ShardSet) -> None:
    first, second = make_source(shards, seed=0), make_source(shards, seed=1)
    assert np.array_equal(first.heldout("tr"), second.heldout("tr"))
    assert not np.array_equal(first.batch(np.arange(8)), second.batch(np.arange(8)))


@pytest.mark.parametrize(
    ("rows", "requested", "expected"), [(1000, 16, 16), (100, 16, 10), (15, 16, 1), (2, 16, 1), (50, 0, 0)]
)
def test_at_most_a_tenth_of_a_language_is_held_out(rows: int, requested: int, expected: int) -> None:
    assert heldout_count(rows, requested) == expected


def test_too_little_text_names_languages_tokens_and_need(shards: ShardSet) -> None:
    with pytest.raises(
        DataError,
        match=rf"sw \({shards.num_tokens('sw')} tokens\).* need 8596 tokens.*--set seq_len=1325.*--set 'languages=.tr.'",
    ):
        make_source(shards, seq_len=4300)
    assert make_source(shards, seq_len=4300, languages=["tr"]).languages == ["tr"]
    with pytest.raises(DataError, match="No language 'xx'"):
        make_source(shards, languages=["xx"])


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 33},
        {"alpha": 0.4},
        {"seed": 1},
        {"heldout_rows": 3},
        {"max_epochs": 3},
        {"languages": ["hi", "tr"]},
        {"unit": "bytes"},
        {"weights": {"he": 1, "hi": 1, "sw": 1, "tr": 2}},
    ],
)
def test_the_fingerprint_covers_everything_that_decides_the_order(shards: ShardSet, change: dict[str, object]) -> None:
    assert make_source(shards).fingerprint == make_source(shards).fingerprint
    assert make_source(shards, **change).fingerprint != make_source(shards).fingerprint


def test_units_and_weights_decide_the_shares(shards: ShardSet) -> None:
    for unit, count in (
        ("tokens", shards.num_tokens),
        ("documents", shards.num_documents),
        ("bytes", shards.num_bytes),
    ):
        source = make_source(shards, alpha=1.0, unit=unit, max_epochs=None)
        sizes = np.array([count(language) for language in source.languages])
        assert source._sampler.weights.tolist() == pytest.approx((sizes / sizes.sum()).tolist())
    with pytest.raises(DataError, match="unit is 'lines'"):
        make_source(shards, unit="lines")
    with pytest.raises(DataError, match="one weight for each"):
        make_source(shards, weights={"tr": 1.0})


def test_samples_beyond_max_epochs_are_an_error(shards: ShardSet) -> None:
    source = make_source(shards, max_epochs=1, languages=["sw"])
    number = source._sampler.num_samples
    assert number == shards.num_rows("sw", 32) - 4
    assert source.batch(np.arange(number)).shape == (number, 32)
    with pytest.raises(DataError, match="under max_epochs"):
        source.batch(np.array([number]))


def test_a_capped_language_lasts_as_long_as_the_planned_run(tiny_recipe: Path) -> None:
    """With a recipe. Without the planned length, sw would be left out after its two epochs, in the first half."""
    sets = ["max_epochs=2", "languages=[sw,tr]", "alpha=0", "steps=250"]
    source = open_data(load_recipe(tiny_recipe, sets))
    places = source.locate(np.arange(250 * 8))
    rows_of_sw = source.shards.num_rows("sw", 32) - 2
    halves = [sum(language == "sw" for language, _ in half) for half in (places[:1000], places[1000:])]
    assert sum(halves) == pytest.approx(2 * rows_of_sw, abs=2)
    assert min(halves) > 0.8 * rows_of_sw
    with pytest.raises(DataError, match=r"under max_epochs there are .* lower steps"):
        open_data(load_recipe(tiny_recipe, [*sets, "steps=100000"]))


def test_segments_are_the_documents_of_the_rows(shards: ShardSet) -> None:
    source = make_source(shards, documents="separate")
    numbers = np.arange(40)
    ids, segments = (part.numpy() for part in source.training_batch(numbers))
    assert np.array_equal(ids, source.batch(numbers))
    assert (segments.sum(axis=1) == 32).all()
    for (language, row), lengths in zip(source.locate(numbers), segments, strict=True):
        assert lengths[lengths > 0].tolist() == shards.segments(language, [row], 32)[0].tolist()


def batches_of(size: int, count: int) -> Iterator[np.ndarray]:
    return (np.arange(start * size, (start + 1) * size) for start in range(count))


def test_prefetched_batches_are_the_batches_in_order(shards: ShardSet) -> None:
    source = make_source(shards)
    with Prefetcher(source, batches_of(8, 20)) as prefetcher:
        got = list(prefetcher)
    assert len(got) == 20
    assert all(batch.input_ids_BL.dtype == torch.int64 and batch.segments_BS is None for batch in got)
    assert np.array_equal(torch.cat([batch.input_ids_BL for batch in got]).numpy(), source.batch(np.arange(160)))
    assert prefetcher.wait_s >= 0


def test_an_error_in_the_thread_is_raised_in_the_consumer(shards: ShardSet) -> None:
    def numbers() -> Iterator[np.ndarray]:
        yield np.arange(4)
        raise DataError("the disk is gone")

    with Prefetcher(make_source(shards), numbers()) as prefetcher:
        batches = iter(prefetcher)
        next(batches)
        with pytest.raises(DataError, match="the disk is gone"):
            next(batches)


def test_closing_early_leaves_no_thread(shards: ShardSet) -> None:
    before = threading.active_count()
    with Prefetcher(make_source(shards), batches_of(8, 10**9)) as prefetcher:
        next(iter(prefetcher))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
