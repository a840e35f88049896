"""`make test` reads every file of tests. Pytest's own list of directories that it leaves out has "dist"."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

from tests.conftest import REPO


def test_no_directory_with_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    left_out = pytestconfig.getini("norecursedirs")
    files = [file.relative_to(REPO) for file in (REPO / "tests").rglob("test_*.py")]
    assert any("dist" in file.parts for file in files)
    assert [file for file in files if any(fnmatch(part, name) for part in file.parts[:-1] for name in left_out)] == []
