"""Reads XNLI from its official files, or through the `datasets` library by name.

In: a directory with `multinli.train.en.tsv` (XNLI-MT-1.0; columns premise, hypo, label), `xnli.dev.tsv` and
`xnli.test.tsv` (XNLI-1.0; columns language, gold_label, sentence1, sentence2 and others), at any depth; or
`datasets:facebook/xnli`. Out: labelled pairs. Other tasks with three labels and sentence pairs can use these layouts.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.finetuning.labelled_pairs import LabelledPairs, PairData, tsv_rows
from pipeline.evaluation.finetuning.split_data import FROM_LIBRARY, only_one, splits_from_library
from pipeline.evaluation.languages import among

LABELS = ("entailment", "neutral", "contradiction")
ALSO_CALLED = {"contradictory": "contradiction"}  # the word of XNLI-MT
TRAIN_COLUMNS = ("label", "premise", "hypo")
EVALUATION_COLUMNS = ("gold_label", "sentence1", "sentence2", "language")


def read_xnli(
    source: str, train_language: str, languages: list[str] | None, max_train: int | None, max_evaluation: int | None
) -> PairData:
    """Read everything that the task needs.

    Args:
        source: a directory, or `datasets:NAME`
        languages: development and test languages; None: all languages of the files
        max_train, max_evaluation: number of pairs, of all or of each language; None: all
    """
    if source.startswith(FROM_LIBRARY):
        most = (max_train, max_evaluation)
        otherwise = "name a directory with the official files: --set xnli.data=DIR"
        found = splits_from_library(source, train_language, languages, most, otherwise, _of_table)
        return PairData(*found, train_language)
    train = _read_train(_find(source, f"multinli.train.{train_language}.tsv"), max_train)
    dev, test = (
        _read_evaluation(_find(source, f"xnli.{split}.tsv"), languages, max_evaluation) for split in ("dev", "test")
    )
    if list(dev) != list(test):
        raise UserError(
            f"xnli.dev.tsv has the languages {', '.join(dev)}, xnli.test.tsv has {', '.join(test)}. "
            f"{among('xnli.languages', None, [x for x in dev if x in test])}"
        )
    return PairData(train, dev, test, train_language)


def _find(source: str, name: str) -> Path:
    found = sorted(Path(source).rglob(name))
    if not source or not found:
        where = f"no {name} found below {source}" if source else "the task xnli needs data"
        raise UserError(
            f"{where}. Unpack XNLI-1.0.zip and XNLI-MT-1.0.zip side by side and name their directory: "
            "--set xnli.data=DIR, or --set xnli.data=datasets:facebook/xnli"
        )
    return only_one(found)


def _read_train(path: Path, most: int | None) -> LabelledPairs:
    pairs = LabelledPairs(LABELS)
    for where, label, first, second in itertools.islice(tsv_rows(path, TRAIN_COLUMNS), most):
        pairs.add(first, second, ALSO_CALLED.get(label, label), where)
    if not pairs:
        raise UserError(f"{path} has no pairs after its header line. Name another directory: --set xnli.data=DIR")
    return pairs


def _read_evaluation(path: Path, languages: list[str] | None, most: int | None) -> dict[str, LabelledPairs]:
    """Pairs by language, in the order of `languages` or else of their names."""
    of_language: dict[str, LabelledPairs] = {}
    for where, label, first, second, language in tsv_rows(path, EVALUATION_COLUMNS):
        pairs = of_language.setdefault(language, LabelledPairs(LABELS))
        if most is None or len(pairs) < most:
            pairs.add(first, second, ALSO_CALLED.get(label, label), where)
    missing = [language for language in languages or [] if language not in of_language]
    if missing or not of_language:
        raise UserError(
            f"{path} has no pairs in {', '.join(missing) or 'any language'}; it has {', '.join(sorted(of_language)) or 'none'}. "
            f"{among('xnli.languages', languages, sorted(of_language))}"
        )
    return {language: of_language[language] for language in languages or sorted(of_language)}


def _of_table(table: Any, most: int | None, where: str) -> LabelledPairs:
    pairs = LabelledPairs(LABELS)
    for number, row in enumerate(table if most is None else table.take(most)):
        label = row["label"]
        label = LABELS[label] if isinstance(label, int) and 0 <= label < len(LABELS) else str(label)
        pairs.add(
            row["premise"].strip(),
            row["hypothesis"].strip(),
            ALSO_CALLED.get(label, label),
            f"{where}, row {number}",
        )
    return pairs
