"""PAWS-X: fine-tune on English paraphrases, then evaluate zero-shot in every language.

In: encoders, and a directory with PAWS-X in its official layout (`x-final`): per language `train.tsv` (English) or
`translated_train.tsv`, `dev_2k.tsv` and `test_2k.tsv` with the columns id, sentence1, sentence2, label; or
`datasets:google-research-datasets/paws-x`. Out: the task; see `pair_classification.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.finetuning.labelled_pairs import LabelledPairs, PairData, tsv_rows
from pipeline.evaluation.finetuning.pair_classification import PairConfig, pair_task
from pipeline.evaluation.finetuning.split_data import FROM_LIBRARY, only_one, splits_from_library
from pipeline.evaluation.languages import among

COLUMNS = ("sentence1", "sentence2", "label")
LABELS = ("0", "1")  # 1: a paraphrase
NOT_TRANSLATED, NO_LABEL = ("", "NS"), ("", "-1")  # what files and the hub have in place of a sentence and of a label
SPLITS = {"train": ("train.tsv", "translated_train.tsv"), "dev": ("dev_2k.tsv",), "test": ("test_2k.tsv",)}


@dataclass
class PawsxConfig(PairConfig):
    """Where PAWS-X is. The learning rates are those of XNLI, the batch is XTREME's."""

    batch: int = 32


def read(config: PawsxConfig) -> PairData:
    """Read all pairs that the task needs."""
    most = (config.max_train, config.max_evaluation)
    if config.data.startswith(FROM_LIBRARY):
        otherwise = "name a directory with the official files: --set pawsx.data=DIR"
        language = config.train_language
        found = splits_from_library(config.data, language, config.languages, most, otherwise, _of_table)
        return PairData(*found, language)
    files = {split: _files(config.data, names) for split, names in SPLITS.items()}
    languages = list(config.languages or sorted(files["dev"].keys() & files["test"].keys()))
    if not languages:
        where = (
            f"no dev_2k.tsv and test_2k.tsv found below {config.data}" if config.data else "the task pawsx needs data"
        )
        raise UserError(f"{where}. Unpack x-final.tar.gz and name its directory: --set pawsx.data=x-final")
    for split, needed in (("train", [config.train_language]), ("dev", languages), ("test", languages)):
        if missing := [language for language in needed if language not in files[split]]:
            there = sorted(files["train"] if split == "train" else files["dev"].keys() & files["test"].keys())
            choose = among("pawsx.languages", languages, there)
            if split == "train" and there:
                choose = f"Choose one of these: --set pawsx.train_language={there[0]}"
            raise UserError(
                f"no {' or '.join(SPLITS[split])} of {', '.join(missing)} found below {config.data}; it has those of "
                f"{', '.join(sorted(files[split])) or 'no language'}. {choose}"
            )
    dev, test = ({x: _read(files[split][x], most[1]) for x in languages} for split in ("dev", "test"))
    return PairData(_read(files["train"][config.train_language], most[0]), dev, test, config.train_language)


def _files(source: str, names: Iterable[str]) -> dict[str, Path]:
    """Language -> its file."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(path for name in names for path in (Path(source).rglob(name) if source else ())):
        found[path.parent.name].append(path)
    return {language: only_one(paths) for language, paths in found.items()}


def _read(path: Path, most: int | None) -> LabelledPairs:
    return _pairs(((cells, where) for where, *cells in tsv_rows(path, COLUMNS)), most, str(path))


def _of_table(table: Any, most: int | None, where: str) -> LabelledPairs:
    rows = (([str(row[column]).strip() for column in COLUMNS], f"{where}, row {n}") for n, row in enumerate(table))
    return _pairs(rows, most, where)


def _pairs(rows: Iterable[tuple[list[str], str]], most: int | None, source: str) -> LabelledPairs:
    """The first `most` pairs that have both sentences and a label."""
    pairs = LabelledPairs(LABELS)
    for (first, second, label), where in rows:
        if len(pairs) == most:
            break
        if first in NOT_TRANSLATED or second in NOT_TRANSLATED or label in NO_LABEL:
            pairs.left_out += 1
        else:
            pairs.add(first, second, label, where)
    if not pairs:
        raise UserError(f"{source} has no pairs. Name another directory: --set pawsx.data=DIR")
    return pairs


TASK = pair_task("PAWS-X", PawsxConfig, read, place=45)
