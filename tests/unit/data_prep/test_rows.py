"""Reading rows across shards at any sequence length, and segments of documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.shard_layout import FORMAT_NAME, FORMAT_VERSION, Identity
from data_prep.shard_writer import ShardWriter
from data_prep.shards import DataError, ShardSet, manifest_digest

IDENTITY = Identity("ab" * 32, 50_000, "cd" * 16)


def write_shards(root: Path, documents_of_shards: list[list[int]], start: int = 10) -> np.ndarray:
    """Write shards of language xx whose tokens count up from `start`. Returns the stream."""
    (root / "xx").mkdir(parents=True)
    records, next_token = [], start
    for number, lengths in enumerate(documents_of_shards):
        writer = ShardWriter(root / "xx", "xx", number, IDENTITY)
        total = sum(lengths)
        writer.append(np.arange(next_token, next_token + total, dtype="<u4").tobytes(), np.array(lengths, np.uint64))
        next_token += total
        records.append(writer.finish())
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "tokenizer": {"sha256": IDENTITY.tokenizer_sha256, "vocab_size": IDENTITY.vocab_size},
        "options_xxh3_128": IDENTITY.options_xxh3_128,
        "languages": {"xx": {"shards": records, "text_bytes": 1}},
    }
    manifest["manifest_xxh3_128"] = manifest_digest(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return np.arange(start, next_token)


shard_lists = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=shard_lists, seq_len=st.integers(3, 14), seed=st.integers(0, 9))
def test_rows_are_consecutive_pieces_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], seq_len: int, seed: int
) -> None:
    root = tmp_path_factory.mktemp("rows")
    stream = write_shards(root, shards)
    opened, width = ShardSet(root), seq_len - 2
    num_rows = opened.num_rows("xx", seq_len)
    assert num_rows == len(stream) // width
    order = np.random.default_rng(seed).permutation(num_rows)
    rows = opened.rows("xx", order, seq_len)
    assert rows.dtype == np.int64
    assert rows.shape == (num_rows, seq_len)
    assert np.array_equal(rows[:, 1:-1], stream[: num_rows * width].reshape(num_rows, width)[order])
    assert (rows[:, [0, -1]] == [0, 2]).all()

    starts = np.cumsum([0, *[length for lengths in shards for length in lengths]])
    segments = opened.segments("xx", order, seq_len)
    assert (segments.sum(axis=1) == seq_len).all() if num_rows else True
    for row, lengths in zip(order, segments, strict=True):
        inside = starts[(starts > row * width) & (starts < (row + 1) * width)]
        assert np.cumsum(lengths[lengths > 0])[:-1].tolist() == (inside - row * width + 1).tolist()


def test_rows_out_of_range_and_too_short_lengths_are_rejected(tmp_path: Path) -> None:
    write_shards(tmp_path, [[30]])
    shards = ShardSet(tmp_path)
    for row in (-1, 5):
        with pytest.raises(DataError, match=f"Row {row} of xx"):
            shards.rows("xx", [row], 8)
    with pytest.raises(DataError, match="at least 3"):
        shards.num_rows("xx", 2)
    with pytest.raises(DataError, match="No language 'yy'"):
        shards.num_rows("yy", 8)


def test_a_token_beyond_the_vocabulary_names_row_and_language(tmp_path: Path) -> None:
    write_shards(tmp_path, [[30]], start=IDENTITY.vocab_size - 20)
    with pytest.raises(DataError, match=r"Token id 50003 in row 3 of xx .*beyond the vocabulary of 50000"):
        ShardSet(tmp_path).rows("xx", [0, 3], 8)


def test_a_swapped_shard_of_the_same_size_is_rejected_when_it_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path, [[30], [30]])
    first, second = tmp_path / "xx" / "00000.tok", tmp_path / "xx" / "00001.tok"
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match="header of shard"):
        ShardSet(tmp_path).rows("xx", [0], 8)
