"""Links between documents have a target, and the files and tests that documents mention exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.docs.documents import DOCUMENTS, FENCE, anchors_of, relative

TOP_LEVEL_FOLDERS = (
    "pipeline",
    "data_prep",
    "recipes",
    "ds_configs",
    "slurm",
    "tests",
    "benchmarks",
    "docs",
    "demo",
    "samples",
    "examples",
)
MADE_BY_USERS = {"slurm/site.env"}
ALL = [*DOCUMENTS, REPO / "docs" / "log.md"]


@pytest.mark.parametrize("document", ALL, ids=relative)
def test_links_have_a_target(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{relative(document)} links to {target}"
        assert not anchor or anchor in anchors_of(path), (
            f"{relative(document)}: {relative(path)} has no heading #{anchor}"
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_mentioned_files_exist(document: Path) -> None:
    """Paths such as `pipeline/x.py`, `docs/y.md`, `slurm/z.sh`; `*` and `NAME` match several files."""
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text(encoding="utf-8"))):
        for word in re.split(r"[\s(),;]+", span):
            name = word.partition("::")[0].rstrip(".:")
            if not re.match(rf"({'|'.join(TOP_LEVEL_FOLDERS)})/[\w./*-]*$", name) or name in MADE_BY_USERS:
                continue
            pattern = re.sub(r"\b(NAME|LANG|NNNNN|XX|DATE)\b", "*", name).rstrip("/")
            assert list(REPO.glob(pattern)), f"{relative(document)} mentions {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_mentioned_tests_exist(document: Path) -> None:
    """`tests/FILE.py::test_name`; a later `::test_name` means the same file. `...` at the end shortens a name."""
    file = None
    for path, name in re.findall(
        r"`(tests/[\w/]+\.py)?(?:::(\w+)(?:\.\.\.)?)?(?:\[[^\]`]*\])?`", document.read_text(encoding="utf-8")
    ):
        file = path or file
        if name and file:
            tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
            functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert any(function.startswith(name) for function in functions), f"{relative(document)}: {file}::{name}"
