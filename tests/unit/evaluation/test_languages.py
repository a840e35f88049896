"""A student is evaluated in the languages that it was trained on, and every table names the languages that it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.languages import choose_languages, covers, language_notes, marked
from pipeline.export.card_tables import measured_sections
from tests.unit.evaluation.all_tasks import evaluate_everything
from tests.unit.evaluation.questions import HAS_ALL_WINDOWS


def encoder(directory: Path, languages: list[str] | None) -> Encoder:
    """An encoder with the attributes that `choose_languages` reads."""
    directory.mkdir()
    if languages is not None:
        write_lineage(directory, languages)
    return Encoder(directory.name, None, None, 1, str(directory))


def write_lineage(directory: Path, languages: list[str]) -> None:
    recipe = {"seq_len": 32, "heldout_rows": 1, "languages": None, "relations": {"teacher_layer": 3, "heads": 12}}
    (directory / "lineage.json").write_text(json.dumps({"steps": 1, "languages": languages, "recipe": recipe}))


def test_languages_that_every_student_was_trained_on(tmp_path: Path) -> None:
    encoders = [
        encoder(tmp_path / "teacher", None),
        encoder(tmp_path / "a", ["de", "en", "sw"]),
        encoder(tmp_path / "b", ["de", "fr"]),
    ]
    found = choose_languages(["de", "fr", "sw", "th"], None, encoders, "xnli.languages", "test pairs")
    assert found.chosen == ["de"]
    assert found.left_out == {
        "fr": "not a language of a",
        "sw": "not a language of b",
        "th": "not a language of a, b",
        "en": "trained, but no test pairs",
    }
    (line,) = language_notes({"x": found.about()})
    assert line.startswith("languages left out: fr (not a language of a); sw (not a language of b);")


def test_a_trimmed_model_is_evaluated_in_the_languages_of_its_vocabulary(tmp_path: Path) -> None:
    """A trimmed student, and a trimmed teacher that was not trained here."""
    student, teacher = encoder(tmp_path / "student", ["de", "fr", "sw"]), encoder(tmp_path / "teacher", None)
    for model in (student, teacher):
        path = Path(model.path) / "lineage.json"
        about = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**about, "trimmed": {"languages": ["de", "th"]}}))
    found = choose_languages(["de", "fr", "th"], None, [student], "retrieval.languages", "pairs")
    assert (found.chosen, found.left_out["fr"]) == (["de"], "not a language of student")
    assert choose_languages(["de", "fr", "th"], None, [teacher], "retrieval.languages", "pairs").chosen == ["de", "th"]


def test_named_languages_are_used_as_they_are(tmp_path: Path) -> None:
    encoders = [encoder(tmp_path / "a", ["de", "sw"])]
    found = choose_languages(["de", "fr", "sw"], ["fr"], encoders, "xnli.languages", "test pairs")
    assert found.chosen == ["fr"]
    assert found.left_out == {"de": "not in xnli.languages", "sw": "not in xnli.languages"}


def test_named_languages_that_a_student_does_not_know_have_a_star(tmp_path: Path) -> None:
    encoders = [
        encoder(tmp_path / "teacher", None),
        encoder(tmp_path / "a", ["de"]),
        encoder(tmp_path / "b", ["de", "no"]),
    ]
    found = choose_languages(["de", "fr", "nb"], ["de", "fr", "nb"], encoders, "retrieval.languages", "pairs")
    assert found.untrained == ["fr", "nb"], "a was not trained on Norwegian"
    results = {"b": found.about()}
    assert marked(found.chosen, results) == ["de", "fr*", "nb*"]
    assert language_notes(results) == ["* a student was not trained on this language"]


def test_a_model_without_lineage_is_evaluated_in_all_languages(tmp_path: Path) -> None:
    found = choose_languages(["de", "fr"], None, [encoder(tmp_path / "a", None)], "xnli.languages", "test pairs")
    assert (found.chosen, found.left_out, language_notes({"a": found.about()})) == (["de", "fr"], {}, [])


def test_no_language_in_common(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set 'xnli\.languages=\[fr\]'"):
        choose_languages(["fr"], None, [encoder(tmp_path / "a", ["de"])], "xnli.languages", "test pairs")


@pytest.mark.parametrize(
    ("trained", "language", "covered"),
    [
        ("zh-Hans", "zh", True),
        ("zh", "cmn", True),
        ("deu", "de", True),
        ("no", "nb", True),
        ("de", "da", False),
        ("ur_roman", "ur", False),
        ("hi", "hi_rom", False),
    ],
)
def test_codes_of_one_language(trained: str, language: str, covered: bool) -> None:
    assert covers([trained], language) == covered


def test_every_table_and_the_card_name_the_languages_left_out(
    tiny_teacher: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tasks of all_tasks.py have de and sw pairs, en and de in XNLI and PAWS-X, en and zh in MLQA, en de and sw in tagging, hi sw he tr in shards."""
    student = tmp_path / "student"
    student.mkdir()
    for file in tiny_teacher.iterdir():
        (student / file.name).write_bytes(file.read_bytes())
    write_lineage(student, ["en", "de", "hi"])
    output = evaluate_everything(
        [str(student)], tiny_teacher, tiny_shards, tmp_path, without=("retrieval.languages", "mlqa.languages")
    )
    tasks = json.loads((output / "evaluation.json").read_text())["tasks"]
    found = {name: results[str(student)] for name, results in tasks.items()}
    assert list(found["heldout"]["per_language"]) == ["hi"]
    assert found["heldout"]["left_out"]["de"] == "trained, but no shards"
    assert found["heldout"]["left_out"]["sw"].startswith("not a language of")
    assert list(found["retrieval"]["per_pair"]) == ["de", "hi"]
    assert list(found["xnli"]["test"]) == ["en", "de"] or list(found["xnli"]["test"]) == ["de", "en"]
    assert list(found["tagging"]["test"]) == ["de", "en"]
    assert found["xnli"]["left_out"] == {"hi": "trained, but no test pairs"}
    assert capsys.readouterr().out.count("languages left out: ") == 5 + HAS_ALL_WINDOWS
    card = measured_sections([output], None)
    assert card.count("Languages left out: ") == 5 + HAS_ALL_WINDOWS


def test_the_line_is_in_the_table_of_named_languages(tiny_teacher: Path, tmp_path: Path, capsys) -> None:
    settings = [
        "--set",
        "retrieval.languages=[de]",
        "--set",
        "retrieval.max_pairs=4",
        "--set",
        "retrieval.max_length=60",
    ]
    main(["evaluate", str(tiny_teacher), "--output", str(tmp_path), *settings])
    assert "languages left out: ar, el, " in capsys.readouterr().out
