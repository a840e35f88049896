"""Retrieval settings: training ignores them with one warning, the demo and `pipeline evaluate` read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from demo.settings import QUICKSTART, retrieval_settings, training_overrides
from pipeline.config import load_recipe, tree_of_recipe, unused_sections_warning
from pipeline.errors import UserError
from pipeline.evaluation.command import read_overrides
from pipeline.evaluation.retrieval import RetrievalConfig
from tests.conftest import REPO

SECTION = "retrieval: {pairs: somewhere, languages: [no, de]}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"teacher: {tmp_path / 'nowhere'}\nsteps: 7\n{SECTION}")
    return path


def test_a_recipe_with_retrieval_settings_stays_valid(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace(SECTION, ""))
    assert load_recipe(recipe, ["retrieval.max_pairs=9"]) == load_recipe(other, [])
    assert tree_of_recipe(recipe.read_text(), "a run") == tree_of_recipe(other.read_text(), "a run")
    assert "`retrieval`" in str(unused_sections_warning(recipe, []))
    assert "`retrieval`" in str(unused_sections_warning(other, ["retrieval.max_pairs=9"]))
    assert unused_sections_warning(other, ["steps=8"]) is None
    assert unused_sections_warning(REPO / QUICKSTART, []) is None


def test_training_warns_once(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "pipeline/train.py", "--deepspeed", "ds_configs/zero2.json", "--recipe", str(recipe)]
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2, "neither shards nor teacher exist"
    assert done.stdout.count("warning: training does not use `retrieval`") == 1


def test_the_demo_reads_the_recipe_and_its_own_settings(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["steps=3", "retrieval.max_pairs=5"]
    assert retrieval_settings(recipe, overrides) == RetrievalConfig("somewhere", ["no", "de"], 5)
    assert training_overrides(overrides) == ["steps=3"]
    monkeypatch.chdir(REPO)
    assert retrieval_settings(QUICKSTART, []) == RetrievalConfig()
    assert retrieval_settings(Path("recipes/bert_base_l6_h384.yaml"), []) == RetrievalConfig()
    with pytest.raises(UserError, match=r"recipe\.yaml: .*did you mean `max_pairs`"):
        retrieval_settings(recipe, ["retrieval.max_pair=5"])


def test_evaluation_reads_its_own_settings() -> None:
    assert read_overrides(["retrieval.pairs=somewhere"]).retrieval == RetrievalConfig(pairs="somewhere")
