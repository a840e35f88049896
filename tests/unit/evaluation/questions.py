"""A small SQuAD and MLQA in the official layouts. The answer is always the same word, so a model can learn it."""

from __future__ import annotations

import json
import random
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from pipeline.evaluation.finetuning.squad_windows import COMPLETE_WINDOWS_SINCE
from tests.unit.evaluation.labelled_pairs import FILLER

TOKENIZERS = metadata.version("tokenizers")
HAS_ALL_WINDOWS = Version(TOKENIZERS) >= Version(COMPLETE_WINDOWS_SINCE)  # MLQA can be evaluated
needs_all_windows = pytest.mark.skipif(
    not HAS_ALL_WINDOWS,
    reason=f"tokenizers {TOKENIZERS} drops windows, and `evaluate mlqa` ends with an error that says so",
)

ANSWER, WRONG = "network", "system"


def write_mlqa(directory: Path, gold: dict[str, str], train: int = 96, evaluation: int = 8) -> Path:
    """Write the files. `gold`: language -> the correct answer."""
    write_squad(directory / "train-v1.1.json", train)
    for split in ("dev", "test"):
        for language, answer in gold.items():
            name = f"{split}-context-{language}-question-{language}.json"
            write_squad(directory / "MLQA_V1" / split / name, evaluation, answer)
    return directory


def write_squad(path: Path, count: int, gold: str = ANSWER) -> Path:
    """Write one file. The contexts contain `network` once; with another `gold`, what is learned is wrong."""
    draw = random.Random(count)
    paragraphs = []
    for number in range(count):
        words = draw.choices([word for word in FILLER if word != gold], k=draw.choice([8, 50]))
        words.insert(draw.randrange(len(words)), ANSWER)
        if gold != ANSWER:
            words.append(gold)
        context = " ".join(words)
        answer = {"text": gold, "answer_start": f" {context} ".index(f" {gold} ")}
        paragraphs.append(
            {"context": context, "qas": [{"id": f"q{number}", "question": "Which?", "answers": [answer]}]}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path
