"""Fine-tune one encoder with a head on one task at one learning rate: the loop that XNLI and MLQA share.

In: a task (how to load the model, its loss, how a language is scored), tokenised rows, settings. Out: what every epoch
scored on the development languages, and the test score of the best epoch. Every rank holds the whole model and takes
its share of each global batch; gradients are summed over ranks, so the number of ranks changes nothing but speed, up to
dropout's draws: masks differ per rank and micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from pipeline.distillation.models.loading import with_head
from pipeline.errors import DivergedRunError, UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.finetuning import checkpoint as cell_state
from pipeline.evaluation.finetuning.batches import TokenRows, global_batches
from pipeline.evaluation.ranks import Ranks
from pipeline.recipe.ranges import LARGEST_BATCH, LONGEST_ROW, check_ranges
from pipeline.runtime.optimizer import OptimizerConfig, learning_rate, parameter_groups

Scores = dict[str, dict[str, float]]  # language -> measure -> per cent; the first measure decides


@dataclass
class FinetuneConfig:
    """The grid and what all its cells share. The defaults are XNLI's in the paper."""

    learning_rates: list[float] = field(default_factory=lambda: [3e-5, 4e-5, 5e-5, 6e-5])
    seeds: list[int] = field(default_factory=lambda: [0])  # every learning rate is tried with each
    epochs: int = 5
    batch: int = 128  # rows per optimizer step, all ranks together
    micro_batch: int = 32  # rows per forward on one rank
    max_length: int = 128  # tokens
    warmup_share: float = 0.1  # of all steps; then the rate falls linearly to 0
    weight_decay: float = 0.01
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the forward; auto: bf16 on GPUs that have it

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        for key in ("epochs", "batch", "micro_batch"):
            if getattr(self, key) < 1:
                raise UserError(f"{name}.{key} is {getattr(self, key)}; it must be at least 1")
        if self.max_length < 8:
            raise UserError(f"{name}.max_length is {self.max_length}; two texts need at least 8 tokens")
        if not self.learning_rates or not self.seeds or min(self.learning_rates) <= 0:
            raise UserError(f"{name}.learning_rates and {name}.seeds need at least one entry; rates are positive")
        if not 0 <= self.warmup_share < 1 or self.weight_decay < 0:
            raise UserError(f"{name}.warmup_share lies in [0, 1), {name}.weight_decay is not negative")
        limits = {"learning_rates": (0, 1e3), "seeds": (0, 2**32 - 1), "epochs": (1, 10**6), "weight_decay": (0, 1e3)}
        batches = dict.fromkeys(("batch", "micro_batch"), (1, LARGEST_BATCH))
        check_ranges(self, name, {**limits, **batches, "max_length": (8, LONGEST_ROW)})


