"""Scalars of a recipe, in files and in --set: the type of the key decides whether they are text or numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Recipe, load_recipe, recipe_to_yaml
from pipeline.errors import UserError
from pipeline.evaluation.command import read_overrides


def recipe_of(tmp_path: Path, text: str, *overrides: str, encoding: str = "utf-8") -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode(encoding))
    return load_recipe(path, list(overrides))


def test_norwegian_is_a_language(tmp_path: Path) -> None:
    text = "languages: [en, no, on, off, yes, y, n]\nlanguage_weights: {no: 2, en: 1}\n"
    recipe = recipe_of(tmp_path, text)
    assert recipe.languages == ["en", "no", "on", "off", "yes", "y", "n"]
    assert recipe.language_weights == {"no": 2.0, "en": 1.0}
    assert recipe_of(tmp_path, "steps: 1", "languages=[en,no]").languages == ["en", "no"]
    assert recipe_of(tmp_path, "steps: 1", "language_weights.no=2").language_weights == {"no": 2.0}
    assert read_overrides(["heldout.languages=[en,no]"]).heldout.languages == ["en", "no"]
    assert recipe_of(tmp_path, recipe_to_yaml(recipe)) == recipe, "the resolved recipe in the run directory reads back"


@pytest.mark.parametrize("name", ["123", "1e-3", "007", "2026-11-27", "12:30", "0x10", "true", "1_000"])
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    recipe = recipe_of(tmp_path, f"teacher: {name}\ndata: {name}\n")
    assert (recipe.teacher, recipe.data) == (name, name)
    assert recipe_of(tmp_path, recipe_to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr='2e-4'", 2e-4),
        ("seed=010", 10),  # not octal
        ("seed=0x10", 16),
        ("steps=1_000", 1000),
        ("guard.verify_shards=yes", True),
        ("guard.verify_shards=off", False),
        ("vocabulary=~", None),
        ("max_epochs=null", None),
        ("max_epochs=", None),
    ],
)
def test_numbers_and_booleans_by_the_type_of_the_key(tmp_path: Path, override: str, expected: Any) -> None:
    found: Any = recipe_of(tmp_path, "steps: 1\nvocabulary: x\nmax_epochs: 2\n", override)
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps=1e5", r"`steps` must be int \(write 100000\), not '1e5'"),
        ("steps=12:30:00", "`steps` must be int, not '12:30:00'"),
        ("steps='7'", "`steps` must be int, not '7'"),
        ("steps=yes", "`steps` must be int, not 'yes'"),
        ("guard.deadline_margin_s=12:30:00", "`guard.deadline_margin_s` must be a finite number, not '12:30:00'"),
        ("optimizer.lr=.nan", "`optimizer.lr` must be a finite number, not '.nan'"),
        ("max_epochs=.inf", "`max_epochs` must be a finite number"),
        ("optimizer.lr=1" + "0" * 400, "`optimizer.lr` must be a finite number"),
        ("optimizer.lr=1,5", "`optimizer.lr` must be a finite number, not '1,5'"),
        ("guard.verify_shards=2", "`guard.verify_shards` must be true or false, not '2'"),
        ("teacher=", "`teacher` must be text, not empty"),
        ("teacher=null", r'`teacher` must be text, not null; write it in quotes \("null"\) if it is meant'),
        ("languages=no", r"`languages` must be a list like \[a, b\], not 'no'"),
        ("languages=[]", "languages is an empty list"),
        ("data=/my #1", r"""YAML reads only `/my`; quote it: --set 'data="/my #1"'"""),
    ],
)
def test_errors_show_the_value_as_it_was_written(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe_of(tmp_path, "steps: 1\n", override)


def test_quoting_as_the_message_says_works(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, 'teacher: "null"\n').teacher == "null"
    assert recipe_of(tmp_path, "steps: 1\n", 'data="/my #1"').data == "/my #1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: 1\n---\nsteps: 2\n", "remove the lines of ---"),
        ("student:\n\tlayers: 2\n", "spaces, not with tabs"),
        ("student: {layers: 2, layers: 3}\n", "`layers` occurs twice.*line 1"),
        ("language_weights: {no: 1, no: 2}\n", "`no` occurs twice"),
        ("", "pairs, not nothing"),
        ("# only a comment\n", "pairs, not nothing"),
        ("just text\n", "pairs, not text"),
    ],
)
def test_text_that_is_not_a_recipe(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe_of(tmp_path, text)


def test_another_encoding(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, "steps: 7\n", encoding="utf-8-sig").steps == 7, "a byte order mark is skipped"
    with pytest.raises(UserError, match="not readable YAML"):
        recipe_of(tmp_path, "teacher: Lehrer-für-alle\n", encoding="latin-1")
