"""The options that errors of evaluation tasks print: each is added to the command, and the error does not come again."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.command import read_overrides
from pipeline.evaluation.encoder import load_encoder
from pipeline.evaluation.heldout import settings_of
from pipeline.evaluation.languages import choose_languages
from pipeline.evaluation.ranks import alone
from pipeline.evaluation.speed import evaluate_speed
from pipeline.evaluation.task import tasks
from tests.conftest import SAMPLES
from tests.unit.evaluation.collections import write_collection
from tests.unit.evaluation.labelled_pairs import write_pawsx, write_xnli
from tests.unit.evaluation.questions import write_mlqa
from tests.unit.evaluation.tagged_words import write_ud, write_wikiann
from tests.unit.printed import settings_in


def read(*overrides: str) -> None:
    """What a task reads before a model is loaded. Raises its error."""
    settings = read_overrides(list(overrides))
    for name in {override.partition(".")[0] for override in overrides}:
        tasks()[name].check(getattr(settings, name))


def error_of(call: Callable[..., object], *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data of all tasks that read files, in directories with the names of the tasks."""
    root = tmp_path_factory.mktemp("my data")
    write_xnli(root / "xnli")
    write_pawsx(root / "pawsx")
    write_ud(root / "tagging")
    write_mlqa(root / "mlqa", {"en": "en", "de": "de"}, train=4, evaluation=2)
    write_collection(root / "beir")
    return root


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("xnli", ["languages=[de, xx]"]),
        ("xnli", ["languages=[xx]"]),
        ("pawsx", ["languages=[de, xx]"]),
        ("pawsx", ["languages=[xx, yy]"]),
        ("pawsx", ["train_language=xx"]),
        ("tagging", ["languages=[de, xx]"]),
        ("tagging", ["languages=[xx]"]),
        ("tagging", ["train_language=xx"]),
        ("mlqa", ["languages=[en, xx]"]),
        ("mlqa", ["languages=[xx]"]),
        ("beir", ["split=none"]),
        ("retrieval", ["languages=[sw, xx]"]),
        ("retrieval", ["languages=[xx]"]),
    ],
)
def test_languages_that_the_data_does_not_have(task: str, settings: list[str], data: Path) -> None:
    places = {
        "mlqa": [f"mlqa.data={data / 'mlqa'}", f"mlqa.train={data / 'mlqa' / 'train-v1.1.json'}"],
        "beir": [f"beir.data=['{data / 'beir'}']"],
        "retrieval": [f"retrieval.pairs={SAMPLES / 'parallel'}"],
    }
    words = [*places.get(task, [f"{task}.data={data / task}"]), *(f"{task}.{setting}" for setting in settings)]
    message = error_of(read, *words)
    fixes = settings_in(message)
    assert fixes, message
    for fix in fixes:
        read(*words, fix)


def test_files_of_several_layouts(tmp_path: Path) -> None:
    write_wikiann(write_ud(tmp_path / "both"))
    words = [f"tagging.data={tmp_path / 'both'}"]
    (fix,) = settings_in(error_of(read, *words))
    read(*words, fix)


def test_training_sentences_without_entities(tmp_path: Path) -> None:
    path = write_wikiann(tmp_path / "wikiann") / "en" / "train"
    path.write_text("Das\tO\nist\tO\n\n" * 3 + path.read_text())
    words = [f"tagging.data={tmp_path / 'wikiann'}", "tagging.max_train=2"]
    (fix,) = settings_in(error_of(read, *words))
    read(*words, fix)
    path.write_text("Das\tO\nist\tO\n\n" * 3)
    assert settings_in(error_of(read, words[0])) == [], "more sentences would not help"


def test_xnli_with_languages_in_one_file_only(data: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(data / "xnli", tmp_path / "xnli")
    path = directory / "XNLI-1.0" / "xnli.test.tsv"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("de\t")) + "\n")
    words = [f"xnli.data={directory}"]
    (fix,) = settings_in(error_of(read, *words))
    read(*words, fix)


@pytest.mark.parametrize("lengths", [[8, 65, 100], [65]])
def test_lengths_beyond_the_positions(lengths: list[int], tiny_teacher: Path) -> None:
    words = [f"speed.lengths={lengths}", "speed.batches=[1]", "speed.rounds=1", "speed.seconds_per_turn=0"]

    def time(*overrides: str) -> dict[str, Any]:
        return evaluate_speed([load_encoder(str(tiny_teacher))], read_overrides(list(overrides)).speed)

    (fix,) = settings_in(error_of(time, *words))
    time(*words, fix)


