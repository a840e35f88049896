"""README can be read and copied: nothing is wider than the page, and every command runs where it is written.

A block in a list or without blank lines around it is joined to one line by some renderers.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.docs.documents import DOCUMENTS, FENCE, PROGRAM, relative

README = REPO / "README.md"
WIDEST_BLOCK = 100  # characters of a code block that a repository's page shows without scrolling
ACTIVATE = "source .venv/bin/activate"
MAKES_AN_ENVIRONMENT = re.compile(r"(make|git|cd|source) |\.venv/bin/")


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_no_block_is_wider_than_the_page(name: str) -> None:
    blocks = [block["body"] for block in FENCE.finditer((REPO / name).read_text(encoding="utf-8"))]
    assert blocks
    assert [line for block in blocks for line in block.splitlines() if len(line) > WIDEST_BLOCK] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_block_is_a_paragraph_of_its_own(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        before, after = text[: block.start()], text[block.end() :]
        assert not before or before.endswith("\n\n"), f"no blank line before: {block['body']}"
        assert not after.strip() or after.startswith("\n\n"), f"no blank line after: {block['body']}"


def test_commands_run_where_they_are_written() -> None:
    """Before the environment is activated only `make`, or programs of `.venv/bin`."""
    text = README.read_text(encoding="utf-8")
    before, found, after = text.partition(f"```\n{ACTIVATE}\n```")
    assert found
    commands = [line for block in FENCE.finditer(before) for line in block["body"].splitlines()]
    commands = [line for line in commands if PROGRAM.match(line + " ")]
    assert commands == [line for line in commands if MAKES_AN_ENVIRONMENT.match(line)] == ["make demo", "make test"]
    assert "python -m pipeline" in after, "the test reads the right half"


def test_pictures_exist_and_say_what_they_show() -> None:
    pictures = re.findall(r'<img src="([^"]+)" alt="([^"]{20,})"', README.read_text(encoding="utf-8"))
    assert pictures
    assert all((REPO / source).is_file() for source, _ in pictures)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.parent.name == "docs"], ids=relative)
def test_a_page_with_commands_says_where_they_run(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    lines = [line for block in FENCE.finditer(text) for line in block["body"].splitlines()]
    if any(re.match(r"(python|deepspeed|torchrun|tensorboard) ", line.strip()) for line in lines):
        assert ACTIVATE in text
