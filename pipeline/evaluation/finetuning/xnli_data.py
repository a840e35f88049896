"""Reads XNLI from its official files, or through the `datasets` library by name.

In: a directory with `multinli.train.en.tsv` (XNLI-MT-1.0; columns premise, hypo, label), `xnli.dev.tsv` and
`xnli.test.tsv` (XNLI-1.0; columns language, gold_label, sentence1, sentence2 and others), at any depth; or
`datasets:facebook/xnli`. Out: labelled pairs. Other tasks with three labels and sentence pairs can use these layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, did_you_mean
from pipeline.evaluation.finetuning.split_data import FROM_LIBRARY, SplitData, only_one
from pipeline.evaluation.library_data import library_errors, load_table

LABELS = ("entailment", "neutral", "contradiction")
ALSO_CALLED = {"contradictory": "contradiction"}  # the word of XNLI-MT
TRAIN_COLUMNS = ("label", "premise", "hypo")
EVALUATION_COLUMNS = ("gold_label", "sentence1", "sentence2", "language")


@dataclass
class LabelledPairs:
    """Sentence pairs, and the index of each label in `LABELS`."""

    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, first: str, second: str, label: str, where: str) -> None:
        """Add one pair. An empty sentence or an unknown label raises a `UserError` that begins with `where`."""
        if not first or not second:
            raise UserError(f"{where}: a sentence of the pair is empty. Correct or delete that line.")
        name = ALSO_CALLED.get(label, label)
        if name not in LABELS:
            raise UserError(
                f"{where}: unknown label {label[:40]!r}; {did_you_mean(label, LABELS)} Labels: {', '.join(LABELS)}"
            )
        self.first.append(first)
        self.second.append(second)
        self.labels.append(LABELS.index(name))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class XnliData(SplitData[LabelledPairs]):
    """Labelled sentence pairs."""

    train_language: str
    unit = "test pairs"

    def about(self) -> dict[str, Any]:
        return {"train_language": self.train_language, "train_pairs": len(self.train)}

    def content_of(self, examples: LabelledPairs) -> tuple[list[Any], ...]:
        return examples.first, examples.second, examples.labels


def read_xnli(
    source: str, train_language: str, languages: list[str] | None, max_train: int | None, max_evaluation: int | None
) -> XnliData:
    """Read everything that the task needs.

    Args:
        source: a directory, or `datasets:NAME`
        languages: development and test languages; None: all languages of the files
        max_train, max_evaluation: number of pairs, of all or of each language; None: all
    """
    if source.startswith(FROM_LIBRARY):
        return _from_library(source, train_language, languages, max_train, max_evaluation)
    train = _read_train(_find(source, f"multinli.train.{train_language}.tsv"), max_train)
    dev, test = (
        _read_evaluation(_find(source, f"xnli.{split}.tsv"), languages, max_evaluation) for split in ("dev", "test")
    )
    if list(dev) != list(test):
        raise UserError(
            f"xnli.dev.tsv has the languages {', '.join(dev)}, xnli.test.tsv has {', '.join(test)}. Choose those of both: --set "
            f"'xnli.languages=[{', '.join(x for x in dev if x in test)}]'"
        )
    return XnliData(train, dev, test, train_language)


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
    pairs = LabelledPairs()
    for where, label, first, second in itertools.islice(tsv_rows(path, TRAIN_COLUMNS), most):
        pairs.add(first, second, label, where)
    if not pairs:
        raise UserError(f"{path} has no pairs after its header line. Name another directory: --set xnli.data=DIR")
    return pairs


def _read_evaluation(path: Path, languages: list[str] | None, most: int | None) -> dict[str, LabelledPairs]:
    """Pairs by language, in the order of `languages` or else of their names."""
    of_language: dict[str, LabelledPairs] = {}
    for where, label, first, second, language in tsv_rows(path, EVALUATION_COLUMNS):
        pairs = of_language.setdefault(language, LabelledPairs())
        if most is None or len(pairs) < most:
            pairs.add(first, second, label, where)
    missing = [language for language in languages or [] if language not in of_language]
    if missing or not of_language:
        raise UserError(
            f"{path} has no pairs in {', '.join(missing) or 'any language'}; it has {', '.join(sorted(of_language))}. Choose "
            "among these with --set xnli.languages=[...]"
        )
    return {language: of_language[language] for language in languages or sorted(of_language)}


def tsv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield (where, cells of `columns`) of every line after the header.

    Quotation marks are part of the text, as in the official files.
    """
    header: list[str] = []
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                cells = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 (byte {error.start} of the line). Convert the file first."
                ) from None
            if len(cells) == 1 and not cells[0].strip():
                continue
            if "\r" in raw.decode("utf-8").rstrip("\r\n"):
                raise UserError(
                    f"{where}: a carriage return within the line. If lines end in one (old Macintosh files), convert the file: "
                    f"tr '\\r' '\\n' < {path.name}"
                )
            if not header:
                header = [cell.strip().casefold() for cell in cells]
                positions = header_positions(header, columns, where)
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} columns, the header has {len(header)}. Correct or delete that line."
                )
            yield (where, *(cells[position].strip() for position in positions))


def header_positions(header: Sequence[str], columns: Sequence[str], where: str) -> list[int]:
    """Positions of the columns in a header (lower case). A missing or repeated column raises a `UserError`."""
    seen = ", ".join(header)[:200]
    names = [column.casefold() for column in columns]
    if missing := [column for column, name in zip(columns, names, strict=True) if name not in header]:
        raise UserError(
            f"{where}: the header lacks {', '.join(missing)}; it has {seen}. Add a header line with these names, tab-separated."
        )
    if twice := [name for name in names if header.count(name) > 1]:
        raise UserError(f"{where}: the header has {twice[0]} twice: {seen}. Rename one of the two columns.")
    return [header.index(name) for name in names]


def _from_library(
    source: str, train_language: str, languages: list[str] | None, max_train: int | None, max_evaluation: int | None
) -> XnliData:
    """Read one configuration per language, as facebook/xnli has them. The library caches them."""
    import datasets  # slow to import, and only needed here

    name = source.removeprefix(FROM_LIBRARY)
    with library_errors(name, "name a directory with the official files: --set xnli.data=DIR"):
        known = [config for config in datasets.get_dataset_config_names(name) if config != "all_languages"]
        missing = [language for language in [train_language, *(languages or [])] if language not in known]
        if missing:
            raise UserError(f"{name} has no {', '.join(missing)}; it has {', '.join(known)}")

        def read(language: str, split: str, most: int | None) -> LabelledPairs:
            table = load_table(name, language, split)
            return _from_table(table if most is None else table.take(most), f"{name}/{language}/{split}")

        chosen = languages or known
        dev, test = ({x: read(x, split, max_evaluation) for x in chosen} for split in ("validation", "test"))
        return XnliData(read(train_language, "train", max_train), dev, test, train_language)


def _from_table(table: Any, where: str) -> LabelledPairs:
    pairs = LabelledPairs()
    for number, row in enumerate(table):
        label = row["label"]
        label = LABELS[label] if isinstance(label, int) and 0 <= label < len(LABELS) else str(label)
        pairs.add(row["premise"].strip(), row["hypothesis"].strip(), label, f"{where}, row {number}")
    return pairs
