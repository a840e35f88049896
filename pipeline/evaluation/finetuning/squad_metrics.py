"""Exact match and F1 of an answer, as the scripts of SQuAD v1.1 and MLQA compute them.

Both compare lower-case words without punctuation and articles. SQuAD removes English articles and ASCII punctuation.
MLQA removes the articles of each language and all Unicode punctuation, and splits Chinese into characters and other text
at blanks.
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
# MLQA removes the two letters of the Arabic article wherever they occur
_ARTICLES["ar"] = re.compile("ال")
_ONE_CHARACTER_A_WORD = {"zh": re.compile("([\u4e00-\u9fa5])")}
MLQA_LANGUAGES = ("en", "es", "de", "ar", "hi", "vi", "zh")


def squad_words(text: str) -> list[str]:
    """The words that SQuAD v1.1 compares."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES["en"].sub(" ", kept).split()


def mlqa_words(text: str, language: str) -> list[str]:
    """The words that MLQA compares. In a language outside MLQA the text is split at blanks and keeps its articles."""
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
    """1 if all words are equal, else 0."""
    return float(list(answer) == list(truth))


def f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition."""
    common = sum((Counter(answer) & Counter(truth)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(truth)
    return 2 * precision * recall / (precision + recall)
