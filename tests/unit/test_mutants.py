"""The bugs of `make mutants` fit the code and change its figures, and the tests that catch them exist."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.mutants.__main__ import copy_tree, verdict
from tests.mutants.bugs import BUGS, Bug, StaleBugError
from tests.mutants.changes import as_json

PROBED = [bug for bug in BUGS if bug.probe]
# A factor on every micro-batch: neither Adam nor clipping sees it.
WITHOUT_EFFECT = Bug(
    "a factor on every micro-batch",
    "pipeline/training/stepper.py",
    "parts.engine.backward(loss)",
    "parts.engine.backward(loss * 1.5)",
    "tests/dist/test_train.py::test_two_ranks_give_the_losses_of_one",
    "direction_of_a_step",
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_fits_the_code_and_its_test_exists(bug: Bug, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def changes() -> dict[str, str]:
    """Bug -> whether it changes the figures of its probe."""
    command = [sys.executable, "-m", "tests.mutants.changes"]
    done = subprocess.run(command, cwd=REPO, input=as_json([*PROBED, WITHOUT_EFFECT]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("bug", PROBED, ids=lambda bug: bug.name)
def test_a_planted_bug_changes_a_figure(bug: Bug, changes: dict[str, str]) -> None:
    assert changes[bug.name] == "changed", (
        "change the bug so that it has an effect, or give it a probe that shows it (tests/mutants/probes.py)"
    )


def test_a_bug_without_effect_is_noticed(changes: dict[str, str]) -> None:
    assert changes[WITHOUT_EFFECT.name] == "SAME"


def test_bugs_without_a_probe_are_caught_by_their_tests(tmp_path: Path) -> None:
    """This is slower than a probe."""
    bugs = [bug for bug in BUGS if not bug.probe]
    if bugs:
        copy_tree(tmp_path)
    assert {bug.name: verdict(tmp_path, bug) for bug in bugs} == {bug.name: "caught" for bug in bugs}
