"""The merges of a BPE tokenizer: the pieces by which it arrives at a piece, and the merges among a set of pieces.

In: the pieces and merges of a tokenizer.json, in which a merge is a pair or a string "a b". Out: for each piece its parts.

Why these parts are enough: BPE splits a word into symbols and applies the merge of lowest rank, leftmost first, until none
applies. Let M be the merges of a word, and keep any merges that contain M, in their order. By induction both tables have the
same symbols after each step: the next merge of M was the lowest of more candidates, so it is the lowest of fewer. When M ends,
the full table has no merge left, nor has the smaller one. M is known from the pieces of the word alone: no merge crosses the
border of a final piece, so the merges inside are those that the piece's own symbols would get, and `parts` applies them.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from data_prep.shards import DataError

Pair = tuple[str, str]


class MergeTable:
    """The merges of one tokenizer.

    Args:
        model: the `model` of a tokenizer.json of type BPE
        fixed: pieces that stand for something else than their text (unknown token, single bytes) and are never merged
        name: of the file, for messages

    Raises:
        DataError: the pieces that a merge needs or makes cannot be determined.
    """

    def __init__(self, model: dict[str, Any], fixed: Collection[str], name: str) -> None:
        self._listed: list[Any] = model.get("merges", [])
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        self._pieces: dict[str, int] = model["vocab"]
        for key, value, kind in (
            ("merges", self._listed, list),
            ("prefix", self._prefix, str),
            ("suffix", self._suffix, str),
        ):
            if not isinstance(value, kind):
                raise _cannot_be_closed(name, f"the {key} is {type(value).__name__}, not {kind.__name__}")
        self._pairs = [_pair(merge, name) for merge in self._listed]
        self._rank: dict[Pair, int] = {}  # of a pair that is listed twice the library uses the last rank
        for rank, pair in enumerate(self._pairs):
            self._check(pair, fixed, name)
            self._rank[pair] = rank

    def _check(self, pair: Pair, fixed: Collection[str], name: str) -> None:
        left, right = pair
        if not left or not right.startswith(self._prefix) or len(right) == len(self._prefix):
            raise _cannot_be_closed(name, f"the merge {pair} adds nothing to one of its parts, so it would not end")
        for piece in (left, right, self._result(pair)):
            if piece not in self._pieces:
                raise _cannot_be_closed(
                    name, f"the merge {pair} needs the piece {piece!r}, which is not in the vocabulary"
                )
        if fixed_part := {left, right} & set(fixed):
            raise _cannot_be_closed(name, f"the merge {pair} joins {fixed_part.pop()!r}, which is no text")

    def _result(self, pair: Pair) -> str:
        return pair[0] + pair[1][len(self._prefix) :]

    def parts(self, pieces: Iterable[str]) -> set[str]:
        """The given pieces, and every piece that the tokenizer makes on the way to one of them."""
        found = set(pieces)
        for piece in list(found):
            for symbols in self._symbols(piece):
                made = list(self._merged(symbols))
                if made and made[-1] == piece:
                    found.update(symbols, made)
        return found

    def _symbols(self, piece: str) -> Iterator[list[str]]:
        """The first symbols of text that can end as `piece`: one for each character, marked where it continues or ends a word."""
        for prefix in {"", self._prefix} if piece.startswith(self._prefix) else {""}:
            for suffix in {"", self._suffix} if piece.endswith(self._suffix) else {""}:
                text = piece[len(prefix) : len(piece) - len(suffix)]
                symbols = [(prefix if first else self._prefix) + character for first, character in _with_first(text)]
                if symbols:
                    symbols[-1] += suffix
                    if all(symbol in self._pieces for symbol in symbols):
                        yield symbols

    def _merged(self, symbols: list[str]) -> Iterator[str]:
        """Apply the merges to symbols, lowest rank first. Yields every piece that is made."""
        now: list[str | None] = list(symbols)
        before, after = list(range(-1, len(now) - 1)), [*range(1, len(now)), -1]
        waiting: list[tuple[int, int, Pair]] = []

        def add(at: int) -> None:
            if at >= 0 and after[at] >= 0:
                pair = (str(now[at]), str(now[after[at]]))
                if pair in self._rank:
                    heapq.heappush(waiting, (self._rank[pair], at, pair))

        for at in range(len(now)):
            add(at)
        while waiting:
            _, at, pair = heapq.heappop(waiting)
            next_at = after[at]
            if next_at < 0 or (now[at], now[next_at]) != pair:
                continue  # one of the two is part of another piece by now
            made = self._result(pair)
            now[at], now[next_at] = made, None
            after[at], after[next_at] = after[next_at], -1
            if after[at] >= 0:
                before[after[at]] = at
            yield made
            add(before[at])
            add(at)

    def among(self, pieces: Collection[str]) -> list[Any]:
        """The merges whose parts and result are all in `pieces`, as they were listed and in that order."""
        return [
            listed
            for listed, pair in zip(self._listed, self._pairs, strict=True)
            if pair[0] in pieces and pair[1] in pieces and self._result(pair) in pieces
        ]


def _with_first(text: str) -> Iterator[tuple[bool, str]]:
    return ((number == 0, character) for number, character in enumerate(text))


def _pair(merge: Any, name: str) -> Pair:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise _cannot_be_closed(name, f"the merge {str(merge)[:80]!r} is not a pair of pieces")
    return parts[0], parts[1]


def _cannot_be_closed(name: str, problem: str) -> DataError:
    return DataError(
        f"{name}: the merges cannot be cut to fewer pieces: {problem}. Copy the file again from the origin of the model, or use "
        "the full vocabulary."
    )
