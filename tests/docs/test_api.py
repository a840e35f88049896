"""The Python code of docs/api.md, run with a small teacher in the places that the page names."""

from __future__ import annotations

import runpy
import textwrap
from pathlib import Path

import pytest
import torch

import minilmv2
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.errors import UserError
from tests.conftest import REPO, write_tiny_recipe
from tests.docs.documents import FENCE

PAGE = (REPO / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = {heading: block["body"] for heading, part in
          ((part.partition("\n")[0], part) for part in PAGE.split("\n## ")[1:])
          for block in FENCE.finditer(part) if block["language"] == "python"}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path, tiny_shards: Path) -> Path:
    """A directory in which `artifacts/` is that of a small teacher."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "teacher").symlink_to(tiny_teacher)
    (tmp_path / "artifacts" / "shards").symlink_to(tiny_shards)
    (tmp_path / "recipes").mkdir()
    write_tiny_recipe(tmp_path / "recipes" / "quickstart.yaml", tiny_teacher, tiny_shards)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code: str) -> dict[str, object]:
    Path("code.py").write_text(code, encoding="utf-8")
    return runpy.run_path("code.py")


def test_every_name_has_its_row() -> None:
    rows = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(minilmv2.__all__)
    assert list(BLOCKS) == [
        "From recipe to student",
        "The relation loss in your own loop",
        "In a Hugging Face Trainer",
        "Shards and sampling",
    ]


def test_from_recipe_to_student(place: Path) -> None:
    code = BLOCKS["From recipe to student"].replace('"steps": 150, "student.layers": 6', '"steps": 2, "eval_every": 2')
    code = code.replace(
        '["retrieval"])',
        '["retrieval"], {"retrieval.pairs": PAIRS, "retrieval.languages": ["sw"], "retrieval.max_pairs": 8, "retrieval.max_length": 60})',
    )
    names = run(f"PAIRS = {str(REPO / 'samples' / 'parallel')!r}\n{code}")
    assert len(names["figures"]["retrieval"]) == 2  # type: ignore[index]
    assert (place / "runs" / "first" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(("models", "output"), [([], "out"), (["artifacts/teacher"], "")])
def test_arguments_that_are_wrong_raise_and_do_not_end_python(models: list[str], output: str) -> None:
    with pytest.raises(UserError, match=r"MODEL|--output"):
        minilmv2.evaluate(models, output)


def test_the_loop_lowers_the_loss(place: Path) -> None:
    code = BLOCKS["The relation loss in your own loop"]
    before = float(run(code.replace("range(3)", "range(1)"))["loss"].detach())  # type: ignore[attr-defined]
    after = float(run(code.replace("range(3)", "range(20)"))["loss"].detach())  # type: ignore[attr-defined]
    assert after < 0.95 * before


def test_autocast_reaches_the_models_and_not_the_loss(place: Path) -> None:
    """bf16 in the models changes the loss in the third digit; `relation_kl` of their tensors is that of the reference."""
    code = BLOCKS["The relation loss in your own loop"].replace("range(3)", "range(1)")
    torch.manual_seed(0)
    half = run(code)
    torch.manual_seed(0)
    full = run(code.replace("torch.bfloat16)", "enabled=False)"))
    losses = [float(names["loss"].detach()) for names in (half, full)]  # type: ignore[attr-defined]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    taps = [[x.detach() for x in half[f"of_{role}"]] for role in ("teacher", "student")]  # type: ignore[attr-defined]
    assert {x.dtype for x in (*taps[0], *taps[1])} == {torch.bfloat16}
    exact = sum(relation_kl_reference(*pair, 12, half["lengths_B"]).item() for pair in zip(*taps, strict=True))
    assert losses[0] == pytest.approx(exact, rel=1e-4)


def test_the_method_of_the_trainer_is_the_examples() -> None:
    source = (REPO / "examples" / "with_trainer.py").read_text(encoding="utf-8")
    assert textwrap.indent(BLOCKS["In a Hugging Face Trainer"], "    ") in source


def test_shards_and_sampling(place: Path) -> None:
    names = run(BLOCKS["Shards and sampling"].replace("128", "32"))
    assert names["first"].shape == (1, 32)  # type: ignore[attr-defined]
