"""Unknown keys of a recipe under the names that other projects give them."""

from __future__ import annotations

import pytest

from pipeline.config import Recipe, _dotted_keys, build_section
from pipeline.errors import UserError
from pipeline.evaluation.command import read_overrides
from pipeline.recipe.other_names import _BY_NAME, OTHER_NAMES
from pipeline.recipe.text import apply_override


def message(key: str) -> str:
    tree: dict = {}
    apply_override(tree, f"{key}=1")
    with pytest.raises(UserError) as caught:
        build_section(Recipe, tree, "")
    return str(caught.value)


@pytest.mark.parametrize(("key", "advice"), [
    ("learning_rate", "here it is `optimizer.lr`"),
    ("optimizer.learning_rate", "here it is `optimizer.lr`"),
    ("lr", "did you mean `optimizer.lr`?"),
    ("batch_size", "here it is `global_batch`"),
    ("epochs", "here it is `steps` (optimizer steps: the text is sampled by temperature, so an epoch has no length)"),
    ("per-device-train-batch-size", "here it is `micro_batch_per_gpu`"),
    ("layers", "did you mean `relations.layers` or `student.layers`?"),
    ("student.seed", "did you mean `seed`?"),
    ("bf16", "precision and ZeRO belong to the DeepSpeed JSON (`--deepspeed ds_configs/zero2_bf16.json`)"),
    ("alfa", "did you mean `alpha`?"),
])  # fmt: skip
def test_the_key_that_has_this_meaning_here(key: str, advice: str) -> None:
    assert message(key) == f"unknown key `{key}`; {advice}"


def test_every_key_that_is_named_exists_and_no_name_is_one_of_ours() -> None:
    known = _dotted_keys(Recipe, "")
    assert set(OTHER_NAMES) <= set(known)
    assert sum(map(len, map(str.split, OTHER_NAMES.values()))) <= len(_BY_NAME), "each name once"
    in_root = {key for key in known if "." not in key}
    assert not in_root & set(_BY_NAME)


def test_settings_of_tasks_have_names_of_their_own() -> None:
    with pytest.raises(UserError, match=r"unknown key `xnli\.learning_rate`; did you mean `learning_rates`\?"):
        read_overrides(["xnli.learning_rate=1"])
