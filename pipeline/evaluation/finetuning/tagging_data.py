"""Finds the files of a tagging data set and reads them, or reads a data set of the hub through the `datasets` library.

In: a directory with the official files of UD treebanks, Universal NER, WikiANN (PAN-X), XTREME, MasakhaNER or
CoNLL 2002/2003, at any depth; or `datasets:unimelb-nlp/wikiann`. Out: tagged sentences to train on, and by language to
select and to test on. A language without a development file is tested only.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.evaluation.finetuning.loop import FinetuneConfig
from pipeline.evaluation.finetuning.split_data import FROM_LIBRARY, SplitData, only_one, splits_from_library
from pipeline.evaluation.finetuning.tagging_files import (
    UPOS,
    Labels,
    TaggedSentences,
    read_columns,
    read_conllu,
    tagged_sentences,
)
from pipeline.evaluation.languages import among

_TREEBANK = r"(?P<name>(?P<language>[a-z]{2,3})_\w+)-ud-(?P<split>train|dev|test)(-\w+)?"
_CODE = r"(?P<name>(?P<language>[a-z]{2,3}(-[A-Za-z-]+)?|simple))"  # WikiANN: Simple English
# Layout -> pattern of the end of a file's path. Of UD, some training files are in parts (`cs_pdt-ud-train-c.conllu`).
LAYOUTS = {
    "ud": re.compile(rf"{_TREEBANK}\.conllu"),
    "uner": re.compile(rf"{_TREEBANK}\.iob2"),
    "wikiann": re.compile(rf"{_CODE}/(?P<split>train|dev|test)(\.txt)?"),  # MasakhaNER has .txt
    "xtreme": re.compile(rf"(?P<split>train|dev|test)-{_CODE}\.tsv"),
    "conll": re.compile(r"(?P<name>(?P<language>esp|ned|eng|deu))\.(?P<split>train|testa|testb)"),
}
CONLL_NAMES = {"esp": "es", "ned": "nl", "eng": "en", "deu": "de", "testa": "dev", "testb": "test"}
LIBRARY_COLUMNS = ("upos", "ner_tags")  # of a data set of the hub, next to `tokens`
NOT_READ = "not-to-release"  # of UD's repositories: the sources that the released files were made of


@dataclass
class TaggingConfig(FinetuneConfig):
    """Where tagged sentences are. Epochs, batch and length are XTREME's; the learning rates are those of XNLI."""

    epochs: int = 10
    batch: int = 32
    data: str = ""  # directory with the official files, or datasets:unimelb-nlp/wikiann
    train_language: str = "en"  # language of the training sentences, or one of its treebanks (en_ewt)
    piece: Literal["first", "text"] = "first"  # that a word's tag is predicted at; text: not at `▁` alone
    layout: Literal["auto", "ud", "uner", "wikiann", "xtreme", "conll"] = "auto"  # needed if a directory has several
    scheme: Literal["auto", "lenient"] = "auto"  # lenient: entity tags that mix IOB1, IOB2 and BIOES are accepted


@dataclass
class TaggingData(SplitData[TaggedSentences]):
    """Tagged sentences. `tags`: every tag that the head predicts."""

    train_language: str
    labels: Labels
    tags: list[str]
    unit = "test sentences"

    def about(self) -> dict[str, Any]:
        """What was read, and what of it does not count as usual."""
        parts = {f"{self.train_language} (training)": self.train, **self.test}
        types = {tag.partition("-")[2] for tag in self.tags}
        unknown = {
            language: sorted(
                {kind for tags in part.tags for tag in tags if (kind := tag.partition("-")[2]) not in types}
            )
            for language, part in self.test.items()
        }
        return {
            "labels": self.labels,
            "train_language": self.train_language,
            "train_sentences": len(self.train),
            "without_dev": [language for language in self.test if language not in self.dev],
            "schemes": {name: part.scheme for name, part in parts.items() if part.scheme not in ("", "IOB2")},
            "types_not_trained": {language: kinds for language, kinds in unknown.items() if kinds},
            "skipped": dict(sum((part.skipped for part in parts.values()), Counter())),
        }

    def content_of(self, examples: TaggedSentences) -> tuple[list[Any], ...]:
        return examples.words, examples.tags


Files = dict[tuple[str, str], list[Path]]  # (treebank or language, split) -> files


