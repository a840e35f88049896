"""Promises in the documents name tests that exist, and every promise of SECURITY.md names at least one."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import REPO


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/reliability.md"])
def test_named_tests_exist(document: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", (REPO / document).read_text(encoding="utf-8"))
    assert named
    for file, function in named:
        tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (
            f"{file}::{function}"
        )


def test_every_security_promise_has_a_row_with_tests() -> None:
    text = (REPO / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.findall(r"^- \*\*(.+?)\*\*", text, re.MULTILINE)
    rows = dict(re.findall(r"^\| (.+?) \| (`tests/.+) \|$", text, re.MULTILINE))
    assert list(rows) == promises
