"""Cutting text into blocks: the same bytes give the same blocks, cuts are at blank lines if possible, and no byte is lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.blocks import Block, cut_blocks


def small_blocks(pieces: list[bytes]) -> list[Block]:
    return list(cut_blocks(iter(pieces), block_bytes=64, max_document_bytes=256))


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` cut into pieces of these sizes, repeatedly."""
    cut, result = 0, []
    for size in itertools.cycle(sizes):
        if cut >= len(data):
            return result
        result.append(data[cut : cut + size])
        cut += size
    return result


text = st.lists(
    st.sampled_from(["word ", "täglich", "\n", "\n\n", "\r\n\r\n", "\n\u00a0\n", "你好", "x" * 70]), max_size=120
).map(lambda parts: "".join(parts).encode())


@settings(max_examples=80, deadline=None)
@given(data=text, sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_blocks_do_not_depend_on_the_pieces_of_the_input(data: bytes, sizes: list[int]) -> None:
    blocks = small_blocks([data] if data else [])
    assert blocks == small_blocks(pieces(data, sizes))
    assert b"".join(block.text for block in blocks) == data
    assert [block.end for block in blocks] == list(itertools.accumulate(len(block.text) for block in blocks))
    for block in blocks:
        block.text.decode()  # no character is cut in two
        assert len(block.text) <= 256


@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n", b"\n \t\n", b"\n\xc2\xa0\n", b"\n\xe3\x80\x80\r\n"])
def test_short_documents_are_not_split(separator: bytes) -> None:
    documents = [b"%04d" % number + b" tail" * (number % 30) for number in range(80)]
    cut = small_blocks([separator.join(documents)])
    assert len(cut) > 20
    again = [part for block in cut for part in block.text.split(separator) if part]
    assert again == documents
    assert not any(block.was_split for block in cut)


def test_long_documents_are_cut_at_lines_and_long_lines_at_spaces() -> None:
    lines = small_blocks([b"a line of text\n" * 40])
    assert lines[0].was_split
    assert all(block.text.endswith(b"\n") for block in lines)
    words = small_blocks([b"word " * 200])
    assert words[0].was_split
    assert all(block.text.endswith(b" ") for block in words)
    assert not words[-1].was_split
