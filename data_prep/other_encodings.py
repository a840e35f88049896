"""Text that is not UTF-8: its broken lines, and its most likely encoding.

In: bytes and a language. Out: the name of an encoding, which is printed for the user to check and never applied. Candidates are
the encodings in which the language used to be written. The guess is the candidate that decodes the broken lines to most letters
of the language's script, with a preference for lower case.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.scripts import scripts_of, shares_in_script

SAMPLE_LINES = 50
_C1_BYTES = bytes(range(0x80, 0xA0))
_BY_LANGUAGE = {
    "zh-Hans": ("GB18030",),
    "zh-Hant": ("BIG5-HKSCS", "GB18030"),
    "ja": ("EUC-JP", "CP932"),
    "ko": ("CP949",),
    "th": ("CP874",),
    "vi": ("CP1258",),
    "uk": ("CP1251", "KOI8-U"),
    **dict.fromkeys(("tr", "az", "ku"), ("CP1254",)),
    **dict.fromkeys(("et", "lv", "lt"), ("CP1257",)),
    **dict.fromkeys(("bs", "cs", "hr", "hu", "pl", "ro", "sk", "sl", "sq"), ("CP1250",)),
}
_BY_SCRIPT = {
    "Cyrillic": ("CP1251", "KOI8-R", "IBM866"),
    "Greek": ("CP1253",),
    "Hebrew": ("CP1255",),
    "Arabic": ("CP1256",),
}
_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_WIDE = ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE")
LEAST_LETTERS_IN_SCRIPT = 0.6  # of the characters beyond ASCII; the others are marks and punctuation
MIN_ZEROS, MANY_ZEROS = (
    0.005,
    0.2,
)  # share of NUL bytes: in UTF-16 every second byte of English, and the line ends of Chinese


def broken_lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Number (from 0) and stripped bytes of every line that is not UTF-8."""
    try:
        text.decode("utf-8")
        return
    except UnicodeDecodeError:
        pass
    for number, line in enumerate(text.split(b"\n")):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            yield number, line.strip()


def wide_encoding(start: bytes, language: str) -> str | None:
    """UTF-16 or UTF-32, found by a byte order mark, or else by decoding the start of the file; None for other text."""
    for mark, name in _BOMS.items():
        if start.startswith(mark):
            return name
    share_of_zeros = start.count(b"\0") / max(1, len(start))
    if share_of_zeros < MIN_ZEROS or (share_of_zeros < MANY_ZEROS and next(broken_lines(start), None) is None):
        return None  # a stray NUL in text
    scores = {name: _score([start[: len(start) // 4 * 4]], name, language) for name in _WIDE}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= LEAST_LETTERS_IN_SCRIPT else None


def likely_encoding(lines: list[bytes], language: str) -> str:
    """The likely encoding of some broken lines, by a name that iconv knows; ISO-8859-1, which decodes anything, by default."""
    by_script = [name for script in scripts_of(language) for name in _BY_SCRIPT.get(script, ())]
    candidates = [*_BY_LANGUAGE.get(language, ()), *by_script]
    scores = {name: _score(lines, name, language) for name in candidates}
    best = max(scores, key=lambda name: scores[name], default=None)
    if best is not None and scores[best] >= LEAST_LETTERS_IN_SCRIPT:
        return best
    has_c1 = any(line != line.translate(None, _C1_BYTES) for line in lines)
    return "WINDOWS-1252" if has_c1 and _score(lines, "WINDOWS-1252", language) >= 0 else "ISO-8859-1"


def _score(lines: list[bytes], encoding: str, language: str) -> float:
    """Share of letters in the language's script, plus a bonus for lower case; -1 if the bytes cannot be decoded.

    The bonus tells KOI8-R from CP1251: reading one as the other swaps the cases.
    """
    try:
        texts = [line.decode(encoding).replace("\n", " ") for line in lines]
    except UnicodeError:
        return -1.0
    beyond_ascii = ["".join(char for char in text if ord(char) >= 128 or encoding in _WIDE) for text in texts]
    letters = [text for text in beyond_ascii if any(map(str.isalpha, text))]
    if not letters:
        return 0.0
    everything = "".join(letters)
    share = float(shares_in_script([everything.encode("utf-8", "replace")], language)[0])
    alphabetic = sum(map(str.isalpha, everything)) / len(everything)
    return share * alphabetic + 0.2 * sum(map(str.islower, everything)) / len(everything)
