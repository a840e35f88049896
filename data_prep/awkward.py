"""Lines on which different tokenizers give different ids. Every tokenizer is compared with its reference on them.

Not included are lines on which SentencePiece and the Hugging Face tokenizer of the same model are known to differ: they agree
on `composed(line)` instead.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

MOST_TEXTS = 500  # added or special tokens that are tried

LINES = (
    # ordinary sentences in many scripts: pieces with other ids show immediately
    "All human beings are born free and equal in dignity and rights.",
    "Jeder Mensch ist frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits: où était l’élève, à côté de Noël?",
    "Все люди рождаются свободными и равными в своём достоинстве. Їжак, ґанок.",
    "人人生而自由，在尊严和权利上一律平等。東京都",
    "すべての人間は、生まれながらにして自由である。カタカナとひらがな",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. مُحَمَّد",
    "כל בני האדם נולדו בני חורין ושווים בערכם. שָׁלוֹם",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में स्वतन्त्रता प्राप्त है।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι. ΆΈΉ",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    # upper case, and letters whose lower case is special
    "HELLO WORLD, THE QUICK BROWN FOX Jumps OVER",
    "İstanbul IĞDIR ıslak ŞİŞE STRASSE straße ẞ",
    # accents: composed and decomposed
    "Élève Ångström Ünïcödé naïve café",
    "e\u0301le\u0300ve cafe\u0301 A\u030angstro\u0308m",
    # width, compatibility characters, digits
    "ｆｕｌｌ　ｗｉｄｔｈ　ＡＢＣ１２３！",
    "ｶﾀｶﾅ ﾊﾝｶｸ",
    "ﬁ ﬂ ½ ² ™ № ㎏ ①",
    "1234567890 3.14159 1,000,000 007 ٣٤٥ १२३",
    # unknown characters, emoji, rare scripts
    "The shop is ☺ open today.",
    "😀 👩\u200d👩\u200d👧 🇩🇪 ❤\ufe0f ☃",
    "𐌰𐌱𐌲 𓀀𓀁 𝕳𝖊𝖑𝖑𝖔 ሰላም ልዑል ᚠᚢᚦ",
    "replacement \ufffd character, \ue000 private use",
    # spaces and invisible characters
    "two  and   three spaces, tab\there",
    "no-break\u00a0space, thin\u2009space, wide\u3000space",
    "zero\u200bwidth \u200djoiner soft\u00adhyphen \ufeffmark",
    # punctuation, addresses, code, and what other tokenizers use as markers
    "don't can't won’t “quoted” «guillemets» — … -- ---",
    "https://example.org/a/b?c=d&e=f#g user@example.org",
    "snake_case camelCase __init__ \\n \\t C:\\dir",
    "▁ lower▁one ▁▁ ##piece Ġword Ċ <0x0A> @@",
    "[ SEP ] < / s > [unk] [UNK <mask",
    "x",
    ".",
)


def special_lines(special: Iterable[str]) -> list[str]:
    """A line for every special token that holds the token's text, which must be encoded as text."""
    return [f"before {text} after{text}" for text in _some(special)]


def added_lines(added: Iterable[str]) -> list[str]:
    """Lines that hold every added word as a word, inside a word, in upper case, and alone."""
    lines = [line for text in _some(added) for line in (f"before {text} after", f"in{text}side", text.upper(), text)]
    return [stripped for line in lines if (stripped := line.strip())]


def _some(texts: Iterable[str]) -> list[str]:
    """All texts, or at most `MOST_TEXTS` of them, chosen evenly: enough to see whether added tokens are read."""
    ordered = sorted(texts)
    return ordered[:: -(-len(ordered) // MOST_TEXTS) or 1]


def composed(line: str) -> str:
    """The line in normal form NFKC, with a space for U+0085.

    The Hugging Face normaliser looks up one grapheme at a time, SentencePiece the longest match. They differ on letters with two
    marks (decomposed Vietnamese) and on half-width kana with a voicing mark.
    """
    return unicodedata.normalize("NFKC", line).replace("\u0085", " ").strip()
