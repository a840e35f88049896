"""A few hundred lines of a language to try a tokenizer on: the first ones, random ones, and those with rare characters.

In: the language's sources. Out: the same lines at every run, as they depend on the text and the language's name alone.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from data_prep.clean import split_documents
from data_prep.shards import DataError
from data_prep.sources import HubSource, Source

SAMPLED_SOURCES = 4
READ_BYTES = 1 << 19  # of each sampled source: some thousand lines, read in 10 ms
LINES_OF_EACH_KIND = 100
LINE_BYTES = 2000


@dataclass(frozen=True)
class LineSample:
    """Lines of one language, without repetitions."""

    lines: list[str]
    is_whole: bool  # not where a file is damaged: once it is replaced, the sample will be another


def sample_lines(language: str, sources: list[Source]) -> LineSample:
    """At most three times `LINES_OF_EACH_KIND` lines."""
    starts = [_first_lines(source) for source in _spread(sources)]
    lines = list(dict.fromkeys(line for start in starts for line in start.lines))
    first = [line for start in starts for line in start.lines[: LINES_OF_EACH_KIND // len(starts)]]
    chosen = random.Random(f"lines of {language}").sample(lines, min(LINES_OF_EACH_KIND, len(lines)))
    chosen = list(dict.fromkeys([*first, *chosen, *_rarest(lines)]))
    return LineSample(chosen, all(start.is_whole for start in starts))


def _spread(sources: list[Source]) -> list[Source]:
    """The first, the last and some between: files of a language may come from different places."""
    count = min(SAMPLED_SOURCES, len(sources))
    return [sources[number * (len(sources) - 1) // max(count - 1, 1)] for number in range(count)]


def _first_lines(source: Source) -> LineSample:
    """Lines of the start of a file; what is damaged there is for the language's own run to say."""
    text, is_whole = bytearray(), True
    if not isinstance(source, HubSource) and not source.path.is_file():
        return LineSample([], True)  # a pipe can be read only once
    chunks: Any = source.chunks()
    try:
        with closing(chunks):
            for chunk in chunks:
                text += chunk
                if len(text) >= READ_BYTES:
                    del text[text.rfind(b"\n") + 1 or READ_BYTES :]
                    break
    except (DataError, OSError):
        is_whole = False
    # A line that is cut may end inside a character, which is left out.
    lines = [line[:LINE_BYTES].decode("utf-8", "ignore") for line in split_documents(bytes(text))[0]]
    return LineSample(lines, is_whole)


def _rarest(lines: list[str]) -> list[str]:
    """Lines that hold the rarest characters: odd scripts, emoji, capitals with accents, broken text."""
    counts = Counter(character for line in lines for character in line)
    return sorted(lines, key=lambda line: min(map(counts.__getitem__, line), default=len(lines)))[:LINES_OF_EACH_KIND]
