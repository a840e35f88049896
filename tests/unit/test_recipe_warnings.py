"""Valid settings with an unexpected effect give a warning before the first step, with the setting to change."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.config import load_recipe
from pipeline.training.checks import open_data
from pipeline.training.recipe_warnings import recipe_warnings

ENOUGH = ["heldout_rows=1"]  # the tiny corpus has more than ten rows of every language


def warnings_of(recipe_file: Path, *overrides: str) -> list[str]:
    recipe = load_recipe(recipe_file, [*ENOUGH, *overrides])
    return recipe_warnings(recipe, open_data(recipe))


def test_an_ordinary_recipe_gives_no_warning(tiny_recipe: Path) -> None:
    assert warnings_of(tiny_recipe) == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optimizer.warmup_steps=12"], ["warmup_steps is 12", "12 steps", "2.77e-03 instead of 3.00e-03"]),
        (["optimizer.warmup_steps=4000", "steps=50"], ["3.75e-05 instead of", "--set optimizer.warmup_steps=5"]),
        (["optimizer.lr=1e-12"], ["optimizer.lr is 1.00e-12"]),
        (["steps=2000", "save_every=5000"], ["save_every is 5000", "--set save_every=200"]),
        (["checkpoint.keep_every=100"], ["checkpoint.keep_every is 100", "no milestone"]),
        (["checkpoint.keep_every=6"], ["every 12 steps"]),
        (
            ["language_weights={hi: 1, sw: 1, he: 1, tr: 1}", "alpha=0.7", "sampling_unit=bytes"],
            ["language_weights", "alpha and sampling_unit of this recipe has no effect"],
        ),
        (["heldout_rows=5000"], ["4 of 4 languages", "5000 rows", "at most a tenth", "hi ", " rows"]),
        (["max_epochs=0.5", "alpha=0", "steps=200"], ["max_epochs 0.5 lowers the share of", "25.0% to "]),
        (["language_weights={hi: 1, sw: 1, he: 1, tr: 0.001}"], ["1 languages may not occur in the 96 rows", "tr "]),
        (
            ["relations.tail=mse", "relations.pooling=cls", "relations.pooled_weight=2"],
            ["relations.tail is mse", "relations.pooled_weight and relations.pooling of this recipe has no effect"],
        ),
        (["steps=40000"], ["read more than 100 times", "--set max_epochs=100"]),
    ],
)
def test_unexpected_effects_give_a_warning(tiny_recipe: Path, overrides: list[str], says: list[str]) -> None:
    found = [line for line in warnings_of(tiny_recipe, *overrides) if says[0] in line]
    assert len(found) == 1, warnings_of(tiny_recipe, *overrides)
    for words in says:
        assert words in found[0]


@pytest.mark.parametrize("overrides", [["optimizer.warmup_steps=50", "steps=50"], ["steps=2000", "save_every=5000"]])
def test_the_printed_setting_removes_the_warning(tiny_recipe: Path, overrides: list[str]) -> None:
    (line,) = (line for line in warnings_of(tiny_recipe, *overrides) if "--set" in line and "epochs" not in line)
    setting = shlex.split(line.partition("--set ")[2])[0]
    assert not [line for line in warnings_of(tiny_recipe, *overrides, setting) if setting.partition("=")[0] in line]
