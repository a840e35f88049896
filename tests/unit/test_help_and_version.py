"""`--help` and `--version` of the pipeline's command lines, and `make help`."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from data_prep.command_line import DISTRIBUTION, distribution_version
from pipeline.__main__ import VERBS, first_line
from pipeline.errors import EXIT_USER
from tests.conftest import REPO

NO_TORCH = """
import sys
from pipeline.__main__ import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "transformers", "deepspeed"} & sys.modules.keys()
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_help_describes_every_verb_without_importing_torch() -> None:
    done = run(sys.executable, "-c", NO_TORCH, "--help")
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        (line,) = re.findall(rf"^  {verb} +(\S.*)$", done.stdout, re.MULTILINE)
        assert line.endswith("."), "a complete sentence in one line"


@pytest.mark.parametrize("verb", VERBS)
def test_the_description_is_the_first_line_of_the_verbs_own_help(verb: str) -> None:
    done = run(sys.executable, "-m", "pipeline", verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"\n{first_line(VERBS[verb])}\n" in done.stdout


@pytest.mark.parametrize("command", [["-m", "pipeline"], ["pipeline/train.py"]])
def test_version(command: list[str]) -> None:
    done = run(sys.executable, *command, "--version")
    assert (done.returncode, done.stdout) == (0, f"{DISTRIBUTION} {distribution_version()}\n")


def test_a_missing_or_unknown_verb_is_an_error_that_names_the_verbs() -> None:
    missing = run(sys.executable, "-m", "pipeline")
    assert (missing.returncode, "required: VERB\n" in missing.stderr) == (EXIT_USER, True)
    unknown = run(sys.executable, "-m", "pipeline", "nothing")
    assert unknown.returncode == EXIT_USER
    assert all(repr(verb) in unknown.stderr for verb in VERBS)


@pytest.mark.parametrize("goal", [["help"], []])
def test_make_help_lists_every_target_and_is_the_default_goal(goal: list[str]) -> None:
    targets = re.findall(r"^([a-z][a-z%-]*):", (REPO / "Makefile").read_text(), re.MULTILINE)
    done = run("make", *goal)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^make (\S+) +\S", done.stdout, re.MULTILINE)
    assert listed == targets
    assert {"demo", "test", "doctor"} <= set(listed)