def read_tagging(config: TaggingConfig) -> TaggingData:
    """Read everything that the task needs.

    Raises:
        UserError: no or unclear files, or a file that cannot be read
    """
    if config.data.startswith(FROM_LIBRARY):
        return _from_library(config)
    layout, files = find_files(config.data, config.layout)

    def read(language: str, split: str, most: int | None) -> TaggedSentences | None:
        paths = [path for name in sorted(_names(files, language)) for path in files.get((name, split), [])]
        parts = [_read_file(path, layout, most, config.scheme == "lenient") for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if part.labels != parts[0].labels:
                raise UserError(
                    f"{paths[0]} has {parts[0].labels} tags, {path} has {part.labels}. Name a directory with one kind of tags."
                )
        return _joined(parts, most)

    train = read(config.train_language, "train", config.max_train)
    if train is None:
        have = sorted({name for name, split in files if split == "train"})
        choose = f"Choose one of these: --set tagging.train_language={have[0]}" if have else "Name other data"
        raise UserError(
            f"no training file of {config.train_language} found below {config.data}; it has {', '.join(have) or 'none at all'}. "
            f"{choose}"
        )
    tested = sorted({_language(name) for name, split in files if split == "test"})
    languages = list(config.languages or tested)
    test = {x: found for x in languages if (found := read(x, "test", config.max_evaluation))}
    if missing := [x for x in languages if x not in test] or ([] if test else ["any language"]):
        raise UserError(
            f"no test file of {', '.join(missing)} found below {config.data}; it has {', '.join(tested) or 'none'}. "
            f"{among('tagging.languages', languages, tested)}"
        )
    dev = {x: found for x in languages if (found := read(x, "dev", config.max_evaluation))}
    return _checked(train, dev, test, config)


def find_files(source: str, asked: str) -> tuple[str, Files]:
    """The layout of a directory, and its files."""
    found: dict[str, Files] = defaultdict(lambda: defaultdict(list))
    for path in _all_files(source):
        ending = {"wikiann": f"{path.parent.name}/{path.name}"}
        for layout, pattern in LAYOUTS.items():
            if match := pattern.fullmatch(ending.get(layout, path.name)):
                name, split = (CONLL_NAMES.get(match[part], match[part]) for part in ("name", "split"))
                found[layout][name, split].append(path)
    layouts = [layout for layout in LAYOUTS if layout in found and asked in ("auto", layout)]
    if len(layouts) > 1:
        raise UserError(
            f"{source} has files of several layouts ({', '.join(layouts)}). Choose one: --set tagging.layout={layouts[0]}"
        )
    if not layouts:
        where = f"no tagged sentences found below {source}" if source else "the task tagging needs data"
        of = "" if asked == "auto" else f" in the layout {asked}"
        raise UserError(
            f"{where}{of}. Clone UD treebanks into one directory (xx_name-ud-train.conllu, -dev, -test), or unpack WikiANN "
            "(xx/train, xx/dev, xx/test), and name it: --set tagging.data=DIR. docs/evaluating.md has all layouts."
        )
    return layouts[0], {key: _different(paths) for key, paths in found[layouts[0]].items()}


def _different(paths: list[Path]) -> list[Path]:
    """The paths by file name. Two files of one name must have the same content."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_name[path.name].append(path)
    return [only_one(sorted(same)) for _, same in sorted(by_name.items())]


def _all_files(source: str) -> Iterable[Path]:
    """The files below a directory, also below links. A directory that several links name is read once."""
    seen: set[Path] = set()
    for directory, inside, names in os.walk(source, followlinks=True) if source else ():
        below = {name: Path(directory, name).resolve() for name in sorted(inside)}
        inside[:] = [x for x, real in below.items() if not x.startswith(".") and x != NOT_READ and real not in seen]
        seen.update(below[name] for name in inside)
        yield from (Path(directory, name) for name in sorted(names))


def _names(files: Files, language: str) -> set[str]:
    """The treebanks of a language, or the one treebank with this name."""
    return {name for name, _ in files if language in (name, _language(name))}


def _language(name: str) -> str:
    return name.partition("_")[0]


def _read_file(path: Path, layout: str, most: int | None, lenient: bool) -> TaggedSentences:
    return read_conllu(path, most) if layout == "ud" else read_columns(path, most, layout, lenient)


def _joined(parts: list[TaggedSentences], most: int | None) -> TaggedSentences | None:
    """The first `most` sentences of all parts; None without any part."""
    if not parts:
        return None
    schemes = list(dict.fromkeys(part.scheme for part in parts))
    return TaggedSentences(
        [words for part in parts for words in part.words][:most],
        [tags for part in parts for tags in part.tags][:most],
        parts[0].labels,
        ", ".join(schemes),
        sum((part.skipped for part in parts), Counter()),
    )


def _checked(
    train: TaggedSentences, dev: dict[str, TaggedSentences], test: dict[str, TaggedSentences], config: TaggingConfig
) -> TaggingData:
    train_language = config.train_language
    others = [x for of in (dev, test) for x, part in of.items() if part.labels != train.labels]
    if others:
        raise UserError(
            f"the training sentences of {train_language} have {train.labels} tags, those of {', '.join(dict.fromkeys(others))} have "
            "others. Name a directory with one kind of tags."
        )
    tags = list(UPOS) if train.labels == "upos" else sorted({tag for tags in train.tags for tag in (*tags, "O")})
    if len(tags) < 2:
        more = "Name other data" if config.max_train is None else "Read more: --set tagging.max_train=null"
        raise UserError(f"the training sentences of {train_language} have no entities. {more}")
    return TaggingData(train, dev, test, train_language, train.labels, tags)


def _from_library(config: TaggingConfig) -> TaggingData:
    """Read a data set like unimelb-nlp/wikiann."""
    if not config.languages:
        raise UserError(
            f"{config.data} has many languages, and each is downloaded. Name some: --set 'tagging.languages=[en, de]'"
        )

    def of_table(table: Any, most: int | None, where: str) -> TaggedSentences:
        return _from_table(table if most is None else table.take(most), where, config.scheme == "lenient")

    most = (config.max_train, config.max_evaluation)
    otherwise = "name a directory with the official files: --set tagging.data=DIR"
    found = splits_from_library(config.data, config.train_language, config.languages, most, otherwise, of_table)
    return _checked(*found, config)


def _from_table(table: Any, where: str, lenient: bool) -> TaggedSentences:
    column = next((name for name in LIBRARY_COLUMNS if name in table.features), None)
    if column is None or "tokens" not in table.features:
        raise UserError(
            f"{where} has the columns {', '.join(table.features)}; tagging needs tokens and one of {', '.join(LIBRARY_COLUMNS)}. "
            "Name another data set, or a directory: --set tagging.data=DIR"
        )
    names = getattr(getattr(table.features[column], "feature", None), "names", None)  # numbers are classes
    rows = [
        [(number, word, names[tag] if names else tag) for word, tag in zip(row["tokens"], row[column], strict=True)]
        for number, row in enumerate(table)
    ]
    return tagged_sentences([row for row in rows if row], f"{where}, row", lenient)
