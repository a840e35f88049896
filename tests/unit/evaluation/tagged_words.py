"""Small treebanks and named entities in the official layouts. A word determines its tag, so a model can learn it."""

from __future__ import annotations

import random
from pathlib import Path

TAG_OF = {"world": "NOUN", "network": "VERB", "user": "ADJ", "the": "DET", "of": "ADP", "and": "CCONJ"}
SHIFTED = dict(zip(TAG_OF, [*list(TAG_OF.values())[1:], "NOUN"], strict=True))
# In the format of a released treebank: comments, a multiword token (zum = zu + dem), an empty node, a word with a blank.
CONLLU = """\
# sent_id = 1
# text = Sie geht zum Markt für 10 000 Euro
1\tSie\tsie\tPRON\tPPER\tCase=Nom\t2\tnsubj\t_\t_
2\tgeht\tgehen\tVERB\tVVFIN\t_\t0\troot\t_\t_
3-4\tzum\t_\t_\t_\t_\t_\t_\t_\t_
3\tzu\tzu\tADP\tAPPR\t_\t5\tcase\t_\t_
4\tdem\tder\tDET\tART\t_\t5\tdet\t_\t_
5\tMarkt\tMarkt\tNOUN\tNN\t_\t2\tobl\t_\t_
5.1\tgeht\tgehen\tVERB\t_\t_\t_\t_\t2:conj\t_
6\tfür\tfür\tADP\tAPPR\t_\t8\tcase\t_\t_
7\t10 000\t10000\tNUM\tCARD\t_\t8\tnummod\t_\t_
8\tEuro\tEuro\tNOUN\tNN\t_\t2\tobl\t_\tSpaceAfter=No

# sent_id = 2
1\tHalt\thalt\tINTJ\tITJ\t_\t0\troot\t_\t_

"""


def write_ud(directory: Path, train: int = 96, evaluation: int = 12) -> Path:
    """Treebanks of en (train, dev, test), de (dev, test) and sw (test only, where every word has another tag)."""
    draw = random.Random(0)
    for treebank, name, splits, tags in (
        ("UD_English-Tiny", "en_tiny", {"train": train, "dev": evaluation, "test": evaluation}, TAG_OF),
        ("UD_German-Tiny", "de_tiny", {"dev": evaluation, "test": evaluation}, TAG_OF),
        ("UD_Swahili-Tiny", "sw_tiny", {"test": evaluation}, SHIFTED),
    ):
        (directory / treebank).mkdir(parents=True)
        for split, count in splits.items():
            path = directory / treebank / f"{name}-ud-{split}.conllu"
            path.write_text("".join(conllu(draw.choices(list(TAG_OF), k=6), tags) for _ in range(count)))
    return directory


def conllu(words: list[str], tags: dict[str, str]) -> str:
    lines = [f"{n}\t{word}\t{word}\t{tags[word]}\t_\t_\t0\troot\t_\t_\n" for n, word in enumerate(words, start=1)]
    return f"# text = {' '.join(words)}\n{''.join(lines)}\n"


def write_wikiann(
    directory: Path, languages: tuple[str, ...] = ("en", "de"), train: int = 96, evaluation: int = 12
) -> Path:
    """WikiANN's layout: `world` is a place of one word, `network user` a person of two."""
    draw = random.Random(0)
    for language in languages:
        (directory / language).mkdir(parents=True)
        for split, count in (("train", train), ("dev", evaluation), ("test", evaluation)):
            text = ""
            for _ in range(count):
                words = draw.choices(
                    [("the", "O"), ("of", "O"), ("world", "B-LOC"), ("network user", "B-PER I-PER")], k=4
                )
                pairs = [pair for word, tags in words for pair in zip(word.split(), tags.split(), strict=True)]
                text += "".join(f"{language}:{word}\t{tag}\n" for word, tag in pairs) + "\n"
            (directory / language / split).write_text(text)
    return directory
