"""The worked examples in CONTRIBUTING.md, followed as written in a copy of the tree: they pass the tests and touch few files."""

from __future__ import annotations

import ast
import filecmp
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.distillation.models.architectures import ARCHITECTURES, ArchitectureSpec
from pipeline.distillation.relations.backends import BACKENDS
from tests import tiny_encoders
from tests.conftest import REPO, first_on_python_path
from tests.golden import test_tap_architectures as golden
from tests.unit.distillation import test_student_building as building

TREE = ("pipeline", "data_prep", "benchmarks", "demo", "tests", "samples", "pyproject.toml")
ENTRY = re.compile(r"`(?P<table>[A-Z]+)` in `(?P<file>[\w/]+\.py)`.*?^ *```python\n(?P<code>.*?)^ *```$", re.M | re.S)
MODULE = re.compile(r"Write `(?P<file>[\w/]+\.py)`.*?^ *```python\n(?P<code>.*?)^ *```$", re.M | re.S)


def section(title: str) -> str:
    """The text of a section of CONTRIBUTING.md."""
    page = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found


def code_of(match: re.Match[str]) -> str:
    return textwrap.dedent(match["code"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages and their tests."""
    root = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(REPO / name, root / name)
    return root


def touched(root: Path) -> set[str]:
    """Files of the copy that are new or differ from the repository."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    return {str(f) for f in files if not (REPO / f).is_file() or not filecmp.cmp(REPO / f, root / f, shallow=False)}


def run_tests(root: Path, keyword: str, *files: str) -> int:
    """Run the copy's tests that match `keyword`; the number that passed. All of them must."""
    environment = {**os.environ, "PYTHONPATH": first_on_python_path(root), "PYTHONDONTWRITEBYTECODE": "1"}
    words = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-k", keyword, *files]
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert not re.search(r"\d+ (failed|skipped|error)", done.stdout), done.stdout[-2000:]
    return int(re.findall(r"(\d+) passed", done.stdout)[0])


def test_an_architecture_touches_two_files(tree: Path) -> None:
    entries = list(ENTRY.finditer(section("Add an architecture")))
    assert [entry["table"] for entry in entries] == ["ARCHITECTURES", "CONFIGS"]
    originals = {}
    for entry in entries:
        path = tree / entry["file"]
        originals[path] = text = path.read_text(encoding="utf-8")
        opening = re.compile(rf"^{entry['table']}: .*\{{\n", re.MULTILINE)
        assert len(opening.findall(text)) == 1
        end = next(opening.finditer(text)).end()
        path.write_text(text[:end] + code_of(entry) + text[end:], encoding="utf-8")
    try:
        assert len(touched(tree)) == 2
        units = ("test_student_building", "test_tapped_encoder", "test_teacher_loading", "test_hostile_models")
        files = ["tests/golden/test_tap_architectures.py", *(f"tests/unit/distillation/{name}.py" for name in units)]
        others = ["tests/unit/data_prep/test_tokenizer_kinds.py", "tests/unit/export/test_handover.py"]
        name, _ = example()
        keyword = f"{name} or tiny_encoders_and_architectures or count_positions_from_padding"
        assert run_tests(tree, keyword, *files, *others) >= 20
    finally:
        for path, text in originals.items():
            path.write_text(text, encoding="utf-8")


def test_a_backend_touches_one_file(tree: Path) -> None:
    (module,) = MODULE.finditer(section("Add a relation backend"))
    (name,) = re.findall(r'^@relation_backend\("(\w+)"\)$', code_of(module), re.MULTILINE)
    assert name not in BACKENDS, "it is in the table now: use another example"
    path = tree / module["file"].replace("NAME", name)
    path.write_text(code_of(module), encoding="utf-8")
    try:
        assert touched(tree) == {str(path.relative_to(tree))}
        tests = "tests/unit/distillation/test_relation_loss.py"
        assert run_tests(tree, f"{name} or test_any_shape_and_padding", tests) > 15
    finally:
        path.unlink()


# -- what the tests find if a step is incomplete


def example() -> tuple[str, dict[str, object]]:
    """Model type and arguments of the example's row, read from its code without running it."""
    entries = [
        ast.parse("{" + code_of(entry) + "}", mode="eval").body
        for entry in ENTRY.finditer(section("Add an architecture"))
    ]
    assert all(isinstance(entry, ast.Dict) for entry in entries)
    (row_name,), (call,) = entries[0].keys, entries[0].values
    (tiny_name,), (config,) = entries[1].keys, entries[1].values
    assert ast.literal_eval(row_name) == ast.literal_eval(tiny_name)
    assert config.id == "COMMON"
    assert call.func.id == "ArchitectureSpec"
    return ast.literal_eval(row_name), {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


@pytest.fixture
def with_example(monkeypatch: pytest.MonkeyPatch) -> str:
    name, arguments = example()
    assert name not in ARCHITECTURES, "it is in the table now: use another example"
    monkeypatch.setitem(ARCHITECTURES, name, ArchitectureSpec(**arguments))
    monkeypatch.setitem(tiny_encoders.CONFIGS, name, tiny_encoders.COMMON)
    return name


def check_taps(name: str) -> None:
    for layer in (1, 3, 4):
        golden.test_packed_rows(name, layer)
    golden.test_padded_rows(name)
    golden.test_several_layers_and_output(name)


def check_trained_weights(name: str) -> None:
    building.test_trained_and_untrained_weights_are_the_complete_model(name, "random")


def test_the_example_works(with_example: str) -> None:
    check_taps(with_example)
    check_trained_weights(with_example)


@pytest.mark.parametrize(("forgotten", "check"), [("norm_before", check_taps), ("after_layers", check_trained_weights)])
def test_a_forgotten_column_is_noticed(
    with_example: str, forgotten: str, check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, arguments = example()
    monkeypatch.setitem(
        ARCHITECTURES, with_example, ArchitectureSpec(**{k: v for k, v in arguments.items() if k != forgotten})
    )
    with pytest.raises(AssertionError):
        check(with_example)
