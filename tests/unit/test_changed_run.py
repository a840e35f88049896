"""What may change between two lives of a run and what may not: a language, documents, other data need `--allow-change`."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import load_recipe
from pipeline.errors import UserError
from pipeline.provenance import resume_critical_config
from pipeline.runtime.dist import Launch
from pipeline.training.build import open_data
from pipeline.training.identity import identity_of
from pipeline.training.trainer import Trainer


def resume(recipe_file: Path, before: list[str], now: list[str], allow_change: bool = False) -> None:
    """A run begun with the overrides `before` and continued with `now`: the trainer's own check, nothing else of it."""
    begun, recipe = load_recipe(recipe_file, before), load_recipe(recipe_file, now)
    state = {
        "recipe": resume_critical_config(begun),
        "data_fingerprint": open_data(begun).fingerprint,
        "identity": identity_of(begun.teacher, begun.vocabulary),
    }
    trainer = Trainer.__new__(Trainer)
    trainer.recipe, trainer.run_dir = recipe, Path("runs/begun")
    trainer.launch = Launch(0, 1, 0, torch.device("cpu"))
    trainer.parts = SimpleNamespace(identity=identity_of(recipe.teacher, recipe.vocabulary))
    trainer.data_fingerprint = open_data(recipe).fingerprint
    trainer._check_changes(state, allow_change)


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ([], ["languages=[hi,tr]"], r"languages: None -> \['hi', 'tr'\]; data: "),
        (["languages=[hi,tr]"], ["languages=[hi,sw,tr]"], r"languages: \['hi', 'tr'\] -> \['hi', 'sw', 'tr'\]; data: "),
        ([], ["documents=separate"], "documents: joined -> separate"),
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
        resume(tiny_recipe, before, now)
    resume(tiny_recipe, before, now, allow_change=True)


def test_the_same_teacher_elsewhere_is_no_change_and_another_one_is(
    tiny_recipe: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_teacher, tmp_path / "copy")
    resume(tiny_recipe, [], [f"teacher={copy}"])
    tensors = load_file(copy / "model.safetensors")
    tensors["encoder.layer.3.output.LayerNorm.bias"][0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"teacher weights: \w{12} -> \w{12}\).*--allow-change"):
        resume(tiny_recipe, [], [f"teacher={copy}"])
    resume(tiny_recipe, [], [f"teacher={copy}"], allow_change=True)


@pytest.mark.parametrize("now", ["steps=24", "save_every=1", "micro_batch_per_gpu=2"])
def test_how_long_and_how_cut_may_change(tiny_recipe: Path, now: str) -> None:
    resume(tiny_recipe, [], [now])
