"""Makes labelled sentence pairs from the parallel sample text, in XNLI's layout: a real task where XNLI is not available.

    python benchmarks/sentence_pairs.py --output artifacts/sentence_pairs
    python -m pipeline evaluate MODEL --tasks xnli --set xnli.data=artifacts/sentence_pairs --set xnli.train_language=de ...

The premise is English and the hypothesis is in the other language: `entailment` is the translation, `neutral` another
sentence of the same document, `contradiction` a sentence of another document. A hash of its text assigns every English
sentence to train, dev or test, the same in all languages, and hypotheses are drawn from the same part.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import xxhash

from benchmarks.measure import REPO
from data_prep.command_line import CommandLine

LANGUAGES = ("de", "ar", "el", "fa", "id", "ja", "ko", "ru", "tr", "zh-Hans")  # the languages with several documents
PARTS = ("train", "train", "train", "dev", "test")  # fifths
Sentence = tuple[str, str, str]  # English, other language, document


def read_parts(language: str) -> dict[str, list[Sentence]]:
    """The sentences of one language, by part."""
    parts: dict[str, list[Sentence]] = defaultdict(list)
    for line in (
        (REPO / "samples" / "parallel" / f"en-{language}.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
    ):
        english, other, _, key = line.split("\t")
        parts[PARTS[xxhash.xxh3_64_intdigest(english.encode()) % len(PARTS)]].append(
            (english, other, key.rpartition("|")[0])
        )
    return parts


def labelled(sentences: list[Sentence], draw: random.Random, most: int) -> list[tuple[str, str, str]]:
    """(label, premise, hypothesis): three pairs per sentence, or none if its document has no other sentence."""
    pairs = []
    for english, translation, document in draw.sample(sentences, len(sentences)):
        same = [other for _, other, where in sentences if where == document and other != translation]
        elsewhere = [other for _, other, where in sentences if where != document]
        if same and elsewhere and len(pairs) + 3 <= most:
            pairs.append(("entailment", english, translation))
            pairs.append(("neutral", english, draw.choice(same)))
            pairs.append(("contradiction", english, draw.choice(elsewhere)))
    return pairs


def write(directory: Path, train: int, evaluation: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    parts = {language: read_parts(language) for language in LANGUAGES}
    first = LANGUAGES[0]
    rows = [(english, other, label) for label, english, other in labelled(parts[first]["train"], draw, train)]
    _write_tsv(directory / f"multinli.train.{first}.tsv", ("premise", "hypo", "label"), rows)
    print(f"{len(rows)} pairs en-{first} to train on")
    for part in ("dev", "test"):
        rows = [
            (language, *pair) for language in LANGUAGES for pair in labelled(parts[language][part], draw, evaluation)
        ]
        _write_tsv(directory / f"xnli.{part}.tsv", ("language", "gold_label", "sentence1", "sentence2"), rows)
        counts = {language: sum(row[0] == language for row in rows) for language in LANGUAGES}
        print(f"{part}:", ", ".join(f"{language} {count}" for language, count in counts.items()))


def _write_tsv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    path.write_text("".join("\t".join(cells) + "\n" for cells in [header, *rows]), encoding="utf-8")


if __name__ == "__main__":
    parser = CommandLine(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1050, help="most pairs to train on")
    parser.add_argument("--evaluation", type=int, default=60, help="most pairs of each language and part")
    arguments = parser.parse_args()
    write(arguments.output, arguments.train, arguments.evaluation)
