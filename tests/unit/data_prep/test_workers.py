"""The pool of forked workers: each block gets its own result or error, and pools do not block each other."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from data_prep.clean import CleanOptions
from data_prep.encode import encode_block
from data_prep.shards import DataError
from data_prep.tokenizer import open_tokenizer
from data_prep.workers import WorkerPool
from tests.conftest import SAMPLES


def blocks_of_uneven_size() -> list[bytes]:
    text = lzma.open(SAMPLES / "cc100" / "tr.txt.xz").read()
    cuts = np.sort(np.random.default_rng(0).integers(0, len(text), 60)).tolist()
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_every_block_gets_its_own_result(tiny_tokenizer: Path, num_workers: int) -> None:
    tokenizer, options = open_tokenizer(tiny_tokenizer), CleanOptions()
    blocks = blocks_of_uneven_size()
    with WorkerPool(tokenizer, options, num_workers) as pool:
        futures = [pool.submit(text, "tr") for text in blocks]
        for text, future in zip(blocks, futures, strict=True):
            there, here = future.result(), encode_block(tokenizer, text, "tr", options)
            assert there.tokens == here.tokens
            assert there.document_lengths.tolist() == here.document_lengths.tolist()
            assert there.counts == here.counts


def test_an_error_stays_with_its_block(tiny_tokenizer: Path) -> None:
    with WorkerPool(open_tokenizer(tiny_tokenizer), CleanOptions(broken_text="fail"), 2) as pool:
        futures = [pool.submit(text, "en") for text in (b"good\n", b"bad \xff\n", b"good\n", b"good\n")]
        with pytest.raises(DataError, match="not UTF-8"):
            futures[1].result()
        assert len({futures[number].result().tokens for number in (0, 2, 3)}) == 1


def test_a_pool_ends_while_a_later_one_is_running(tiny_tokenizer: Path) -> None:
    """A fork inherits every open file. If it kept the pipes of the other workers open, they would wait indefinitely."""
    tokenizer = open_tokenizer(tiny_tokenizer)
    older = WorkerPool(tokenizer, CleanOptions(), 2)
    with WorkerPool(tokenizer, CleanOptions(), 2) as younger:
        older.close()
        assert younger.submit(b"still here\n", "en").result().counts["lines"] == 1