@dataclass(frozen=True)
class FinetuneTask:
    """What a task adds to the loop."""

    load: Callable[[], Any]  # the model with a fresh head; torch is seeded before
    rows: TokenRows
    loss: Callable[[Any, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]  # (outputs, inputs, targets) -> sum
    score: Callable[[Any, str], Scores]  # (model in eval mode, "dev" or "test")
    pad_id: int


@dataclass(frozen=True)
class GridPoint:
    """One place of the grid."""

    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"lr{self.learning_rate:g}-seed{self.seed}"


def load_with_head(head: Any, encoder: Encoder, **settings: Any) -> Any:
    """The encoder with a new head of a Hugging Face class."""
    return with_head(head, encoder.model, encoder.path, **settings).to(encoder.device)


def finetune(
    task: FinetuneTask, config: FinetuneConfig, cell: GridPoint, directory: Path, ranks: Ranks, label: str
) -> dict[str, Any]:
    """Train all epochs, or those that are missing, and score the best one on the test languages."""
    torch.manual_seed(cell.seed)
    model = task.load()
    adam = torch.optim.AdamW(
        parameter_groups(dict(model.named_parameters()), config.weight_decay), lr=cell.learning_rate
    )
    steps_per_epoch = math.ceil(len(task.rows) / config.batch)
    best: cell_state.Weights = {}
    state: dict[str, Any] = {"step": 0, "epochs": [], "best": 0}
    if resumed := cell_state.resume(directory, model, adam, ranks):
        best, state = resumed
    bar = tqdm(
        total=config.epochs * steps_per_epoch,
        initial=state["step"],
        desc=f"{label} {cell}",
        unit="step",
        disable=None if ranks.is_main else True,
    )
    for epoch in range(len(state["epochs"]), config.epochs):
        loss = _train_epoch(task, config, cell, model, adam, epoch, ranks, bar)
        dev = score(task, config, model, "dev")
        state["epochs"].append({"loss": loss, "dev": dev, "dev_mean": mean_of(dev)})
        state["step"] += steps_per_epoch
        if epoch == 0 or mean_of(dev) > state["epochs"][state["best"]]["dev_mean"]:
            best, state["best"] = cell_state.weights_of(model), epoch
        if ranks.is_main:
            cell_state.save(directory, model, adam, best, state)
        ranks.barrier()
    bar.close()
    cell_state.put_weights(model, best)
    return {
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "best_epoch": state["best"] + 1,
        "dev_mean": state["epochs"][state["best"]]["dev_mean"],
        "dev": state["epochs"][state["best"]]["dev"],
        "test": score(task, config, model, "test"),
        "epochs": [{"loss": epoch["loss"], "dev_mean": epoch["dev_mean"]} for epoch in state["epochs"]],
    }


def mean_of(scores: Scores) -> float:
    """Mean over languages of the measure that decides."""
    return sum(next(iter(measures.values())) for measures in scores.values()) / len(scores)


@torch.inference_mode()
def score(task: FinetuneTask, config: FinetuneConfig, model: Any, split: str) -> Scores:
    model.eval()
    with forward_precision(config, model.device):
        return task.score(model, split)


def _train_epoch(
    task: FinetuneTask,
    config: FinetuneConfig,
    cell: GridPoint,
    model: Any,
    adam: torch.optim.Optimizer,
    epoch: int,
    ranks: Ranks,
    bar: tqdm,
) -> float:
    """Mean loss of the epoch. Order and dropout follow from seed and epoch, so an epoch can be run again."""
    model.train()
    steps_per_epoch = math.ceil(len(task.rows) / config.batch)
    steps = config.epochs * steps_per_epoch
    rates = OptimizerConfig(lr=cell.learning_rate, warmup_steps=int(config.warmup_share * steps))
    torch.manual_seed((cell.seed * 1009 + epoch) * 65537 + ranks.rank)
    order = torch.Generator().manual_seed(cell.seed * 1009 + epoch)
    total = torch.zeros(1, dtype=torch.float64, device=model.device)
    for number, rows in enumerate(global_batches(len(task.rows), config.batch, order)):
        step = epoch * steps_per_epoch + number
        total += _step(task, config, model, rows, ranks) * (len(rows) / len(task.rows))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        if not torch.isfinite(norm):
            raise DivergedRunError(
                f"fine-tuning at {cell} met a gradient that is not finite at step {step + 1} of {steps}"
            )
        for group in adam.param_groups:
            group["lr"] = learning_rate(rates, step, steps)
        adam.step()
        adam.zero_grad()
        bar.update()
    return float(ranks.sum(total))


def _step(task: FinetuneTask, config: FinetuneConfig, model: Any, rows: list[int], ranks: Ranks) -> torch.Tensor:
    """Gradients of the mean loss over one global batch, on every rank; this rank's part of that mean."""
    mine = rows[ranks.rank :: ranks.world_size]
    weight = 1.0 / len(rows)
    if not mine:  # the last batch of an epoch can be smaller than the number of ranks: run a row that counts nothing
        mine, weight = rows[:1], 0.0
    total = torch.zeros(1, dtype=torch.float64, device=model.device)
    for start in range(0, len(mine), config.micro_batch):
        micro = mine[start : start + config.micro_batch]
        inputs = task.rows.inputs(micro, task.pad_id, model.device)
        with forward_precision(config, model.device):
            outputs = model(**inputs)
        loss = task.loss(outputs, inputs, task.rows.targets[micro].to(model.device)) * weight
        loss.backward()
        total += loss.detach()
    _sum_gradients(model, ranks)
    return total


def _sum_gradients(model: Any, ranks: Ranks) -> None:
    """One collective for all of them. A parameter that the head does not use has a gradient on no rank."""
    if ranks.world_size == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def forward_precision(config: FinetuneConfig, device: torch.device) -> Iterator[None]:
    """bf16 where it is asked for or pays; weights and optimizer stay fp32."""
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield
