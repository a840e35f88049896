"""The Unicode scripts of a language, and the share of a line's letters that is in them.

In: lines and a language. Out: shares. Scripts are ranges of code points (Unicode blocks): coarse, and exact enough to find
lines in another script.
"""

from __future__ import annotations

import numpy as np

_RANGES: dict[str, list[tuple[int, int]]] = {
    "Latin": [(0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F)]
    + [(0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFF21, 0xFF5A)],
    "Greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "Cyrillic": [(0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)],
    "Armenian": [(0x531, 0x587)],
    "Hebrew": [(0x591, 0x5F4), (0xFB1D, 0xFB4F)],
    "Arabic": [(0x620, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)],
    "Devanagari": [(0x900, 0x97F), (0xA8E0, 0xA8FF)],
    "Bengali": [(0x980, 0x9FF)],
    "Gurmukhi": [(0xA00, 0xA7F)],
    "Gujarati": [(0xA80, 0xAFF)],
    "Oriya": [(0xB00, 0xB7F)],
    "Tamil": [(0xB80, 0xBFF)],
    "Telugu": [(0xC00, 0xC7F)],
    "Kannada": [(0xC80, 0xCFF)],
    "Malayalam": [(0xD00, 0xD7F)],
    "Sinhala": [(0xD80, 0xDFF)],
    "Thai": [(0xE00, 0xE7F)],
    "Lao": [(0xE80, 0xEFF)],
    "Tibetan": [(0xF00, 0xFFF)],
    "Myanmar": [(0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)],
    "Georgian": [(0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)],
    "Hangul": [(0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)],
    "Ethiopic": [(0x1200, 0x139F), (0x2D80, 0x2DDF)],
    "Khmer": [(0x1780, 0x17FF)],
    "Kana": [(0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)],
    "Han": [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)],
}
_NUMBERS = {name: number for number, name in enumerate(_RANGES, start=1)}  # 0: no letter of a known script

_LANGUAGES_OF = {
    "Greek": "el",
    "Cyrillic": "be bg kk ky mk mn ru sr uk",
    "Armenian": "hy",
    "Hebrew": "he yi",
    "Arabic": "ar fa ku ps sd ug ur",
    "Devanagari": "hi mr ne sa",
    "Bengali": "as bn",
    "Gurmukhi": "pa",
    "Gujarati": "gu",
    "Oriya": "or",
    "Tamil": "ta",
    "Telugu": "te",
    "Kannada": "kn",
    "Malayalam": "ml",
    "Sinhala": "si",
    "Thai": "th",
    "Lao": "lo",
    "Myanmar": "my my_zaw",
    "Georgian": "ka",
    "Hangul Han": "ko",
    "Ethiopic": "am",
    "Khmer": "km",
    "Kana Han": "ja",
    "Han": "zh-Hans zh-Hant",
}
_ALSO_LATIN = frozenset("ku sr ug".split())  # written in two scripts


def scripts_of(language: str) -> list[str]:
    """Names of the scripts of one of CC-100's languages; Latin if the table has no entry."""
    for scripts, languages in _LANGUAGES_OF.items():
        if language in languages.split():
            return scripts.split() + (["Latin"] if language in _ALSO_LATIN else [])
    return ["Latin"]


def _script_table() -> np.ndarray:
    table = np.zeros(0x10000, np.uint8)
    for name, ranges in _RANGES.items():
        for first, last in ranges:
            table[first : last + 1] = _NUMBERS[name]
    return table


_TABLE = _script_table()


def shares_in_script(lines: list[bytes], language: str) -> np.ndarray:
    """For each line, the share of its letters that belong to the language's scripts (1 if it has no letters): float64 [lines]."""
    text = b"\n".join(lines).decode("utf-8", "replace").encode("utf-32-le")
    points = np.frombuffer(text, np.uint32)
    starts = np.concatenate([[0], np.flatnonzero(points == 10) + 1])
    scripts = np.where(points < 0x10000, _TABLE[points & 0xFFFF], np.where(points >= 0x20000, _NUMBERS["Han"], 0))
    fitting = np.isin(scripts, [_NUMBERS[name] for name in scripts_of(language)])
    letters = np.add.reduceat((scripts > 0).astype(np.int64), starts)
    matching = np.add.reduceat(fitting.astype(np.int64), starts)
    return np.where(letters > 0, matching / np.maximum(letters, 1), 1.0)
