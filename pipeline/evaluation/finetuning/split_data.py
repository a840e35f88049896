"""The examples of a fine-tuning task: training examples, and by language the development and test examples.

In: what a task's reader found (`xnli_data.py`, `squad_data.py`, `tagging_data.py`), or a data set of the hub with one
configuration per language. Out: a `SplitData` and its fingerprint.
"""

from __future__ import annotations

import dataclasses
import filecmp
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import xxhash

from pipeline.errors import UserError
from pipeline.evaluation.library_data import library_errors, load_table

FROM_LIBRARY = "datasets:"  # begins the name of a data set that the `datasets` library reads
Examples = TypeVar("Examples")
Other = TypeVar("Other")


@dataclass
class SplitData(Generic[Examples]):
    """Training examples of one language, development and test examples of all. A task's subclass says what they are."""

    train: Examples
    dev: dict[str, Examples]
    test: dict[str, Examples]
    unit: ClassVar[str] = "test examples"  # what a language may lack, for messages

    def only(self, languages: Iterable[str]) -> Self:
        """The same with the development and test examples of these languages. A language may have no development examples."""
        chosen = list(languages)
        dev, test = ({x: of[x] for x in chosen if x in of} for of in (self.dev, self.test))
        return dataclasses.replace(self, dev=dev, test=test)

    def convert(self, function: Callable[[Examples], Other]) -> SplitData[Other]:
        """The same with `function(examples)` in place of examples."""
        dev, test = ({x: function(examples) for x, examples in of.items()} for of in (self.dev, self.test))
        return SplitData(function(self.train), dev, test)

    def about(self) -> dict[str, Any]:
        """What the results say about the data."""
        return {}

    def fingerprint(self) -> str:
        """Changes with any example or language."""
        digest = xxhash.xxh3_128()
        for name, examples in [("", self.train), *self.dev.items(), *self.test.items()]:
            digest.update(repr((name, *self.content_of(examples))).encode())
        return digest.hexdigest()

    def content_of(self, examples: Any) -> tuple[Any, ...]:
        """What the fingerprint covers of the examples."""
        return (examples,)


def only_one(found: list[Path]) -> Path:
    """The file that was found; several are accepted only if they have the same content."""
    for other in found[1:]:
        if not filecmp.cmp(found[0], other, shallow=False):
            raise UserError(
                f"{found[0]} and {other} differ, and only one can be read. Name a directory that has one of them."
            )
    return found[0]


def splits_from_library(
    source: str,
    train_language: str,
    languages: list[str] | None,
    most: tuple[int | None, int | None],
    otherwise: str,
    of_table: Callable[[Any, int | None, str], Examples],
) -> tuple[Examples, dict[str, Examples], dict[str, Examples]]:
    """Training, development and test examples of a data set of the hub with one configuration per language.

    The library caches what is read.

    Args:
        source: `datasets:NAME`
        languages: development and test languages; None: all
        most: number of examples to train on, and of each language to evaluate; None: all
        otherwise: what to do without the library, for messages
        of_table: called with a table, the number of examples and what the table is called
    """
    name = source.removeprefix(FROM_LIBRARY)
    with library_errors(name, otherwise):
        import datasets  # slow to import, and only needed here

        known = [config for config in datasets.get_dataset_config_names(name) if config != "all_languages"]
        if missing := [x for x in [train_language, *(languages or [])] if x not in known]:
            raise UserError(f"{name} has no {', '.join(missing)}; it has {', '.join(known)}")

        def read(language: str, split: str, number: int | None) -> Examples:
            return of_table(load_table(name, language, split), number, f"{name}/{language}/{split}")

        dev, test = ({x: read(x, split, most[1]) for x in languages or known} for split in ("validation", "test"))
        return read(train_language, "train", most[0]), dev, test
