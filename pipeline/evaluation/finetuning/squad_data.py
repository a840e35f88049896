"""Reads questions with answers in their contexts, from JSON files in the layout of SQuAD v1.1 and MLQA.

In: a SQuAD file to train on (or `datasets:rajpurkar/squad`), and MLQA's `test/test-context-xx-question-xx.json` and
`dev/dev-...` at any depth of a directory. Out: lists of `Question`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.finetuning.split_data import FROM_LIBRARY, SplitData, only_one
from pipeline.evaluation.languages import among
from pipeline.evaluation.library_data import library_errors, load_table
from pipeline.runtime.json_files import read_json

GREATEST_SHARE_MOVED = 0.01  # of a file's answers; if more were moved, its offsets count something else than characters
LAYOUT = "Correct the file; SQuAD v1.1's own file shows the layout"
BLANKS_NEARBY = 5  # characters by which an offset may differ even if all characters before it have one byte


@dataclass(frozen=True)
class Question:
    """One question; answer i is `context[starts[i] : starts[i] + len(answers[i])]`."""

    identifier: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    moved: int = field(
        default=0, repr=False, compare=False
    )  # number of answers whose offset in the file is slightly wrong


class QaData(SplitData[list[Question]]):
    """Questions with answers."""

    unit = "test questions"

    def about(self) -> dict[str, Any]:
        """Numbers of training questions, and of answers whose offset in the file is wrong."""
        parts = (self.train, *self.dev.values(), *self.test.values())
        return {"train_questions": len(self.train), "moved_answers": sum(one.moved for part in parts for one in part)}


def read_qa(
    train: str, directory: str, languages: list[str], max_train: int | None, max_evaluation: int | None
) -> QaData:
    """Read everything that the task needs.

    Args:
        train: SQuAD file, or `datasets:NAME`
        directory: where MLQA's files are
        max_train, max_evaluation: number of questions, of all or of each language; None: all
    """
    if not train or not directory:
        raise UserError(
            "the task mlqa needs SQuAD v1.1 to train on and MLQA: --set mlqa.train=train-v1.1.json (or "
            "datasets:rajpurkar/squad) --set mlqa.data=MLQA_V1"
        )
    if directory.startswith(FROM_LIBRARY):
        raise UserError(
            f"mlqa.data is {directory!r}, but MLQA is read from a directory only: unpack MLQA_V1.zip and name its directory, "
            "--set mlqa.data=MLQA_V1 (mlqa.train may be datasets:rajpurkar/squad)"
        )
    dev, test = (
        {x: read_squad(_find(directory, split, x, languages), max_evaluation) for x in languages}
        for split in ("dev", "test")
    )
    if train.startswith(FROM_LIBRARY):
        return QaData(_from_library(train.removeprefix(FROM_LIBRARY), max_train), dev, test)
    if not Path(train).is_file():
        raise UserError(f"{train} not found. Name SQuAD's train-v1.1.json: --set mlqa.train=FILE")
    return QaData(read_squad(Path(train), max_train), dev, test)


def _find(directory: str, split: str, language: str, languages: list[str]) -> Path:
    name = f"{split}-context-{language}-question-{language}.json"
    found = sorted(Path(directory).rglob(name))
    if not found:
        there = sorted({path.stem.rpartition("-")[2] for path in Path(directory).rglob(f"{split}-context-*.json")})
        has = f"it has {', '.join(there)}" if there else "it has none of MLQA's files"
        raise UserError(
            f"no {name} found below {directory}; {has}. Unpack MLQA_V1.zip there. {among('mlqa.languages', languages, there)}"
        )
    return only_one(found)


def read_squad(path: Path, most: int | None = None) -> list[Question]:
    """Read the first `most` questions of one file. An error names the place in the file."""
    tree = read_json(path, advice=LAYOUT)
    questions = _unique(itertools.islice(_walk(tree, path), most), path)
    if not questions:
        raise UserError(f"{path} has no questions. Name a file with `data[].paragraphs[].qas[]`, as in SQuAD v1.1")
    return questions


def _unique(questions: Iterable[Question], where: object) -> list[Question]:
    """The questions of one file, after checking that no id occurs twice and that few answers were moved."""
    found: dict[str, Question] = {}
    for question in questions:
        if question.identifier in found:
            raise UserError(
                f"{where}, question {question.identifier}: the id occurs twice. Give each question its own."
            )
        found[question.identifier] = question
    moved = [question for question in found.values() if question.moved]
    num_answers = sum(len(question.answers) for question in found.values())
    if sum(question.moved for question in moved) > GREATEST_SHARE_MOVED * num_answers:
        raise UserError(
            f"{where}: {sum(question.moved for question in moved)} of {num_answers} answers are not at their `answer_start` but "
            f"nearby (the first: question {moved[0].identifier}). The offsets seem to count bytes or UTF-16 units, or the "
            "contexts were stripped. Let `answer_start` count the characters (code points) of the context before the answer."
        )
    return list(found.values())


def _walk(tree: Any, path: Path) -> Iterator[Question]:
    place = "the file"
    try:
        for article_number, article in enumerate(tree["data"]):
            place = f"data[{article_number}]"
            for paragraph_number, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{article_number}].paragraphs[{paragraph_number}]"
                for entry in paragraph["qas"]:
                    if not all(isinstance(entry[key], str) for key in ("id", "question")):
                        raise TypeError("id and question are text")
                    place = f"question {entry['id'][:80]}"
                    answers = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                    yield _checked(entry["id"], entry["question"], paragraph["context"], answers, path)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        wrong = f"lacks {error}" if isinstance(error, KeyError) else "does not have the layout of SQuAD v1.1"
        raise UserError(f"{path}, {place}: {wrong}. {LAYOUT}.") from None


def _checked(identifier: str, question: str, context: str, answers: list[tuple[str, int]], where: object) -> Question:
    """The question, after checking that it has what training and scoring need."""
    if not question.strip() or not context.strip():
        raise UserError(f"{where}, question {identifier}: question or context is empty. Delete the question.")
    if not answers:
        raise UserError(
            f"{where}, question {identifier}: no answer. SQuAD v1.1 and MLQA have one for every question; from SQuAD 2.0, remove "
            "those with `is_impossible`."
        )
    texts = tuple(text for text, _ in answers)
    starts = tuple(_place_of(text, start, context, f"{where}, question {identifier}") for text, start in answers)
    moved = sum(start != given for start, (_, given) in zip(starts, answers, strict=True))
    return Question(identifier, question.strip(), context, texts, starts, moved)


def _place_of(text: str, start: Any, context: str, where: str) -> int:
    """Position of the answer: at its offset, or at the only place nearby that has its text.

    Offsets in bytes or UTF-16 units are too high by at most the difference between the context's bytes and characters.
    """
    if not isinstance(start, int) or isinstance(start, bool):
        raise UserError(f"{where}: `answer_start` is {start!r}, not an integer. Correct it or delete the question.")
    if text.strip() and start >= 0 and context[start : start + len(text)] == text:
        return start
    reach = len(context.encode("utf-8", "surrogatepass")) - len(context) + BLANKS_NEARBY
    near = [place for place in _occurrences(text, context) if abs(place - start) <= reach]
    if len(near) == 1:
        return near[0]
    there = f"{len(near)} times nearby, and which one is meant is not clear" if near else "not nearby either"
    raise UserError(
        f"{where}: the answer {text[:40]!r} is not at character {start} of its context of {len(context)} characters, where "
        f"{context[max(start, 0) : max(start, 0) + 40]!r} is; it is {there}. Correct `answer_start` (characters, not bytes) or "
        "delete the question."
    )


def _occurrences(text: str, context: str) -> Iterator[int]:
    place = context.find(text) if text.strip() else -1
    while place >= 0:
        yield place
        place = context.find(text, place + 1)


def _from_library(name: str, most: int | None) -> list[Question]:
    with library_errors(name, "name SQuAD's own file: --set mlqa.train=train-v1.1.json"):
        table = load_table(name, None, "train")
    rows = table if most is None else table.take(most)
    questions = (
        _checked(
            *(row["id"], row["question"], row["context"]),
            list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)),
            name,
        )
        for row in rows
    )
    return _unique(questions, name)
