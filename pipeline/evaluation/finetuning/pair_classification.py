"""Tasks that classify sentence pairs after fine-tuning, such as XNLI and PAWS-X: what both share.

In: encoders and `PairData`. Out: per model the accuracy on each test language and their average, for the learning rate and
epoch that are best on the development pairs of all languages together (`grid.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from data_prep.progress import progress
from pipeline.evaluation.encoder import Encoder, batches_by_length
from pipeline.evaluation.finetuning.batches import TokenRows, tokenize_pairs
from pipeline.evaluation.finetuning.grid import run_grids
from pipeline.evaluation.finetuning.labelled_pairs import LabelledPairs, PairData
from pipeline.evaluation.finetuning.loop import FinetuneConfig, FinetuneTask, Scores, load_with_head
from pipeline.evaluation.finetuning.scores import score_card, score_panel, score_table
from pipeline.evaluation.languages import language_notes
from pipeline.evaluation.tables import sentence
from pipeline.evaluation.task import OnHub, Results, Task
from pipeline.runtime.dist import Launch


@dataclass
class PairConfig(FinetuneConfig):
    """Where labelled pairs are."""

    data: str = ""  # directory with the official files, or datasets:NAME
    train_language: str = "en"  # language of the training pairs


def pair_task(title: str, settings: type[PairConfig], read: Callable[[Any], PairData], place: int) -> Task:
    """The task that fine-tunes on the pairs that `read` reads. `title`: its name in tables and plots."""

    def evaluate(encoders: list[Encoder], config: PairConfig, ranks: Launch, directory: Path) -> Results:
        return run_grids(encoders, read(config), make_task, config, directory, ranks)

    panel = f"{title} accuracy in per cent, zero-shot but for the language of training"
    return Task(
        name=settings().name,
        settings=settings,
        check=read,
        evaluate=evaluate,
        table=lambda results: pair_table(title, results),
        panels=lambda results: [score_panel(panel, results, "accuracy")],
        card=_card,
        on_hub=OnHub("text-classification", f"{title}, in per cent", {"accuracy": "accuracy"}),
        shared=True,
        place=place,
    )


def make_task(encoder: Encoder, data: PairData, config: PairConfig, ranks: Launch) -> FinetuneTask:
    """Tokenize everything once, for all grid points."""

    def rows_of(pairs: LabelledPairs) -> TokenRows:
        return tokenize_pairs(encoder, pairs.first, pairs.second, pairs.labels, config.max_length)

    rows, pad_id = data.convert(rows_of), encoder.pad_id

    def score(model: Any, split: str) -> Scores:
        size = config.micro_batch
        parts = progress(getattr(rows, split).items(), f"scoring {split}", "language", ranks.is_main)
        return {x: {"accuracy": accuracy(model, of, pad_id, size, ranks)} for x, of in parts}

    return FinetuneTask(
        load=lambda: load_with_head(AutoModelForSequenceClassification, encoder, num_labels=len(data.train.names)),
        rows=rows.train,
        loss=classification_loss,
        score=score,
        pad_id=pad_id,
    )


def classification_loss(outputs: Any, inputs: dict[str, torch.Tensor], targets_B1: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits.float(), targets_B1[:, 0], reduction="sum")


def accuracy(model: Any, rows: TokenRows, pad_id: int, size: int, ranks: Launch) -> float:
    """Accuracy in per cent. Rank r of n computes every n-th batch, starting with batch r."""
    right = torch.zeros(1, dtype=torch.float64, device=model.device)
    for chunk in batches_by_length(rows.ids, size)[ranks.rank :: ranks.world_size]:
        guesses = model(**rows.inputs(chunk, pad_id, model.device)).logits.argmax(dim=-1)
        right += (guesses == rows.targets[chunk, 0].to(model.device)).sum()
    return 100.0 * float(ranks.sum(right)) / len(rows)


def pair_table(title: str, results: Results) -> str:
    """One row per model: accuracy per language and the average, and the chosen grid point."""
    first = next(iter(results.values()))
    title = f"{title} accuracy in per cent, trained on {first['train_pairs']} pairs of {first['train_language']}"
    notes = [pairs_left_out_line(first), *language_notes(results)]
    return score_table(title, "dev", results, lambda scores: f"{scores['accuracy']:8.1f}", notes)


def pairs_left_out_line(result: dict[str, Any]) -> str:
    """How many test pairs have no translation or label; empty if none."""
    counts = ", ".join(f"{language} {count}" for language, count in result.get("pairs_left_out", {}).items())
    return f"test pairs left out, without translation or label: {counts}" if counts else ""


def _card(results: Results) -> str:
    first = next(iter(results.values()))
    about = f"Accuracy in per cent, after fine-tuning on {first['train_pairs']:,} pairs of {first['train_language']}."
    return "\n\n".join(
        filter(None, [about, score_card(results, {"accuracy": "accuracy"}), sentence(pairs_left_out_line(first))])
    )
