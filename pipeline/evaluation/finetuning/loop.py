"""Fine-tunes one encoder with a head on one task at one grid point: the loop that all such tasks share.

In: a task (how to load the model, its loss, how a language is scored), tokenized rows, settings. Out: the scores of every
epoch on the development languages, and the test scores of the best epoch. Every rank holds the complete model and
computes its share of each global batch; gradients are summed over ranks. Dropout masks differ between ranks and
micro-batches; otherwise the number of ranks changes nothing but the speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep.progress import Progress
from pipeline.distillation.models.loading import with_head
from pipeline.errors import DivergedRunError, UserError
from pipeline.evaluation.encoder import Encoder
from pipeline.evaluation.finetuning import checkpoint
from pipeline.evaluation.finetuning.batches import TokenRows, global_batches
from pipeline.evaluation.finetuning.precision import LOWEST_SCALE, ForwardPrecision, forward_precision
from pipeline.recipe.ranges import LARGEST_BATCH, LARGEST_INT, LONGEST_ROW, check_ranges
from pipeline.runtime.dist import Launch
from pipeline.runtime.optimizer import OptimizerConfig, learning_rate, parameter_groups

Scores = dict[str, dict[str, float]]  # language -> measure -> per cent; the first measure selects


@dataclass
class FinetuneConfig:
    """The grid and what all its points share. The defaults are XNLI's in the paper."""

    learning_rates: list[float] = field(default_factory=lambda: [3e-5, 4e-5, 5e-5, 6e-5])
    seeds: list[int] = field(default_factory=lambda: [0])  # every learning rate is tried with each seed
    epochs: int = 5
    batch: int = 128  # rows per optimizer step, all ranks together
    micro_batch: int = 32  # rows per forward on one rank
    max_length: int = 128  # tokens
    warmup_share: float = 0.1  # of all steps; then the rate falls linearly to 0
    weight_decay: float = 0.01
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16; fp16 on GPUs without it; fp32 on CPUs
    languages: list[str] | None = None  # None: those of the data that the students were trained on
    max_train: int | None = None  # at most this many examples, from the start of the file; None: all
    max_evaluation: int | None = None  # at most this many examples of each language; None: all

    @property
    def name(self) -> str:
        """The name of the task: the section of its settings."""
        return type(self).__name__.removesuffix("Config").lower()

    def __post_init__(self) -> None:
        name = self.name
        if self.max_length < 8:
            raise UserError(f"{name}.max_length is {self.max_length}; two texts need at least 8 tokens")
        if not self.learning_rates or not self.seeds or min(self.learning_rates) <= 0:
            raise UserError(f"{name}.learning_rates and {name}.seeds need at least one entry, and rates above 0")
        if not 0 <= self.warmup_share < 1 or self.weight_decay < 0:
            raise UserError(f"{name}.warmup_share must be in [0, 1), and {name}.weight_decay must not be negative")
        limits = {"learning_rates": (0, 1e3), "seeds": (0, 2**32 - 1), "epochs": (1, 10**6), "weight_decay": (0, 1e3)}
        batches = dict.fromkeys(("batch", "micro_batch"), (1, LARGEST_BATCH))
        most = dict.fromkeys(("max_train", "max_evaluation"), (1, LARGEST_INT))
        check_ranges(self, name, {**limits, **batches, **most, "max_length": (8, LONGEST_ROW)})


