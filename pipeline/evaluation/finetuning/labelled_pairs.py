"""Labelled sentence pairs: the examples of XNLI and PAWS-X, and the reader of files that both tasks share.

In: tab-separated files with a header. Out: `LabelledPairs` and `PairData`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, did_you_mean
from pipeline.evaluation.finetuning.split_data import SplitData
from pipeline.evaluation.lines import text_lines


@dataclass
class LabelledPairs:
    """Sentence pairs, and the index of each label in `names`. `left_out`: number of pairs that were not usable."""

    names: tuple[str, ...]
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: int = 0

    def add(self, first: str, second: str, label: str, where: str) -> None:
        """Add one pair. An empty sentence or an unknown label raises a `UserError` that begins with `where`."""
        if not first or not second:
            raise UserError(f"{where}: a sentence of the pair is empty. Correct or delete that line.")
        if label not in self.names:
            raise UserError(
                f"{where}: unknown label {label[:40]!r}; {did_you_mean(label, self.names)} Labels: {', '.join(self.names)}"
            )
        self.first.append(first)
        self.second.append(second)
        self.labels.append(self.names.index(label))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class PairData(SplitData[LabelledPairs]):
    """Labelled sentence pairs."""

    train_language: str
    unit = "test pairs"

    def about(self) -> dict[str, Any]:
        left_out = {language: pairs.left_out for language, pairs in self.test.items() if pairs.left_out}
        about = {"train_language": self.train_language, "train_pairs": len(self.train)}
        return {**about, **({"pairs_left_out": left_out} if left_out else {})}

    def content_of(self, examples: LabelledPairs) -> tuple[list[Any], ...]:
        return examples.first, examples.second, examples.labels


def tsv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield (where, cells of `columns`) of every line after the header.

    Quotation marks are part of the text, as in the official files.
    """
    header: list[str] = []
    for number, line in text_lines(path):
        where, cells = f"{path}, line {number}", line.split("\t")
        if len(cells) == 1 and not cells[0].strip():
            continue
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
