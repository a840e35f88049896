"""Small parts of the product's work. Each probe returns figures that at least one planted bug changes.

A probe runs in a process whose `pipeline` and `data_prep` are the copy with the bug, so it imports them when it is called.
Numbers are compared to a thousandth: a change of rounding alone does not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

Figures = list[Any]
ACCUMULATION = 3


def tiny_model(layers: int, hidden: int, seed: int) -> Any:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=60,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=2 * hidden,
        max_position_embeddings=40,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return XLMRobertaModel(config, add_pooling_layer=False).eval()


def tiny_ids() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 50 + 4


def loss_of_padded_rows() -> Figures:
    """The relation loss of a batch whose first row is padded."""
    from pipeline.distillation.config import RelationsConfig
    from pipeline.distillation.distiller import DistillModule
    from pipeline.distillation.tap import tap

    module = DistillModule(tap(tiny_model(3, 24, 0), 2), tap(tiny_model(2, 24, 1), 2), RelationsConfig(heads=3, backend="chunked"))  # fmt: skip
    loss, parts_P = module(tiny_ids(), lengths_B=torch.tensor([5, 12]))
    return [loss.item(), *parts_P.tolist()]


def tapped_projections() -> Figures:
    """Q, K and V of the second of three layers."""
    from pipeline.distillation.tap import tap

    return [x_BLD.abs().sum().item() for x_BLD in tap(tiny_model(3, 24, 0), 2)(tiny_ids())]


def relation_losses() -> Figures:
    """The `chunked` loss and gradient for a student narrower than the teacher, full rows and padded ones."""
    from pipeline.distillation.relations.loss import relation_kl

    torch.manual_seed(0)
    teacher, student = torch.randn(2, 9, 24), torch.randn(2, 9, 12, requires_grad=True)
    figures = []
    for lengths in (None, torch.tensor([4, 9])):
        loss = relation_kl(teacher, student, 3, lengths, backend="chunked")
        (gradient,) = torch.autograd.grad(loss, student)
        figures += [loss.item(), gradient.abs().sum().item()]
    return figures


def loss_of_a_large_student() -> Figures:
    """Logits of several hundred for the student only."""
    from pipeline.distillation.relations.loss import relation_kl

    torch.manual_seed(0)
    return [relation_kl(torch.randn(2, 20, 24), 40 * torch.randn(2, 20, 24), 3, backend="chunked").item()]


def training_rows() -> Figures:
    """Rows of two languages that may be trained on."""
    from pipeline.data.sampler import HeldOut

    split = HeldOut([40, 100], [4, 10])
    return split.training_rows(np.array([0, 1] * 10), np.repeat(np.arange(10), 2)).tolist()


def rows_by_seed() -> Figures:
    """The row of each of 200 samples under two seeds."""
    from pipeline.data.sampler import TemperatureSampler

    return [TemperatureSampler([50, 500], 0.3, seed)(np.arange(200))[1].tolist() for seed in (0, 1)]


def trained_names() -> Figures:
    """Names of the parameters that the optimizer gets."""
    from pipeline.distillation.config import RelationsConfig
    from pipeline.distillation.models.student import StudentConfig, build_student

    config = StudentConfig(layers=2, hidden=12, heads=3)
    return sorted(build_student(tiny_model(3, 24, 0), config, 0, RelationsConfig(teacher_layer=2)).trained)


def resumed_moments() -> Figures:
    """Adam's moments, and a weight after one more step, in an engine that was loaded from another one's state."""
    first = tiny_engine()
    for _ in range(3):
        optimizer_step(first)
    kept: dict[tuple[str, str], torch.Tensor] = {}
    for fragment in first.fragments():
        kept["weight", fragment.name] = fragment.view(fragment.buffer).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            kept[moment, fragment.name] = first.moment(fragment, moment).clone()
    second = tiny_engine()
    second.load(lambda kind, name, start, numel: kept[kind, name][start : start + numel], 3, first.scaler_state())
    loaded = [
        second.moment(f, name).abs().sum().item() for f in second.fragments() for name in ("exp_avg", "exp_avg_sq")
    ]
    optimizer_step(second)
    return [*loaded, second.module.weight.abs().sum().item()]


def tiny_engine() -> Any:
    from pipeline.runtime import dist
    from pipeline.runtime.engine import StudentEngine
    from pipeline.runtime.optimizer import OptimizerConfig

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed requires them
    dist.init_process_group(dist.Launch(0, 1, 0, torch.device("cpu")), 60)
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 3)
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": 2**62,
    }
    return StudentEngine(module, dict(module.named_parameters()), OptimizerConfig(warmup_steps=0), config)


def optimizer_step(engine: Any) -> None:
    engine.backward(engine(torch.arange(20.0).reshape(4, 5) / 10).square().mean())
    engine.step(1e-2)


class PlainEngine:
    """Gradient accumulation without DeepSpeed: the mean over micro-batches, and the random numbers that each would use."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(6, 6)
        self.random: list[float] = []

    def __call__(self, input_ids_BL: torch.Tensor, segments: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.random += torch.rand(2).tolist()
        loss = torch.tanh(self.layer(input_ids_BL.float() / 10)).square().mean()
        return loss, loss.detach().reshape(1)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / ACCUMULATION).backward()

    def step(self, learning_rate: float) -> Any:
        return SimpleNamespace(gradient_norm=torch.ones(()), skipped=torch.tensor(False), loss_scale=torch.ones(()))


