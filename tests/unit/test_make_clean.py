"""`make clean` deletes caches and nothing else; trained runs go only by `make clean-runs`, which asks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO

CACHES = (
    ".pytest_cache/x",
    ".hypothesis/x",
    ".coverage.1",
    "pipeline/__pycache__/x.pyc",
    "tests/unit/__pycache__/x.pyc",
)
KEPT = (".venv/lib/__pycache__/x.pyc", "artifacts/teacher/x", "runs/quickstart/x", "pipeline/x.py", "runs/code/x")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in (*CACHES, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(REPO / "Makefile", tmp_path)
    return tmp_path


def make(checkout: Path, *words: str, answer: str = "") -> int:
    return subprocess.run(["make", *words], cwd=checkout, input=answer, capture_output=True, text=True).returncode


def left(checkout: Path) -> set[str]:
    return {name for name in (*CACHES, *KEPT) if (checkout / name).exists()}


def test_clean_deletes_caches_alone(checkout: Path) -> None:
    assert make(checkout, "clean") == 0
    assert left(checkout) == set(KEPT)


@pytest.mark.parametrize("answer", ["", "\n", "no\n", "y\n"])
def test_runs_stay_without_a_clear_yes(checkout: Path, answer: str) -> None:
    assert make(checkout, "clean-runs", answer=answer) == 2
    assert left(checkout) == {*CACHES, *KEPT}


@pytest.mark.parametrize(("words", "answer"), [((), "yes\n"), (("SURE=yes",), "")])
def test_runs_are_deleted_on_request(checkout: Path, words: tuple[str, ...], answer: str) -> None:
    assert make(checkout, "clean-runs", *words, answer=answer) == 0
    assert left(checkout) == {name for name in (*CACHES, *KEPT) if not name.startswith(("artifacts", "runs"))}
