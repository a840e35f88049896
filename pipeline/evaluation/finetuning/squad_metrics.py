"""Exact match and F1 of an answer, as SQuAD v1.1 and MLQA count them.

Both compare words after lower-casing and without punctuation and articles. SQuAD knows English articles and ASCII
punctuation. MLQA knows the articles of each language and all of Unicode's punctuation, and cuts Chinese into characters,
other text within it at blanks.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_WORDS = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
}
_ARTICLES = {language: re.compile(rf"\b(?:{'|'.join(words.split())})\b") for language, words in _WORDS.items()}
# MLQA takes the Arabic article off wherever the two letters stand
_ARTICLES["ar"] = re.compile("ال")
_ONE_CHARACTER_A_WORD = {"zh": re.compile("([\u4e00-\u9fa5])")}
MLQA_LANGUAGES = ("en", "es", "de", "ar", "hi", "vi", "zh")


def squad_words(text: str) -> list[str]:
    """What SQuAD v1.1 compares."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES["en"].sub(" ", kept).split()


def mlqa_words(text: str, language: str) -> list[str]:
    """What MLQA compares; a language of another set is cut at blanks and keeps its articles."""
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    if language in _ARTICLES:
        kept = _ARTICLES[language].sub(" ", kept)
    if language in _ONE_CHARACTER_A_WORD:
        kept = _ONE_CHARACTER_A_WORD[language].sub(r" \1 ", kept)
    return kept.split()


def _is_punctuation(character: str) -> bool:
    """`$`, `+`, `<` and others are punctuation to `string` and symbols to Unicode: both count."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: Sequence[str], truth: Sequence[str]) -> float:
    return float(list(answer) == list(truth))


def f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition."""
    common = sum((Counter(answer) & Counter(truth)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(truth)
    return 2 * precision * recall / (precision + recall)
