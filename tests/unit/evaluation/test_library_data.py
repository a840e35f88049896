"""Tasks whose data is a data set of the hub, on a machine without the `datasets` library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import exit_code_of


@pytest.mark.parametrize("task", ["xnli", "pawsx", "tagging"])
def test_the_library_is_missing(
    task: str, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = ["--tasks", task, "--set", f"{task}.data=datasets:some/set", "--set", f"{task}.languages=[en]"]
    command = ["evaluate", str(tiny_teacher), *words, "--output", str(tmp_path / "out")]
    assert exit_code_of(lambda: main(command)) == 2
    error = capsys.readouterr().err
    assert "some/set is read by the package datasets, which is not installed. Install it: " in error
