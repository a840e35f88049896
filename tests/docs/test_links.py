"""Links between documents lead somewhere, and the files, tests and docs that they mention are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.docs.documents import DOCUMENTS, FENCE, anchors_of, relative

PARTS = (
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
def test_links_lead_somewhere(document: Path) -> None:
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
def test_mentioned_files_are_there(document: Path) -> None:
    """`pipeline/x.py`, `docs/y.md`, `slurm/z.sh`, with `*` and `NAME` for many."""
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text(encoding="utf-8"))):
        for word in re.split(r"[\s(),;]+", span):
            name = word.partition("::")[0].rstrip(".:")
            if not re.match(rf"({'|'.join(PARTS)})/[\w./*-]*$", name) or name in MADE_BY_USERS:
                continue
            pattern = re.sub(r"\b(NAME|LANG|NNNNN|XX|DATE)\b", "*", name).rstrip("/")
            assert list(REPO.glob(pattern)), f"{relative(document)} mentions {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_mentioned_tests_are_there(document: Path) -> None:
    """`tests/FILE.py::test_name`; a `::test_name` after it means the same file. An end of `...` is cut short."""
    file = None
    for path, name in re.findall(
        r"`(tests/[\w/]+\.py)?(?:::(\w+)(?:\.\.\.)?)?(?:\[[^\]`]*\])?`", document.read_text(encoding="utf-8")
    ):
        file = path or file
        if name and file:
            tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
            functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert any(function.startswith(name) for function in functions), f"{relative(document)}: {file}::{name}"
