"""Where lines of text end and which lines are blank. Text files, records and blocks all follow these rules.

A line ends at LF or CR LF. CR alone ends lines only in a text that has almost no LF, as old Macs wrote it. U+2028, U+2029,
U+0085, vertical tab and form feed end no line. A line that holds only white space of any kind is blank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# No-break space, U+0085, the spaces U+1680 and U+2000 to U+200A, zero-width U+200B to U+200F, U+2028, U+2029, U+202F, U+205F,
# U+2060, U+3000, U+FEFF
_BLANK = rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8f\xa8\xa9\xaf]|\xe2\x81[\x9f\xa0]|\xe3\x80\x80|\xef\xbb\xbf"
_BLANK_STARTS = frozenset(b"\xc2\xe1\xe2\xe3\xef")
_ALL_BLANK = re.compile(rb"(?:[ \t\r\v\f]|" + _BLANK + rb")+")
BLANK_LINE = re.compile(rb"\n" + _ALL_BLANK.pattern + rb"\n")
MIN_CR_SHARE = 1 / 4096  # a text without LF that has more CRs than this per byte has CR as its line end
CR_PER_LF = 20


def text_lines(text: bytes) -> list[bytes]:
    """The lines without surrounding white space. Blank lines are empty."""
    if BYTE_ORDER_MARK in text:  # at the start of a file, or of a part that once was a file
        text = text.removeprefix(BYTE_ORDER_MARK).replace(b"\n" + BYTE_ORDER_MARK, b"\n")
    lines = [line.strip() for line in text.split(b"\n")]
    return [b"" if line and line[0] in _BLANK_STARTS and _ALL_BLANK.fullmatch(line) else line for line in lines]


def oddities(text: bytes) -> Counter[str]:
    """Counts of possible line ends inside lines, and of UTF-8 that was mistaken for another encoding and encoded again."""
    lone = 0 if text.count(b"\r") == text.count(b"\r\n") else _carriage_returns_in_lines(text)
    separators, twice = _odd_characters(text)
    return Counter(
        carriage_returns_in_lines=lone, unicode_separators_in_lines=separators, double_encoded_characters=twice
    )


def _carriage_returns_in_lines(text: bytes) -> int:
    """Number of CRs that are not at the end of a line or of the text. Each run of CRs is looked at once, however long it is."""
    ends = (b"\n", b"")
    runs = ((run.end() - run.start(), text[run.end() : run.end() + 1]) for run in re.finditer(rb"\r+", text))
    return sum(length for length, after in runs if after not in ends)


def _odd_characters(text: bytes) -> tuple[int, int]:
    """Number of U+2028, U+2029 and U+0085, and number of characters that look encoded twice.

    A character encoded twice starts with "Ã", "Ð", "Ñ" or "â", followed by the second encoding of a continuation byte.
    `bytes.count` of each of these sequences costs a twelfth of the time of tokenising; this costs a hundredth.
    """
    padded = np.frombuffer(b"\0\0" + text + b"\0\0", np.uint8)
    c2, e2 = np.flatnonzero(padded == 0xC2), np.flatnonzero(padded == 0xE2)
    separators = np.count_nonzero(padded[c2 + 1] == 0x85)
    separators += np.count_nonzero((padded[e2 + 1] == 0x80) & (padded[e2 + 2] | 1 == 0xA9))
    is_behind_c3 = padded[c2 - 2] == 0xC3
    twice = np.count_nonzero(is_behind_c3 & np.isin(padded[c2 - 1], (0x83, 0x90, 0x91)))
    twice += np.count_nonzero(is_behind_c3 & (padded[c2 - 1] == 0xA2) & (padded[c2 + 1] == 0x80))
    twice += np.count_nonzero((padded[e2 - 2] == 0xC3) & (padded[e2 - 1] == 0xA2) & (padded[e2 + 1] == 0x82))
    return int(separators), int(twice)


def ends_lines_with_cr(start: bytes, is_all: bool) -> bool:
    """Whether CR alone is the line end of a text that starts with (or, with `is_all`, is) `start`. It may hold a few LFs."""
    num_lf, num_cr = start.count(b"\n"), start.count(b"\r")
    if not num_cr or num_cr <= CR_PER_LF * num_lf:
        return False
    return is_all or num_cr > len(start) * MIN_CR_SHARE


def with_line_feeds(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same text with LF for CR and CR LF."""
    held = b""
    for chunk in chunks:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""  # an LF may follow in the next piece
        chunk = chunk.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if chunk:
            yield chunk
    if held:
        yield b"\n"