def test_texts_longer_than_the_positions(tiny_teacher: Path) -> None:
    encoder = load_encoder(str(tiny_teacher))
    (fix,) = settings_in(error_of(encoder.check_max_length, 100, "sts.max_length"))
    encoder.check_max_length(read_overrides([fix]).sts.max_length, "sts.max_length")


def student_of(teacher: Path, directory: Path, **recipe: Any) -> str:
    shutil.copytree(teacher, directory)
    (directory / "lineage.json").write_text(json.dumps({"recipe": {"steps": 1, **recipe}}))
    return str(directory)


DIFFERENT = [
    {"seq_len": 48}, {"languages": ["sw", "tr"]}, {"documents": "separate"}, {"relations": {"heads": 8}},
    {"relations": {"pairs": {"q-k": 2.0}}}, {"relations": {"teacher_layer": 2}},
]  # fmt: skip


@pytest.mark.parametrize("trained", DIFFERENT, ids=str)
def test_students_that_were_trained_differently(trained: dict[str, Any], tiny_teacher: Path, tmp_path: Path) -> None:
    """The fix chooses one value for both: also where the first was trained with a default that is not set."""
    students = [student_of(tiny_teacher, tmp_path / name, **more) for name, more in (("one", {}), ("other", trained))]
    encoders = [load_encoder(student) for student in students]
    config = dataclasses.replace(read_overrides([]).heldout, teacher=str(tiny_teacher))
    message = error_of(settings_of, encoders, config)
    (fix,) = re.findall(r"choose with (--\w+ .*?) \(other rows", message)
    option, value = shlex.split(fix)
    words = [f"heldout.teacher={value}" if option == "--teacher" else value]
    if option == "--set":
        words.append(f"heldout.teacher={tiny_teacher}")
    settings_of(encoders, read_overrides(words).heldout)


def test_positions_of_separate_documents(tiny_teacher: Path) -> None:
    words = [f"heldout.teacher={tiny_teacher}", "heldout.positions=restart"]
    encoders = [load_encoder(str(tiny_teacher))]
    (fix,) = settings_in(error_of(settings_of, encoders, read_overrides(words).heldout))
    settings_of(encoders, read_overrides([*words, fix]).heldout)


def test_a_language_that_no_student_was_trained_on(tiny_teacher: Path, tmp_path: Path) -> None:
    encoders = [load_encoder(student_of(tiny_teacher, tmp_path / "student", languages=["tr"]))]
    arguments = (encoders, "retrieval.languages", "pairs")
    message = error_of(choose_languages, ["de", "sw"], None, *arguments)
    (fix,) = settings_in(message)
    chosen = choose_languages(["de", "sw"], read_overrides([fix]).retrieval.languages, *arguments)
    assert chosen.chosen == ["de"]


def test_languages_without_development_examples(data: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """Swahili alone has none; the message names German, of which the data that was read has some."""
    words = [f"tagging.data={data / 'tagging'}", "tagging.learning_rates=[1e-3]", "tagging.epochs=1"]
    encoders = [load_encoder(student_of(tiny_teacher, tmp_path / "student", languages=["sw"]))]

    def run(*overrides: str) -> None:
        settings = read_overrides([*overrides, "tagging.max_length=48", "tagging.max_train=8"]).tagging
        tasks()["tagging"].evaluate(encoders, settings, alone(), tmp_path / "out")

    (fix,) = settings_in(error_of(run, *words))
    run(*words, fix)


def test_columns_of_scored_pairs(tmp_path: Path) -> None:
    """FIRST, SECOND and SCORE are the words that a user replaces."""
    table, lines = tmp_path / "pairs.tsv", tmp_path / "pairs.jsonl"
    rows = [("one", "two", 1.0, "x"), ("three", "four", 2.0, "y")]
    table.write_text("a\tb\tc\td\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    lines.write_text("".join(json.dumps(dict(zip("abcd", row, strict=True))) + "\n" for row in rows))
    for path in (table, lines):
        words = [f"sts.files=['{path}']"]
        (fix,) = settings_in(error_of(read, *words))
        read(*words, fix.replace("FIRST", "a").replace("SECOND", "b").replace("SCORE", "c"))


@pytest.mark.parametrize("task", ["xnli", "pawsx", "tagging", "mlqa", "sts", "beir", "retrieval"])
def test_the_settings_of_a_task_without_data_exist(task: str, tmp_path: Path) -> None:
    words = [f"retrieval.pairs={tmp_path}"] if task == "retrieval" else [f"{task}.max_length=48"]
    message = error_of(read, *words)
    fixes = settings_in(message)
    assert fixes, message
    read_overrides(fixes)
