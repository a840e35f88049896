"""The rules of the architecture: who imports whom, what is never called, how modules are named, how large they are."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

SOURCES = sorted(p for package in ("pipeline", "data_prep", "minilmv2", "demo") for p in (REPO / package).rglob("*.py"))
THIRD_PARTY = {
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "tokenizers",
    "sentencepiece",
    "tensorboard",
    "evaluate",
}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which way an arrow runs"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(package: str, pattern: str) -> set[str]:
    """Files below `package` that import a module matching `pattern`."""
    found = re.compile(pattern)
    files = [REPO / package] if package.endswith(".py") else sorted((REPO / package).rglob("*.py"))
    return {str(f.relative_to(REPO)) for f in files if any(found.fullmatch(name) for name in imports_of(f))}


def test_data_prep_knows_nothing_of_training() -> None:
    assert importers("data_prep", r"(pipeline|demo|torch|deepspeed)(\..*)?") == set()
    assert importers("data_prep", r"transformers(\..*)?") == {"data_prep/reference.py"}  # what ids are compared with


def test_pipeline_imports_few_modules_of_data_prep() -> None:
    modules = "shards|tokenizer_ids|command_line|ownership|outputs|durable_files|file_hashes|records|progress"
    allowed = rf"data_prep|data_prep\.({modules})(\..*)?"
    for path in (REPO / "pipeline").rglob("*.py"):
        for name in imports_of(path):
            if name.startswith("data_prep"):
                assert re.fullmatch(allowed, name), f"{path} imports {name}"


def test_one_module_imports_deepspeed() -> None:
    assert importers("pipeline", r"deepspeed(\..*)?") == {"pipeline/runtime/engine.py"}


def test_the_method_imports_no_other_part() -> None:
    assert (
        importers(
            "pipeline/distillation", r"(pipeline\.(runtime|data|export|evaluation)|deepspeed|torch\.distributed)(\..*)?"
        )
        == set()
    )


def test_nothing_imports_the_trainer_or_the_demo() -> None:
    assert importers("pipeline", r"demo(\..*)?") == set()
    for package in ("distillation", "data", "runtime", "comparison", "evaluation", "export", "planning", "report"):
        assert (
            importers(f"pipeline/{package}", r"pipeline\.(training\.(trainer|build|launch|resume)|train)(\..*)?")
            == set()
        )


def test_a_recipe_holds_no_settings_of_other_programs() -> None:
    """`config` composes the sections of a training recipe; evaluation tasks read their own settings."""
    others = r"pipeline\.(evaluation|export|planning|report|doctor|training)(\..*)?"
    assert importers("pipeline/config.py", others) == set()


def test_plans_and_reports_start_nothing() -> None:
    """They read recipes and run directories: no engine, no process group."""
    for package in ("planning", "comparison", "report"):
        assert (
            importers(f"pipeline/{package}", r"pipeline\.runtime\.(engine|dist)(\..*)?|torch\.distributed.*") == set()
        )
    assert importers("pipeline/report", r"torch(\..*)?") == set()


def test_the_doctor_is_imported_by_nobody() -> None:
    assert set(importers("pipeline", r"pipeline\.doctor(\..*)?")) <= {
        str(path.relative_to(REPO)) for path in (REPO / "pipeline/doctor").glob("*.py")
    }


def test_benchmarks_import_nothing_of_the_tests() -> None:
    assert importers("benchmarks", r"tests(\..*)?") == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_never(path: Path) -> None:
    text = path.read_text()
    for pattern in (
        r"shell\s*=\s*True",
        r"os\.system\(",
        r"\beval\(|\bexec\(",
        r"yaml\.load\(",
        r"torch\.load\(",
        r"weights_only\s*=\s*False",
        r"trust_remote_code\s*=\s*True",
        r"\bpickle\b",
        r"read_pickle|allow_pickle\s*=\s*True",
        r"(gather|broadcast|scatter|send|recv)_object",  # torch's collectives for objects unpickle
        r"\.load_checkpoint\(",  # DeepSpeed's own unpickles
        r"NotImplementedError",
        r"\bTODO\b|\bFIXME\b",
    ):
        for match in re.finditer(pattern, text):
            line = text[: match.start()].count("\n") + 1
            source = text.splitlines()[line - 1]
            assert (pattern == r"\beval\(|\bexec\(" and ".eval()" in source) or _in_docstring(path, line), (
                f"{path}:{line}: {source.strip()}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_no_model_brings_its_own_code(path: Path) -> None:
    """An Auto class that is not told asks at the terminal, and `yes` in a pipe answers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_(pretrained|config)", ast.unparse(node.func)):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


def _in_docstring(path: Path, line: int) -> bool:
    return any(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_module_names_shadow_nothing() -> None:
    """pipeline/train.py is started by path: for a moment its directory could answer an import of the standard library."""
    taken = set(sys.stdlib_module_names) | THIRD_PARTY
    for path in (REPO / "pipeline").iterdir():
        assert path.stem not in taken, f"{path.name} is also the name of a library"


def test_no_modules_for_leftovers() -> None:
    for path in SOURCES:
        assert path.stem not in {"utils", "helpers", "misc", "common"}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_small_modules(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "a module opens with what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_train_is_small() -> None:
    assert len((REPO / "pipeline" / "train.py").read_text().splitlines()) <= 70