def stepper_of(rank: int, world_size: int = 1, **recipe: Any) -> Any:
    """A `Stepper` before its first step, with a plain engine and without data."""
    from pipeline.config import Recipe
    from pipeline.runtime import dist
    from pipeline.runtime.anomalies import GuardConfig, SpikeDetector
    from pipeline.runtime.ds_config import BatchShape
    from pipeline.training.resume import TrainState
    from pipeline.training.stepper import Learner, Stepper

    dist.init_process_group(dist.Launch(0, 1, 0, torch.device("cpu")), 60)
    parts = MagicMock(
        recipe=Recipe(global_batch=2 * ACCUMULATION * world_size, steps=10, **recipe),
        launch=dist.Launch(rank, world_size, rank, torch.device("cpu")),
        batch=BatchShape(2, ACCUMULATION),
        engine=PlainEngine(),
        shared_teacher=None,
    )
    return Stepper([Learner(parts, TrainState(SpikeDetector(GuardConfig())))])


def batches() -> Iterator[tuple[torch.Tensor, None]]:
    for number in range(ACCUMULATION):
        yield (torch.arange(12).reshape(2, 6) * (3 + number) % 11, None)


def direction_of_a_step() -> Figures:
    """The gradient of one step over three micro-batches, of length 1: what Adam and clipping see of it."""
    stepper = stepper_of(rank=0)
    stepper.train_step(0, batches())
    gradient = stepper.parts.engine.layer.weight.grad
    return (gradient / gradient.norm()).flatten().tolist()


def random_numbers_by_rank() -> Figures:
    """What dropout draws from in the same step on two ranks."""
    figures = []
    for rank in range(2):
        stepper = stepper_of(rank, world_size=2)
        stepper.train_step(4, batches())
        figures.append(stepper.parts.engine.random)
    return figures


def sample_numbers_of_a_resumed_run() -> Figures:
    """The first two micro-batches after step 5, on the second of two ranks."""
    numbers = stepper_of(1, world_size=2).sample_numbers(5)
    return [next(numbers).tolist() for _ in range(2)]


def samples_in_a_checkpoint() -> Figures:
    """The number of rows read, as a checkpoint states it."""
    from pipeline.training.resume import checkpoint_state

    stepper = stepper_of(0)
    stepper.parts.engine = MagicMock()
    state = checkpoint_state(stepper.parts, stepper.learners[0].state, 7)
    return [state["step"], state["samples"]]
