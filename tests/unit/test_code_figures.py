"""The code stays readable: plain words, imports that run downwards, few parameters, few modules in the root."""

from __future__ import annotations

from tests.conftest import REPO
from tests.unit.code_figures import LAYERS, arrows, functions, num_parameters, upward, words

ROOT_MODULES = {"__init__", "__main__", "config", "errors", "installed", "provenance", "recipe_reference", "train"}
MAX_PARAMETERS = 6


def test_words_that_readers_stumble_over_are_gone() -> None:
    found = [f"{file}:{line}: {word}" for word, file, line in sorted(words(REPO))]
    assert not found, "\n".join(found[:60])


def test_imports_run_downwards() -> None:
    assert upward(REPO) == set(), f"order from bottom to top: {', '.join(LAYERS)}"
    assert len(arrows(REPO)) > 30, "the arrows are found"


def test_functions_have_few_parameters() -> None:
    many = [
        f"{path}: {function.name}" for path, function in functions(REPO) if num_parameters(function) > MAX_PARAMETERS
    ]
    assert not many, "\n".join(many)


def test_the_root_holds_entrances_only() -> None:
    assert {path.stem for path in (REPO / "pipeline").glob("*.py")} == ROOT_MODULES
