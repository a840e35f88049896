"""Figures about the code: size, arrows between packages, and words that are no longer used.

    python -m tests.unit.code_figures [CHECKOUT]

Prints a Markdown table. `test_code_figures.py` holds the limits; docs/log.md has the figures before and after the renames.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PRODUCT = ("pipeline", "data_prep", "minilmv2")
# From the bottom to the top: a package imports from those on its left, and modules of its own.
LAYERS = (
    "errors", "installed", "recipe", "distillation", "data", "runtime", "config", "provenance", "comparison", "recipe_reference", "planning",
    "training", "evaluation", "export", "report", "doctor", "train", "__main__",
)  # fmt: skip
WORDS = {
    "whole": r"\bwhole(s|d|ly)?\b",
    "life, lives": r"\bli(fe|ves)\b",
    "mend": r"\bmend(s|ed|ing)?\b",
    "damage": r"\bdamag\w*",
    "seal": r"\bseal(s|ed|ing)?\b",
    "carried along": r"\bcarr(y|ies|ied) along\b",
    "goes on": r"\b(go|goes|going|went|gone) on\b",
    "for ever": r"\bfor ever\b",
    "sick": r"\bsick\b",
    "oracle": r"\boracles?\b",
    "obvious": r"\bobvious(ly)?\b",
    "mishap": r"\bmishaps?\b",
    "lane": r"\blanes?\b",
    "rehearsal": r"\brehears\w*",
    "ledger": r"\bledgers?\b",
    "bend": r"\bbends?\b",
    "house, rooms, wings": r"\b(house|rooms|wings?)\b",
    "refuse": r"\brefus(e|es|ed|al|als|ing)\b",
    "stands": r"\bstands\b",
    "lies": r"\blies\b",
    "wants": r"\bwants?\b",
    "not to be had": r"\bnot to be had\b",
    "so many-th": r"\bso[- ]man(y|ie)-?th\b",
    "in silence": r"\bin silence\b",
    "settle": r"\bsettle[sd]?\b",
    "leave word": r"\bleaves? word\b",
    "take along": r"\b(take[ns]?|took) along\b",
    "Used by": r"\bUsed by\b",
}
# What is read because earlier versions wrote it, and the file that says which words these are.
EXCEPTIONS = re.compile(r"lives\.json|-life\d|-life\$|-life\*")
NOT_COUNTED = ("CHANGELOG.md", "tests/unit/code_figures.py", "samples/", "tests/fixtures/")
TEXT = (".py", ".md", ".sh", ".yaml", ".toml", ".json", ".env", ".css", "Makefile", "run")


def sources(root: Path, packages: tuple[str, ...] = PRODUCT) -> list[Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def functions(root: Path) -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without `self`, `cls`, `*args` and `**kwargs`. 0 for a Triton kernel: it is given pointers and numbers, no dataclass."""
    if any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list):
        return 0
    given = function.args
    names = [argument.arg for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def arrows(root: Path) -> set[tuple[str, str]]:
    """Imports between packages (or root modules) of `pipeline`: (importing, imported)."""
    found = set()
    for path in sources(root, ("pipeline",)):
        own = path.relative_to(root / "pipeline").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipeline":
                first = node.module.split(".")[1:2]
                found |= {(own, name) for name in (first or [alias.name for alias in node.names])}
    return {(one, other) for one, other in found if one != other and one != "__init__"}


def upward(root: Path) -> set[tuple[str, str]]:
    """Arrows that do not run down `LAYERS`; unknown names count as upward."""
    level = {name: number for number, name in enumerate(LAYERS)}
    return {(one, other) for one, other in arrows(root) if not level.get(other, 99) < level.get(one, -1)}


def text_files(root: Path) -> list[Path]:
    """Every tracked text of code, tests and docs."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name.endswith(TEXT) and not name.startswith(NOT_COUNTED)]
    return [root / name for name in names if (root / name).is_file()]


def words(root: Path) -> Counter[tuple[str, str, int]]:
    """(word, file, line) -> how often."""
    patterns = {word: re.compile(pattern, re.IGNORECASE) for word, pattern in WORDS.items()}
    found: Counter[tuple[str, str, int]] = Counter()
    for path in text_files(root):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            line = EXCEPTIONS.sub("", line).replace("_", " ")  # names of functions and tests are words too
            for word, pattern in patterns.items():
                if hits := len(pattern.findall(line)):
                    found[word, str(path.relative_to(root)), number] += hits
    return found


def figures(root: Path) -> dict[str, object]:
    lengths = [num_lines(function) for _, function in functions(root)]
    counts = words(root)
    by_word = {word: sum(n for (w, _, _), n in counts.items() if w == word) for word in WORDS}
    return {
        "files of the product": len(sources(root)),
        "lines of the product": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)),
        "functions: median, longest (lines)": f"{statistics.median(lengths):.0f}, {max(lengths)}",
        "functions with more than six parameters": sum(num_parameters(function) > 6 for _, function in functions(root)),
        "modules in the root of pipeline/": len(list((root / "pipeline").glob("*.py"))),
        "arrows between packages, upward": f"{len(arrows(root))}, {len(upward(root))}",
        **{f"`{word}`": count for word, count in by_word.items()},
    }


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else REPO
    print("| figure | value |\n|---|---|")
    for name, value in figures(root).items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
