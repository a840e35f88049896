"""The worked example in CONTRIBUTING.md, followed to the letter: its row and its tiny model make the golden tests pass."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import pytest

from pipeline.distillation.models.architectures import ARCHITECTURES, ArchitectureSpec
from tests import tiny_encoders
from tests.conftest import REPO
from tests.golden import test_tap_families as golden
from tests.unit.distillation import test_student_building as building


def example() -> tuple[str, dict[str, object]]:
    """Model type and the row's arguments, read from the page's two blocks of code without running them."""
    page = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    page = page.partition("\n## Add an architecture\n")[2].partition("\n## ")[0]
    row, tiny = re.findall(r"^ *```python\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    entries = [ast.parse("{" + block.strip() + "}", mode="eval").body for block in (row, tiny)]
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
    assert name not in ARCHITECTURES, "it is in the table now: take another example"
    monkeypatch.setitem(ARCHITECTURES, name, ArchitectureSpec(**arguments))
    monkeypatch.setitem(tiny_encoders.CONFIGS, name, tiny_encoders.COMMON)
    return name


def check_taps(name: str) -> None:
    for layer in (1, 3, 4):
        golden.test_packed_rows(name, layer)
    golden.test_padded_rows(name)
    golden.test_several_layers_and_output(name)


def test_the_example_works(with_example: str) -> None:
    check_taps(with_example)
    building.test_trained_and_carried_are_the_whole_model(with_example, "random")


@pytest.mark.parametrize(
    ("forgotten", "check"),
    [
        ("norm_before", check_taps),
        ("after_layers", lambda name: building.test_trained_and_carried_are_the_whole_model(name, "random")),
    ],
)
def test_what_is_forgotten_is_noticed(
    with_example: str, forgotten: str, check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, arguments = example()
    monkeypatch.setitem(
        ARCHITECTURES, with_example, ArchitectureSpec(**{k: v for k, v in arguments.items() if k != forgotten})
    )
    with pytest.raises(AssertionError):
        check(with_example)
