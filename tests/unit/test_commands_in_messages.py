"""Every command and setting in the texts of the code exists: verbs and their options, programs of the hub, recipe keys.

The texts are read from the source, so that a message needs no test of its own for this. `test_printed_fixes.py` pastes commands.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import pkgutil
import re
import subprocess
import typing
from collections.abc import Iterator

import pytest

import pipeline.evaluation
from data_prep.__main__ import build_parser
from data_prep.command_line import installed_program
from pipeline.__main__ import VERBS
from pipeline.config import Recipe
from pipeline.evaluation.task import Task
from pipeline.recipe_reference import dataclasses_in
from tests.conftest import REPO

PACKAGES = ("pipeline", "data_prep", "minilmv2", "demo")
EXAMPLES = {"key", "section.key", "a.b"}  # how --set is written, not settings
HUB_COMMAND = re.compile(r"\bhf (download|auth login|upload|repo create)\b(?!\))([^\n`;()]*)")


@functools.cache
def trees() -> list[tuple[str, ast.Module]]:
    paths = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]
    return [(str(path.relative_to(REPO)), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def texts() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every string; a value in an f-string is the word X."""
    for name, tree in trees():
        inner = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
                yield f"{name}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
                yield f"{name}:{node.lineno}", node.value


def keys_of(cls: type) -> set[str]:
    """The dotted keys of a dataclass of settings."""
    keys = set()
    for name, hint in typing.get_type_hints(cls).items():
        keys |= {name, *(f"{name}.{key}" for nested in dataclasses_in(hint) for key in keys_of(nested))}
    return keys


def tasks() -> dict[str, Task]:
    modules = pkgutil.walk_packages(pipeline.evaluation.__path__, "pipeline.evaluation.")
    members = [value for module in modules for value in vars(importlib.import_module(module.name)).values()]
    return {value.name: value for value in members if isinstance(value, Task)}


def test_every_setting_in_a_text_exists() -> None:
    known = keys_of(Recipe) | EXAMPLES
    for name, task in tasks().items():
        assert dataclasses.is_dataclass(task.settings)
        known |= {f"{name}.{key}" for key in keys_of(task.settings)}
    named = [(place, key) for place, text in texts() for key in re.findall(r"--set ([a-z_][a-z_.0-9]*)=", text)]
    assert len(named) > 40
    assert not [(place, key) for place, key in named if key not in known]


def calls_of_module_command() -> Iterator[tuple[str, list[str]]]:
    """(file:line, the words that are constants) of every command that the code makes."""
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "module_command":
                words = [part.value for part in node.args if isinstance(part, ast.Constant)]
                yield f"{name}:{node.lineno}", list(map(str, words))


def options_of(package: str, verb: str) -> set[str]:
    if package == "data_prep":
        (verbs,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
        return set(verbs.choices[verb]._option_string_actions)
    parser = argparse.ArgumentParser()
    importlib.import_module(VERBS[verb]).add_arguments(parser)
    return set(parser._option_string_actions)


def test_every_verb_and_option_in_a_command_exists() -> None:
    calls = [
        (place, words) for place, words in calls_of_module_command() if words and words[0] in ("data_prep", "pipeline")
    ]
    assert len(calls) > 20
    for place, (package, verb, *rest) in calls:
        options = {word for word in rest if word.startswith("--")}
        assert options <= options_of(package, verb), place


def test_no_message_names_a_verb_without_the_python_that_runs() -> None:
    """`python` in a shell may be another one, and an installed wheel has `minilmv2`: module_command knows."""
    literal = re.compile(r"`python -m (data_prep|pipeline) |[:,] python -m (data_prep|pipeline) ")
    pages = {"pipeline/recipe_reference.py"}  # its text is docs/recipes.md
    helps = {  # of options, in which `python` is the reader's
        f"{name}:{keyword.value.lineno}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "help"
    }
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        ast.get_docstring(node, clean=False)
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, documented)
    }
    found = [place for place, text in texts() if literal.search(text) and text not in docstrings]
    assert not [place for place in found if place not in helps and place.partition(":")[0] not in pages]


@pytest.fixture(scope="module")
def options_of_hf() -> dict[str, str]:
    """The help of each command of the hub's program that a text names."""
    commands = {match[1] for _, text in texts() for match in HUB_COMMAND.finditer(text)}
    program = installed_program("hf")
    done = {
        name: subprocess.run([program, *name.split(), "--help"], capture_output=True, text=True) for name in commands
    }
    assert all(each.returncode == 0 for each in done.values()), done
    return {name: each.stdout for name, each in done.items()}


def test_every_option_of_the_hubs_program_exists(options_of_hf: dict[str, str]) -> None:
    named = [(place, match) for place, text in texts() for match in HUB_COMMAND.finditer(text)]
    assert len(named) > 8
    for place, match in named:
        for option in re.findall(r"(?<=\s)--[a-z-]+", match[2]):
            assert re.search(rf"{option}\b", options_of_hf[match[1]]), (place, option)
