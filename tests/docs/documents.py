"""Find commands, code blocks and anchors in documents, docstrings and recipes.

In: Markdown pages, modules and recipe headers. Out: `Command` objects, and the anchors of a page's headings.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO

# Left out: the log names removed commands, and benchmark results are dated.
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "samples/*.md", "ds_configs/*.md", "examples/*.md")
    for path in REPO.glob(pattern)
    if path.name != "log.md"
)
PROGRAM = re.compile(
    r"(python3?|deepspeed|torchrun|make|sbatch|srun|hf|pip|tensorboard)\s|(\.venv/bin|slurm)/\S+(\s|$)"
)
OTHER_PROGRAMS = (
    "git",
    "cd",
    "cp",
    "source",
    "touch",
    "ulimit",
    "rm",
    "scontrol",
    "scancel",
    "salloc",
    "squeue",
    "pre-commit",
)
DRAWING = re.compile(r"[─│►┤└┌]")
CONTINUED = re.compile(r" *\\\n\s*")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command as a user would type it. `complete`: it is in a block, so no required argument may be missing."""

    where: str
    text: str
    complete: bool

    @property
    def words(self) -> list[str]:
        """The words after shell splitting, up to a pipe or redirection, without placeholders such as `...`."""
        text = re.split(r"\s(?:>|\|)\s", self.text)[0]
        text = re.sub(r"\[(--[^\]]*)\]", r"\1", text).replace(",...", "")  # optional arguments in usage lines
        words = [
            word
            for word in shlex.split(text, comments=True)
            if not re.fullmatch(r"\[?[A-Z_]*\s?\.\.\.\]?|\[[A-Z_]+", word)
        ]
        return ["1" if word == "N" else word for word in words]


def relative(path: Path) -> str:
    return str(path.relative_to(REPO))


def commands_of(document: Path) -> Iterator[Command]:
    """Yield the commands in code blocks, then those in running text."""
    text = document.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        if block["language"] in ("", "bash"):
            yield from _commands_in_block(relative(document), block["body"], strict=block["language"] == "bash")
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        line = " ".join(span.split())
        if PROGRAM.match(line) and " " in line:
            yield Command(relative(document), line, complete=False)


def _commands_in_block(where: str, body: str, strict: bool) -> Iterator[Command]:
    for line in CONTINUED.sub(" ", body).splitlines():
        for part in re.split(r" && |; ", re.sub(r"(^|\s)#.*", "", line).strip()):
            if PROGRAM.match(part) and not DRAWING.search(part):
                yield Command(where, part, complete=True)
            elif strict and part and not part.startswith(OTHER_PROGRAMS):
                raise AssertionError(f"{where}: no check knows the command {part!r}")


def commands_in_docstrings() -> Iterator[Command]:
    """Yield command lines in module docstrings. Text after two blanks is a remark."""
    for package in ("pipeline", "data_prep", "demo", "benchmarks", "examples", "tests"):
        for path in sorted((REPO / package).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            for line in CONTINUED.sub(" ", docstring).splitlines():
                text = re.split(r"\s{2,}", line.strip())[0]
                if text.startswith(
                    ("python -m", "deepspeed ", "torchrun ", "python benchmarks/bench_", "python examples/")
                ):
                    yield Command(relative(path), text, complete=False)


def commands_in_recipes() -> Iterator[Command]:
    """Yield the lines of a recipe's header that are commands."""
    for path in sorted((REPO / "recipes").glob("*.yaml")):
        for line in path.read_text(encoding="utf-8").splitlines():
            text = re.split(r"\s{2,}", line.removeprefix("#").strip())[0]
            if line.startswith("#") and text.startswith(("deepspeed ", "sbatch ", "make ", "python ")):
                yield Command(relative(path), text, complete=True)


def anchors_of(document: Path) -> set[str]:
    """Return the anchors that hosting sites give to a Markdown page's headings."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-") for heading in headings}
