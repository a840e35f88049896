"""A small SQuAD and MLQA in the official layouts. The answer is always the same word, so a model can learn it."""

from __future__ import annotations

import json
import random
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from pipeline.errors import UserError
from pipeline.evaluation.finetuning.squad_windows import COMPLETE_WINDOWS_SINCE, check_last_window
from tests.unit.evaluation.labelled_pairs import FILLER

TOKENIZERS = metadata.version("tokenizers")


def rejection() -> str:
    """What `evaluate mlqa` says with tokenizers 0.23.1 and 0.23.2, for the windows that these return for a text."""
    with pytest.raises(UserError) as caught:
        check_last_window([51, 44], step=16, num_tokens=126)
    return str(caught.value)


needs_all_windows = pytest.mark.skipif(
    Version(TOKENIZERS) < Version(COMPLETE_WINDOWS_SINCE), reason=f"`evaluate mlqa` ends with this error: {rejection()}"
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
