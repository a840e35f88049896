"""Random corruption of finished shards: `verify` names the file. benchmarks/bench_prepare_faults.py runs 400 of these."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_prepare_faults import CORRUPTIONS, corrupt_once
from data_prep.shard_writer import ShardWriter
from data_prep.shards import ShardSet
from data_prep.verify import check_shard, verify
from tests.unit.data_prep.corpus import run, write_corpus
from tests.unit.data_prep.test_rows import IDENTITY, write_shards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    work = tmp_path_factory.mktemp("corruption")
    run(write_corpus(work / "corpus"), tiny_tokenizer, work / "shards")
    return work / "shards"


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupt_files_are_named_and_changed_sizes_do_not_open(finished: Path, tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    assert [corrupt_once(finished, tmp_path, kind, rng) for _ in range(15)] == [(True, True)] * 15


def test_corruption_is_located_to_the_block(tmp_path: Path) -> None:
    write_shards(tmp_path, [[40_000], [600_000]], start=4)
    file = tmp_path / "xx" / "00001.tok"
    data = bytearray(file.read_bytes())
    places = {
        9: "byte 9 of the header",
        4096 + (1 << 20) + 77: "block of bytes 1052672 to 2101247",
        4096 + (2 << 20) + 5: "block of bytes 2101248 to",
        len(data) - 3: "block of bytes 2101248 to",
    }
    for place, named in places.items():
        data[place] ^= 1
        file.write_bytes(data)
        data[place] ^= 1
        problem = check_shard(ShardSet(tmp_path).all_shards()[1])
        assert problem is not None
        assert str(file) in problem
        assert named in problem


def test_invalid_content_with_valid_hashes_is_found(tmp_path: Path) -> None:
    write_shards(tmp_path / "ids", [[50]], start=IDENTITY.vocab_size - 45)
    assert f"token id {IDENTITY.vocab_size} at byte {4096 + 45 * 4} is beyond" in verify(tmp_path / "ids")[0]
    write_shards(tmp_path / "documents", [[50, 0, 3]])
    assert "document offsets do not rise" in verify(tmp_path / "documents")[0]


def test_an_unfinished_shard_never_has_the_final_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "xx", 0, IDENTITY)
    writer.append(b"\1\0\0\0" * 100, np.array([100], "<u8"))
    assert not writer.path.exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []
