"""A small XNLI and a small PAWS-X in the official layouts. One word of the hypothesis determines the label, so a model can learn it."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.finetuning.loop import FinetuneTask, GridPoint, finetune
from pipeline.evaluation.finetuning.xnli import XnliConfig
from pipeline.evaluation.ranks import alone

MARKERS = {"entailment": "world", "neutral": "network", "contradiction": "user"}
FILLER = "the of and to in is file system you can with your for on that this".split()
HEADER = "language gold_label sentence1_binary_parse sentence1 sentence2 promptID pairID genre match".split()


def write_xnli(
    directory: Path, train: int = 96, evaluation: int = 24, languages: tuple[str, ...] = ("en", "de", "sw")
) -> Path:
    """Write the files. The labels of `sw` are shifted by one, so what is learned from `en` is wrong there."""
    (directory / "XNLI-MT-1.0" / "multinli").mkdir(parents=True)
    (directory / "XNLI-1.0").mkdir()
    draw = random.Random(0)
    lines = ["premise\thypo\tlabel"]
    for number in range(train):
        first, second, label = pair(draw, number)
        lines.append(f"{first}\t{second}\t{'contradictory' if label == 'contradiction' else label}")
    (directory / "XNLI-MT-1.0" / "multinli" / "multinli.train.en.tsv").write_text("\n".join(lines) + "\n")
    for split in ("dev", "test"):
        lines = ["\t".join(HEADER)]
        for language in languages:
            for number in range(evaluation):
                first, second, label = pair(draw, number)
                if language == "sw":
                    label = list(MARKERS)[(list(MARKERS).index(label) + 1) % 3]
                cells = dict.fromkeys(HEADER, "x") | {"language": language, "gold_label": label}
                lines.append("\t".join((cells | {"sentence1": first, "sentence2": second}).values()))
        (directory / "XNLI-1.0" / f"xnli.{split}.tsv").write_text("\n".join(lines) + "\n")
    return directory


def write_pawsx(
    directory: Path, train: int = 96, evaluation: int = 24, languages: tuple[str, ...] = ("en", "de")
) -> Path:
    """The files of x-final. In `de`, the first test pair is not translated."""
    draw = random.Random(0)
    splits = {"train": train, "translated_train": train, "dev_2k": evaluation, "test_2k": evaluation}
    for language in languages:
        (directory / language).mkdir(parents=True)
        for split, count in splits.items():
            lines = ["id\tsentence1\tsentence2\tlabel"]
            for number in range(count):
                label = draw.randrange(2)
                first, second = (" ".join(draw.choices(FILLER, k=4)) for _ in range(2))
                lines.append(f"{number}\t{first}\t{second} {('network', 'world')[label]}\t{label}")
            if (language, split) == ("de", "test_2k"):
                lines.insert(1, "0\tNS\tNS\t1")
            if (split == "train") == (language == "en") or split in ("dev_2k", "test_2k"):
                (directory / language / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return directory


def write_hub_data(directory: Path, rows: dict[str, list[dict[str, Any]]], about: str = "") -> str:
    """A data set of the hub with the config `en` and the rows of each split. `about`: more of its README. Returns its name."""
    for split, of in rows.items():
        (directory / f"{split}.jsonl").write_text("\n".join(map(json.dumps, of)))
    splits = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in rows)
    (directory / "README.md").write_text(f"---\n{about}configs:\n- config_name: en\n  data_files:\n{splits}---\n")
    return f"datasets:{directory}"


def pair(draw: random.Random, number: int) -> tuple[str, str, str]:
    label = list(MARKERS)[number % 3]
    first, second = (draw.choices(FILLER, k=4) for _ in range(2))
    second.insert(draw.randrange(5), MARKERS[label])
    return " ".join(first), " ".join(second), label


def interrupted_in_epoch_3(task: FinetuneTask, settings: XnliConfig, point: GridPoint, directory: Path) -> Path:
    """Fine-tune until Ctrl-C in the scoring after the third epoch. Returns the state of the second."""
    calls = 0

    def score(model, split: str) -> dict:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return task.score(model, split)

    with pytest.raises(KeyboardInterrupt):
        finetune(dataclasses.replace(task, score=score), settings, point, directory, alone(), "tiny")
    (left,) = directory.glob("step-*")
    return left
