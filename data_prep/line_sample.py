"""A sample of a language's lines for comparing tokenizers: the first lines, random lines, and lines with rare characters.

In: the sources of the language. Out: at most 300 lines. They depend on the text and the language's name only, so every run
gets the same ones.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from data_prep.clean import split_documents
from data_prep.shards import DataError
from data_prep.sources import Source

SAMPLED_SOURCES = 4
READ_BYTES = 1 << 19  # of each sampled source: some thousand lines, read in 10 ms
LINES_OF_EACH_KIND = 100
LINE_BYTES = 2000


@dataclass(frozen=True)
class LineSample:
    """Lines of one language, without repetitions."""

    lines: list[str]
    is_complete: bool  # False if a sampled file is corrupt: the sample changes when the file is replaced


def sample_lines(language: str, sources: list[Source]) -> LineSample:
    """At most 3 * `LINES_OF_EACH_KIND` different lines."""
    starts = [_first_lines(source) for source in _spread(sources)]
    lines = list(dict.fromkeys(line for start in starts for line in start.lines))
    first = [line for start in starts for line in start.lines[: LINES_OF_EACH_KIND // len(starts)]]
    chosen = random.Random(f"lines of {language}").sample(lines, min(LINES_OF_EACH_KIND, len(lines)))
    chosen = list(dict.fromkeys([*first, *chosen, *_rarest(lines)]))
    return LineSample(chosen, all(start.is_complete for start in starts))


def _spread(sources: list[Source]) -> list[Source]:
    """The first, the last and evenly spaced sources: files of a language may come from different places."""
    count = min(SAMPLED_SOURCES, len(sources))
    return [sources[number * (len(sources) - 1) // max(count - 1, 1)] for number in range(count)]


def _first_lines(source: Source) -> LineSample:
    """Lines of the start of a file. The language's own job reports a corrupt file."""
    text, is_complete = bytearray(), True
    if not source.can_be_read_again:
        return LineSample([], True)
    chunks: Any = source.chunks()
    try:
        with closing(chunks):
            for chunk in chunks:
                text += chunk
                if len(text) >= READ_BYTES:
                    del text[text.rfind(b"\n") + 1 or READ_BYTES :]
                    break
    except (DataError, OSError):
        is_complete = False
    # A truncated line may end inside a character, which is left out.
    lines = [line[:LINE_BYTES].decode("utf-8", "ignore") for line in split_documents(bytes(text))[0]]
    return LineSample(lines, is_complete)


def _rarest(lines: list[str]) -> list[str]:
    """Lines that hold the rarest characters: other scripts, emoji, capitals with accents, invalid UTF-8."""
    counts = Counter(character for line in lines for character in line)
    return sorted(lines, key=lambda line: min(map(counts.__getitem__, line), default=len(lines)))[:LINES_OF_EACH_KIND]
