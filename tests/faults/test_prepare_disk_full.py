"""A full disk during `prepare`: finished shards stay, incomplete files do not, and the same command continues."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from data_prep.shard_writer import ShardWriter
from data_prep.shards import DataError
from tests.unit.data_prep.corpus import content, run, write_corpus


class DiskFull:
    """Accepts `allowed` bytes and then behaves like a full disk."""

    def __init__(self, allowed: int) -> None:
        self.left = allowed

    def check(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("num_workers", "allowed"), [(1, 0), (1, 5_000), (1, 330_000), (2, 150_000)])
def test_a_full_disk_stops_cleanly_and_the_rerun_continues(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, allowed: int
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    disk, write = DiskFull(allowed), ShardWriter._write

    def limited(self: ShardWriter, data: bytes) -> None:
        disk.check(len(data))
        write(self, data)

    monkeypatch.setattr(ShardWriter, "_write", limited)
    with pytest.raises(DataError, match=r"the disk is full\. Every finished shard is kept"):
        run(corpus, tiny_tokenizer, tmp_path / "shards", num_workers=num_workers)
    left = content(tmp_path / "shards")
    assert not [name for name in left if name.endswith((".tmp", "manifest.json"))]
    assert sum(len(data) for name, data in left.items() if name.endswith(".tok")) <= allowed + 5000 * len(left)
    monkeypatch.undo()
    assert run(corpus, tiny_tokenizer, tmp_path / "shards") == []
    assert run(corpus, tiny_tokenizer, tmp_path / "undisturbed") == []
    assert content(tmp_path / "shards") == content(tmp_path / "undisturbed")
