"""The bugs that `make mutants` plants still fit the code, and the tests that catch them are there under these names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.mutants.bugs import BUGS, Bug, StaleBugError


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_fits_the_code_and_its_test_is_there(bug: Bug, tmp_path: Path) -> None:
    copy = tmp_path / bug.file
    copy.parent.mkdir(parents=True)
    copy.write_text((REPO / bug.file).read_text(encoding="utf-8"), encoding="utf-8")
    bug.plant(tmp_path)
    ast.parse(copy.read_text(encoding="utf-8"))
    with pytest.raises(StaleBugError, match="0 times"):
        bug.plant(tmp_path)
    file, _, name = bug.test.partition("::")
    functions = [node.name for node in ast.parse((REPO / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name.partition("[")[0] in functions
