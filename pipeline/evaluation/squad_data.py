"""Questions with answers in their contexts, from JSON files in the layout of SQuAD v1.1 and MLQA.

In: a SQuAD file to train on (or `datasets:rajpurkar/squad`), and MLQA's `test/test-context-xx-question-xx.json` and
`dev/dev-...` at any depth of a directory. Out: lists of `Question`. Used by mlqa.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from pipeline.errors import UserError
from pipeline.evaluation.xnli_data import FROM_LIBRARY


@dataclass(frozen=True)
class Question:
    """One question; answer i is `context[starts[i] : starts[i] + len(answers[i])]`."""

    identifier: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass
class QaData:
    """Questions to train on, and by language those to choose with and to test with."""

    train: list[Question]
    dev: dict[str, list[Question]]
    test: dict[str, list[Question]]

    def fingerprint(self) -> str:
        """Changes with any question, context, answer or language."""
        digest = xxhash.xxh3_128()
        for name, questions in [("", self.train), *self.dev.items(), *self.test.items()]:
            digest.update(repr((name, questions)).encode())
        return digest.hexdigest()


def read_qa(
    train: str, directory: str, languages: list[str], max_train: int | None, max_evaluation: int | None
) -> QaData:
    """Everything that the task needs; `None` stands for all questions."""
    if not train or not directory:
        raise UserError(
            "the task mlqa needs SQuAD v1.1 to train on and MLQA: --set mlqa.train=train-v1.1.json (or "
            "datasets:rajpurkar/squad) --set mlqa.data=MLQA_V1"
        )
    if directory.startswith(FROM_LIBRARY):
        raise UserError(
            f"mlqa.data is {directory!r}, but MLQA is read from a directory only: unpack MLQA_V1.zip and name where, "
            "--set mlqa.data=MLQA_V1 (mlqa.train may be datasets:rajpurkar/squad)"
        )
    dev, test = (
        {x: read_squad(_find(directory, split, x, languages), max_evaluation) for x in languages}
        for split in ("dev", "test")
    )
    if train.startswith(FROM_LIBRARY):
        return QaData(_from_library(train.removeprefix(FROM_LIBRARY), max_train), dev, test)
    if not Path(train).is_file():
        raise UserError(f"there is no {train}. Name SQuAD's train-v1.1.json: --set mlqa.train=FILE")
    return QaData(read_squad(Path(train), max_train), dev, test)


def _find(directory: str, split: str, language: str, languages: list[str]) -> Path:
    name = f"{split}-context-{language}-question-{language}.json"
    found = sorted(Path(directory).rglob(name))
    if not found:
        there = sorted({path.stem.rpartition("-")[2] for path in Path(directory).rglob(f"{split}-context-*.json")})
        has = f"it has {', '.join(there)}" if there else "it has none of MLQA's files"
        raise UserError(
            f"there is no {name} below {directory}; {has}. Unpack MLQA_V1.zip there, or choose: --set mlqa.languages="
            f"[{', '.join(x for x in languages if x in there)}]"
        )
    return found[0]


def read_squad(path: Path, most: int | None = None) -> list[Question]:
    """The first `most` questions of one file; what is wrong is named by its place in the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path} is not readable JSON: {error}") from None
    questions: list[Question] = []
    for question in _walk(tree, path):
        if most is not None and len(questions) >= most:
            break
        questions.append(question)
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _walk(tree: Any, path: Path) -> Iterator[Question]:
    place = "the file"
    try:
        for article_number, article in enumerate(tree["data"]):
            place = f"data[{article_number}]"
            for paragraph_number, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{article_number}].paragraphs[{paragraph_number}]"
                for entry in paragraph["qas"]:
                    place = f"question {entry['id']}"
                    answers = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                    yield _checked(entry["id"], entry["question"], paragraph["context"], answers, path)
    except (KeyError, TypeError) as error:
        wrong = f"lacks {error}" if isinstance(error, KeyError) else "is not built like SQuAD v1.1"
        raise UserError(f"{path}, {place}: {wrong}") from None


def _checked(identifier: str, question: str, context: str, answers: list[tuple[str, int]], where: object) -> Question:
    """A question that can be learnt from and scored."""
    if not question.strip() or not context.strip():
        raise UserError(f"{where}, question {identifier}: question or context is empty")
    if not answers:
        raise UserError(f"{where}, question {identifier}: no answer. SQuAD v1.1 and MLQA have one for every question")
    for text, start in answers:
        if not text.strip() or not 0 <= start <= len(context) - len(text):
            raise UserError(
                f"{where}, question {identifier}: the answer {text[:40]!r} at character {start} is not inside its context "
                f"of {len(context)} characters"
            )
    texts, starts = zip(*answers, strict=True)
    return Question(identifier, question.strip(), context, texts, starts)


def _from_library(name: str, most: int | None) -> list[Question]:
    import datasets  # slow to import, and only this way of reading needs it

    try:
        table = datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} cannot be read by the datasets library ({' '.join(str(error).split())[:300]}). It needs the network "
            "once; or name SQuAD's own file: --set mlqa.train=train-v1.1.json"
        ) from None
    rows = table if most is None else table.take(most)
    return [
        _checked(
            *(row["id"], row["question"], row["context"]),
            list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)),
            name,
        )
        for row in rows
    ]
