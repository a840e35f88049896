"""The worked example of an evaluation task in CONTRIBUTING.md, followed as written: one module and one row of a docs page."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline.evaluation
from pipeline.__main__ import main
from pipeline.evaluation.finetuning.loop import FinetuneConfig
from pipeline.evaluation.task import Task, tasks
from pipeline.export.card_tables import measured_sections
from tests.conftest import REPO

CONTRIBUTING, DOCS_PAGE = REPO / "CONTRIBUTING.md", REPO / "docs" / "evaluating.md"


def example() -> tuple[str, str]:
    """The module and the row of the docs page, from the two blocks of the section."""
    page = CONTRIBUTING.read_text(encoding="utf-8")
    section = page.partition("\n## Add an evaluation task\n")[2].partition("\n## ")[0]
    module, row = re.findall(r"^   ```\w*\n(.*?)^   ```", section, re.MULTILINE | re.DOTALL)
    return textwrap.dedent(module), row.strip()


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    """The task, found because its file is in a directory of the package."""
    assert "tokens" not in tasks(), "the example is a task now: write another one"
    directory = tmp_path / "package"
    directory.mkdir()
    (directory / "tokens.py").write_text(example()[0])
    monkeypatch.setattr(pipeline.evaluation, "__path__", [*pipeline.evaluation.__path__, str(directory)])
    tasks.cache_clear()
    yield tasks()["tokens"]
    sys.modules.pop("pipeline.evaluation.tokens")
    tasks.cache_clear()


def check_documented(task: Task, row: str) -> None:
    """The row has the task's name and all its settings. The settings of the grid have a section of their own."""
    assert row.startswith(f"| `{task.name}` | ")
    grid = (
        {field.name for field in dataclasses.fields(FinetuneConfig)}
        if issubclass(task.settings, FinetuneConfig)
        else ()
    )
    settings = [field.name for field in dataclasses.fields(task.settings) if field.name not in grid]
    missing = [name for name in settings if f"`{name}`" not in row and f"--{name} " not in row]
    assert not missing, f"{DOCS_PAGE.name}, task {task.name}: {missing}"


def test_the_example_is_a_task(
    added: Task, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    settings = ["--set", "tokens.max_pairs=4"]
    main(["evaluate", str(tiny_teacher), "--tasks", "tokens", "--output", str(output), *settings])
    (result,) = json.loads((output / "evaluation.json").read_text())["tasks"]["tokens"].values()
    assert result["tokens"]["de"] > 3
    printed = capsys.readouterr().out
    assert f"{result['tokens']['de']:9.1f}" in printed
    assert (output / "evaluation.png").is_file()
    card = measured_sections([output], None)
    assert "### tokens, by `pipeline evaluate`" in card
    assert f"| {result['tokens']['de']:.1f} |" in card
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "tokens" in capsys.readouterr().out


def test_the_example_is_documented(added: Task) -> None:
    check_documented(added, example()[1])


def test_every_task_is_documented() -> None:
    page = DOCS_PAGE.read_text(encoding="utf-8")
    for name, task in tasks().items():
        rows = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(rows) == 1, f"docs/evaluating.md needs one row for the task {name}"
        check_documented(task, rows[0])
