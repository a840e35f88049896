"""Valid settings with an unexpected effect give a warning before the first step, with the setting to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from pipeline.config import load_recipe
from pipeline.training.checks import open_data
from pipeline.training.recipe_warnings import recipe_warnings, window_warnings

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
        (
            ["relations.tail=pooled", "relations.pooled_temperature=0.1"],
            ["distance is cosine", "temperature has no effect"],
        ),
        (["optimizer.decay=cosine", "optimizer.decay_share=0.2"], ["decay is cosine", "decay_share has no effect"]),
        (["steps=40000"], ["read more than 100 times", "--set max_epochs=100"]),
    ],
)
def test_unexpected_effects_give_a_warning(tiny_recipe: Path, overrides: list[str], says: list[str]) -> None:
    found = [line for line in warnings_of(tiny_recipe, *overrides) if says[0] in line]
    assert len(found) == 1, warnings_of(tiny_recipe, *overrides)
    for words in says:
        assert words in found[0]


LAYER_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        (["relations.teacher_layer=4", "student.layers=4"], []),
        (["relations.teacher_layer=3", "student.layers=4"], ["layer 3 of the teacher"]),
        (["relations.teacher_layer=3", "student.layers=2"], ["layer 3 of the teacher", "layer 2 of the student"]),
        (["relations.teacher_layer=4", "student.layers=2", "documents=separate"], ["layer 2 of the student"]),
        (
            ["relations.layers=[{teacher: 2, student: 1}, {teacher: 4, student: 2}]", "relations.teacher_layer=null"],
            ["layer 2 of the teacher", "layer 2 of the student"],
        ),
    ],
)
def test_a_distilled_layer_with_a_window_is_named_with_what_it_sees(
    tiny_recipe: Path, overrides: list[str], roles: list[str]
) -> None:
    teacher = AutoConfig.for_model(
        "modernbert", num_hidden_layers=4, hidden_size=48, local_attention=16, layer_types=LAYER_TYPES
    )
    recipe = load_recipe(tiny_recipe, ["student.init=random", "student.layers=2", *overrides])
    warnings = window_warnings(recipe, teacher)
    assert len(warnings) == len(roles)
    part = "document" if recipe.documents == "separate" else "row"
    for warning, role in zip(warnings, roles, strict=True):
        assert role in warning
        assert f"sees 8 tokens to either side. The relations match all pairs of tokens of a {part}" in warning
        assert f"that see all tokens: {'1' if 'student' in role else '1, 4'} (" in warning


def test_layers_without_a_window_give_no_warning(tiny_recipe: Path) -> None:
    assert window_warnings(load_recipe(tiny_recipe, []), AutoConfig.for_model("bert", num_hidden_layers=4)) == []