@dataclass(frozen=True)
class FinetuneTask:
    """What a task adds to the loop."""

    load: Callable[[], Any]  # the model with a new head; torch is seeded before
    rows: TokenRows
    loss: Callable[[Any, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]  # (outputs, inputs, targets) -> sum
    score: Callable[[Any, str], Scores]  # (model in eval mode, "dev" or "test")
    pad_id: int
    about: Mapping[str, Any] = field(default_factory=dict)  # facts about encoder and data that the results contain


@dataclass(frozen=True)
class GridPoint:
    """One point of the grid; its text is the name of its directory."""

    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"lr{self.learning_rate:g}-seed{self.seed}"


def load_with_head(head: Any, encoder: Encoder, **settings: Any) -> Any:
    """The encoder with a new head of a Hugging Face class."""
    return with_head(head, encoder.model, encoder.path, **settings).to(encoder.device)


def finetune(
    task: FinetuneTask, config: FinetuneConfig, point: GridPoint, directory: Path, ranks: Launch, label: str
) -> dict[str, Any]:
    """Train all epochs, or those that are missing in `directory`, and score the best one on the test languages."""
    torch.manual_seed(point.seed)
    model = task.load()
    adam = torch.optim.AdamW(
        parameter_groups(dict(model.named_parameters()), config.weight_decay), lr=point.learning_rate
    )
    best: checkpoint.Weights = {}
    state: dict[str, Any] = {"step": 0, "epochs": [], "best": 0}  # and in fp16 "skipped" steps and "scaler"
    if resumed := checkpoint.resume(directory, model, adam, ranks):
        best, state = resumed
    training = _Training(task, config, point, model, adam, ranks)
    if "scaler" in state:
        training.scaler.load_state_dict(state["scaler"])
    bar = Progress(f"{label} {point}", training.steps, "step", state["step"], ranks.is_main)
    for epoch in range(len(state["epochs"]), config.epochs):
        loss, skipped = training.train_epoch(epoch, bar)
        dev = training.score("dev")
        state["epochs"].append({"loss": loss, "dev": dev, "dev_mean": mean_of(dev)})
        state["step"] += training.steps_per_epoch
        if training.scaler.is_enabled():
            state |= {"skipped": state.get("skipped", 0) + skipped, "scaler": training.scaler.state_dict()}
        if epoch == 0 or mean_of(dev) > state["epochs"][state["best"]]["dev_mean"]:
            best, state["best"] = checkpoint.weights_of(model), epoch
        if ranks.is_main:
            checkpoint.save(directory, model, adam, best, state)
        ranks.barrier()
    bar.close()
    checkpoint.put_weights(model, best)
    return {
        "learning_rate": point.learning_rate,
        "seed": point.seed,
        "best_epoch": state["best"] + 1,
        "dev_mean": state["epochs"][state["best"]]["dev_mean"],
        "dev": state["epochs"][state["best"]]["dev"],
        "test": training.score("test"),
        "epochs": [{"loss": epoch["loss"], "dev_mean": epoch["dev_mean"]} for epoch in state["epochs"]],
        **({"about": dict(task.about)} if task.about else {}),
    }


def mean_of(scores: Scores) -> float:
    """Mean over languages of the first measure."""
    return sum(next(iter(measures.values())) for measures in scores.values()) / len(scores)


@dataclass(frozen=True)
class _Training:
    """One grid point in training, on one rank."""

    task: FinetuneTask
    config: FinetuneConfig
    point: GridPoint
    model: Any
    adam: torch.optim.Optimizer
    ranks: Launch

    @cached_property
    def precision(self) -> ForwardPrecision:
        return forward_precision(self.config.precision, self.config.name, self.model.device)

    @cached_property
    def scaler(self) -> torch.amp.GradScaler:
        return self.precision.scaler()

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.task.rows) / self.config.batch)

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @torch.inference_mode()
    def score(self, split: str) -> Scores:
        self.model.eval()
        with self.precision.autocast():
            return self.task.score(self.model, split)

    def train_epoch(self, epoch: int, bar: Progress) -> tuple[float, int]:
        """Mean loss of the epoch, and the number of steps that fp16 skipped while it looked for its loss scale.

        Row order and dropout follow from seed and epoch, so an epoch can be repeated.
        """
        self.model.train()
        rows, seed = self.task.rows, self.point.seed * 1009 + epoch
        rates = OptimizerConfig(lr=self.point.learning_rate, warmup_steps=int(self.config.warmup_share * self.steps))
        torch.manual_seed(seed * 65537 + self.ranks.rank)
        order = torch.Generator().manual_seed(seed)
        total, skipped = torch.zeros(1, dtype=torch.float64, device=self.model.device), 0
        for number, batch in enumerate(global_batches(len(rows), self.config.batch, order)):
            step = epoch * self.steps_per_epoch + number
            total += self._gradients(batch) * (len(batch) / len(rows))
            self.scaler.unscale_(self.adam)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
            scale = self.scaler.get_scale()  # 1 except in fp16
            if not torch.isfinite(norm) and scale <= LOWEST_SCALE:
                raise DivergedRunError(
                    f"fine-tuning at {self.point}: the gradient is not finite at step {step + 1} of {self.steps}"
                )
            for group in self.adam.param_groups:
                group["lr"] = learning_rate(rates, step, self.steps)
            self.scaler.step(self.adam)  # changes nothing where a scaled gradient is not finite
            self.scaler.update()  # then lowers the scale
            skipped += self.scaler.get_scale() < scale
            self.adam.zero_grad()
            bar.update()
        return float(self.ranks.sum(total)), skipped

    def _gradients(self, batch: list[int]) -> torch.Tensor:
        """Put the gradients of the mean loss over one global batch on every rank. Returns this rank's part of that mean."""
        mine = batch[self.ranks.rank :: self.ranks.world_size]
        weight = 1.0 / len(batch)
        if not mine:  # the last batch of an epoch can have fewer rows than ranks: run one row with weight 0
            mine, weight = batch[:1], 0.0
        total = torch.zeros(1, dtype=torch.float64, device=self.model.device)
        for start in range(0, len(mine), self.config.micro_batch):
            micro = mine[start : start + self.config.micro_batch]
            inputs = self.task.rows.inputs(micro, self.task.pad_id, self.model.device)
            with self.precision.autocast():
                outputs = self.model(**inputs)
            loss = self.task.loss(outputs, inputs, self.task.rows.targets[micro].to(self.model.device)) * weight
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.ranks.world_size > 1:
            self._sum_gradients()
        return total

    def _sum_gradients(self) -> None:
        """Sum all gradients over the ranks in one collective. A parameter that the head does not use has no gradient on any rank."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        flat = self.ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
