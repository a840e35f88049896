"""The tasks of one evaluation share the loaded models: no task may change the figures of the next one.

The model has dropout .5, so a model left in training mode gives other figures.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.tap import tap
from pipeline.evaluation.command import read_overrides
from pipeline.evaluation.encoder import Encoder, load_encoder, sentence_vectors
from pipeline.evaluation.ranks import alone
from pipeline.evaluation.task import tasks
from tests.tiny_encoders import CONFIGS, random_rows, tiny_encoder
from tests.unit.evaluation.all_tasks import TASKS, quick_settings

TIMED = ("sentences_per_second", "times_first", "seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def dropping_model(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with dropout .5 in its config."""
    directory = tmp_path_factory.mktemp("dropping")
    model = AutoModel.from_pretrained(tiny_teacher, add_pooling_layer=False)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.5
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "sentencepiece.bpe.model"):
        (directory / name).write_bytes((tiny_teacher / name).read_bytes())
    return directory


@pytest.fixture(scope="module")
def config(tiny_teacher: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = quick_settings(tmp_path_factory.mktemp("data"))
    return read_overrides([*settings, f"heldout.teacher={tiny_teacher}", f"heldout.data={tiny_shards}"])


def run_task(name: str, encoder: Encoder, config: Any, directory: Path) -> dict[str, Any]:
    """The figures of one task that do not depend on the clock."""
    (found,) = tasks()[name].evaluate([encoder], getattr(config, name), alone(), directory).values()
    return {key: value for key, value in found.items() if key not in TIMED}


def state_of(encoder: Encoder) -> dict[str, Any]:
    """Everything of a loaded model that a task could leave changed."""
    model, modules = encoder.model, dict(encoder.model.named_modules())
    return {
        "mode": {name: module.training for name, module in modules.items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "hooks": {
            name: [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in modules.items()
        },
        "gradient": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "weights": {name: (str(t.dtype), t.double().sum().item()) for name, t in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "layer": encoder.values_layer,
    }


def state_of_torch() -> dict[str, Any]:
    return {
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradient": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
    }


def every_ordered_pair(names: list[str]) -> Iterator[str]:
    """A walk in which every name is directly followed by every other name."""
    yield names[0]
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            yield names[second]
            yield names[first]
        if first + 1 < len(names):
            yield names[first + 1]


def test_the_walk_has_every_ordered_pair() -> None:
    walk = list(every_ordered_pair(["a", "b", "c", "d"]))
    followed = set(itertools.pairwise(walk))
    assert {(a, b) for a in "abcd" for b in "abcd" if a != b} <= followed


def test_no_task_depends_on_the_one_before_it(dropping_model: Path, config: Any, tmp_path: Path) -> None:
    alone_figures = {
        name: run_task(name, load_encoder(str(dropping_model)), config, tmp_path / f"alone-{name}") for name in TASKS
    }
    encoder = load_encoder(str(dropping_model))
    before, torch_before = state_of(encoder), state_of_torch()
    earlier = "the start"
    for number, name in enumerate(every_ordered_pair(TASKS)):
        assert run_task(name, encoder, config, tmp_path / str(number)) == alone_figures[name], f"{name} after {earlier}"
        assert state_of(encoder) == before, f"{name} changed the model"
        assert state_of_torch() == torch_before, f"{name} changed torch's state"
        earlier = name


def test_an_encoding_that_fails_leaves_no_hook(dropping_model: Path) -> None:
    encoder = load_encoder(str(dropping_model))
    before = state_of(encoder)
    with pytest.raises((IndexError, RuntimeError)):
        sentence_vectors(encoder, ["word " * 100], 100, 2)  # the model has 64 positions
    assert state_of(encoder) == before


@pytest.mark.parametrize("family", CONFIGS)
def test_a_tap_is_in_the_mode_of_its_model(family: str) -> None:
    model = tiny_encoder(family)
    for training in (False, True):
        model.train(training)
        for layer in (1, 4):
            for with_output in (False, True):
                tapped = tap(model, layer, with_output=with_output)
                assert {module.training for module in tapped.modules()} == {training}


def test_held_out_losses_leave_every_module_in_its_own_mode() -> None:
    model = tiny_encoder("bert")
    model.encoder.layer[1].train()  # one part in another mode than the rest
    modes = {name: module.training for name, module in model.named_modules()}
    student = tap(model, 3)
    distiller = DistillModule(
        tap(tiny_encoder("bert", seed=1), 4), student, RelationsConfig(heads=4, backend="chunked")
    )
    first = distiller.losses_by_row(random_rows(2, 12))
    assert torch.equal(first, distiller.losses_by_row(random_rows(2, 12)))  # no dropout while it measures
    distiller.relation_maps(random_rows(2, 12), "q-q")
    assert {name: module.training for name, module in model.named_modules()} == modes
