"""A teacher that a family of students shares gives each of them what a teacher of its own would, and runs once per batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from pipeline.distillation.config import LayerPair, RelationsConfig
from pipeline.distillation.models.teacher import load_teacher
from pipeline.distillation.shared_teacher import SharedTeacher, layers_of_all, tap_options_of_all
from tests.tiny_encoders import tiny_encoder

CONFIGS = {
    "last": RelationsConfig(heads=4),
    "lower": RelationsConfig(heads=4, teacher_layer=1),
    "output": RelationsConfig(heads=4, teacher_layer=2, tail="relation"),
    "several": RelationsConfig(heads=4, layers=[LayerPair(3, 1), LayerPair(1, 2)], tail="mse"),
}


def shared_by(names: list[str], family: str, dtype: torch.dtype) -> tuple[SharedTeacher, list[int]]:
    configs = [CONFIGS[name] for name in names]
    model = tiny_encoder(family)
    layers = layers_of_all(configs, model.config.num_hidden_layers)
    teacher = load_teacher(model, layers, dtype, **tap_options_of_all(configs))
    calls: list[int] = []
    teacher.register_forward_hook(lambda *unused: calls.append(1))
    return SharedTeacher(teacher, layers, teacher.widths, teacher.tapped.with_output), calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["xlm-roberta", "bert", "modernbert"])
@pytest.mark.parametrize("names", [["last", "lower", "output", "several"], ["lower", "last"], ["several", "lower"]])
def test_each_student_of_a_family_sees_its_own_teacher(names: list[str], family: str, dtype: torch.dtype) -> None:
    shared, calls = shared_by(names, family, dtype)
    batch_BL = torch.randint(5, 40, (2, 9))
    for name in names:
        config = CONFIGS[name]
        own = load_teacher(tiny_encoder(family), config.teacher_taps, dtype, **config.tap_options)
        view = shared.view(config)
        assert view.widths == own.widths
        ours, theirs = view(batch_BL), own(batch_BL)
        assert torch.utils._pytree.tree_structure(ours) == torch.utils._pytree.tree_structure(theirs)
        for one, other in zip(*map(torch.utils._pytree.tree_leaves, (ours, theirs)), strict=True):
            assert torch.equal(one, other), name
    assert len(calls) == 1


def test_a_family_is_cut_above_the_highest_layer_that_is_read() -> None:
    assert layers_of_all([CONFIGS["lower"], CONFIGS["several"]], 4) == [1, 3]
    assert layers_of_all([CONFIGS["lower"], CONFIGS["last"]], 4) == [1, 4]


def test_the_next_batch_of_a_family_is_read_again_and_the_last_one_is_forgotten() -> None:
    shared, calls = shared_by(["last", "lower"], "bert", torch.float32)
    view = shared.view(CONFIGS["lower"])
    batch_BL = torch.randint(5, 40, (2, 9))
    first = view(batch_BL)
    kept = weakref.ref(first[0])
    equal_BL = batch_BL.clone()  # another batch, whatever it holds
    view(equal_BL)
    assert len(calls) == 2
    del first
    gc.collect()
    assert kept() is None
    shared.release()
    view(equal_BL)
    assert len(calls) == 3
