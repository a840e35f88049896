"""What may change between two attempts of a run. Another language list, documents setting or data need `--allow-change`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.config import load_recipe
from pipeline.errors import UserError
from pipeline.provenance import resume_critical_config
from pipeline.training.build import MadeFrom
from pipeline.training.checks import open_data
from pipeline.training.identity import identity_of
from pipeline.training.resume import check_changes


def check(recipe_file: Path, before: list[str], now: list[str], allow_change: bool = False) -> list[str]:
    """The check at a resume, for a run that began with the overrides `before` and continues with `now`; its warnings."""
    begun, recipe = load_recipe(recipe_file, before), load_recipe(recipe_file, now)
    saved = {
        "recipe": resume_critical_config(begun),
        "data_fingerprint": open_data(begun).fingerprint,
        "identity": identity_of(begun.teacher, begun.vocabulary),
    }
    identity = identity_of(recipe.teacher, recipe.vocabulary)
    made_from = MadeFrom(recipe, identity, open_data(recipe).fingerprint, "")
    return check_changes(saved, made_from, Path("runs/begun"), allow_change)


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ([], ["languages=[hi,tr]"], r"languages: None -> \['hi', 'tr'\]; data: "),
        (["languages=[hi,tr]"], ["languages=[hi,sw,tr]"], r"languages: \['hi', 'tr'\] -> \['hi', 'sw', 'tr'\]; data: "),
        ([], ["documents=separate"], "documents: joined -> separate"),
        (["documents=separate"], ["documents=separate", "positions=restart"], "positions: continue -> restart"),
        ([], ["sampling_unit=bytes"], "sampling_unit: tokens -> bytes; data: "),
        ([], ["max_epochs=20"], "max_epochs: None -> 20.0; data: "),
        (["max_epochs=20"], ["max_epochs=20", "steps=24"], "data: "),  # the cap is spread over the steps
        ([], ["seed=1"], "seed: 0 -> 1; data: "),
    ],
)
def test_a_change_is_named_and_needs_to_be_asked_for(
    tiny_recipe: Path, before: list[str], now: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=rf"{named}.*--allow-change"):
        check(tiny_recipe, before, now)
    (warning,) = check(tiny_recipe, before, now, allow_change=True)
    assert "--allow-change" in warning


def test_a_copy_of_the_teacher_is_accepted_and_another_teacher_is_not(
    tiny_recipe: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_teacher, tmp_path / "copy")
    assert check(tiny_recipe, [], [f"teacher={copy}"]) == []
    tensors = load_file(copy / "model.safetensors")
    tensors["encoder.layer.3.output.LayerNorm.bias"][0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"teacher weights: \w{12} -> \w{12}\).*--allow-change"):
        check(tiny_recipe, [], [f"teacher={copy}"])
    check(tiny_recipe, [], [f"teacher={copy}"], allow_change=True)


@pytest.mark.parametrize("now", ["steps=24", "save_every=1", "micro_batch_per_gpu=2"])
def test_length_of_the_run_and_micro_batch_may_change(tiny_recipe: Path, now: str) -> None:
    assert check(tiny_recipe, [], [now]) == []


@pytest.mark.parametrize("key", ["student.compile", "teacher_options.compile"])
def test_compilation_may_change_with_a_warning(tiny_recipe: Path, key: str) -> None:
    """It changes last bits. A run must be able to continue where a compiler no longer works."""
    for before, now, change in (("true", "false", "True -> False"), ("false", "true", "False -> True")):
        (warning,) = check(tiny_recipe, [f"{key}={before}"], [f"{key}={now}"])
        assert f"layers are not compiled as before this checkpoint ({key}: {change})" in warning
        assert check(tiny_recipe, [f"{key}={now}"], [f"{key}={now}"]) == []
