"""Answers whose offset is not where they are: found nearby and counted, or rejected by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.evaluation.finetuning.squad_data import read_squad
from tests.unit.evaluation.questions import ANSWER, needs_all_windows, write_mlqa

CONTEXT = "Café 🏰🏰 in the old town, the old station, the end"


def squad_file(path: Path, answers: list[tuple[str, object]], context: str = CONTEXT) -> Path:
    """One question per answer, and 400 more with correct offsets, so that one moved answer is a small share."""
    qas = [
        {"id": f"a{n}", "question": "Where?", "answers": [{"text": text, "answer_start": start}]}
        for n, (text, start) in enumerate(answers)
    ]
    right = {"text": "town", "answer_start": CONTEXT.index("town")}
    paragraphs = [
        {"context": context, "qas": qas},
        {"context": CONTEXT, "qas": [{"id": f"r{n}", "question": "Where?", "answers": [right]} for n in range(400)]},
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    return path


def utf16(place: int) -> int:
    return len(CONTEXT[:place].encode("utf-16-le")) // 2


@pytest.mark.parametrize(
    "count", [utf16, lambda place: len(CONTEXT[:place].encode()), lambda p: p - 1, lambda p: p + 3]
)
def test_an_answer_nearby_is_found_and_counted(count, tmp_path: Path) -> None:
    place = CONTEXT.index("station")
    (question, *others) = read_squad(squad_file(tmp_path / "squad.json", [("station", count(place))]))
    assert (question.starts, question.moved) == ((place,), 1)
    assert not any(other.moved for other in others)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (("old", CONTEXT.index("old") + 5), "question a0: the answer 'old' .* which one is meant is not clear"),
        (("Station", CONTEXT.index("station")), "not nearby either"),
        (("town", 0), "not nearby either"),
        (("end", -1), "not nearby either"),
        (("  ", 4), "not nearby either"),
        (("town", "23"), "answer_start` is '23', not an integer"),
        (("town", True), "not an integer"),
        ((7, 23), "does not have the layout of SQuAD"),
    ],
)
def test_a_missing_answer_is_rejected(answer, message: str, tmp_path: Path) -> None:
    context = CONTEXT if answer != ("town", 0) else CONTEXT.replace("Café 🏰🏰", "x" * 40)
    with pytest.raises(UserError, match=message):
        read_squad(squad_file(tmp_path / "squad.json", [answer], context))


def test_a_file_with_byte_or_utf16_offsets_is_rejected(tmp_path: Path) -> None:
    answers = [(text, utf16(CONTEXT.index(text))) for text in ("station", "end", "town", "in the", "old town")]
    with pytest.raises(UserError, match=r"5 of 405 answers .*UTF-16"):
        read_squad(squad_file(tmp_path / "squad.json", answers))


def test_an_id_twice(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "squad.json", [])
    path.write_text(path.read_text().replace('"r7"', '"r6"'))
    with pytest.raises(UserError, match="question r6: the id occurs twice"):
        read_squad(path)


@needs_all_windows
def test_moved_answers_are_in_table_and_figures(tiny_teacher: Path, tmp_path: Path, capsys) -> None:
    directory = write_mlqa(tmp_path / "data", {"en": ANSWER}, train=12, evaluation=2)
    train = squad_file(directory / "train.json", [("station", utf16(CONTEXT.index("station")))])
    settings = [f"mlqa.train={train}", f"mlqa.data={directory}", "mlqa.languages=[en]", "mlqa.max_train=120"]
    settings += ["mlqa.learning_rates=[1e-3]", "mlqa.epochs=1", "mlqa.max_length=48", "mlqa.stride=8"]
    main(
        ["evaluate", str(tiny_teacher), "--tasks", "mlqa", "--output", str(tmp_path / "out")]
        + [word for setting in settings for word in ("--set", setting)]
    )
    (result,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["mlqa"].values()
    assert result["moved_answers"] == 1
    assert "1 answer(s) were found near" in capsys.readouterr().out
