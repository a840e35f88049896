"""XNLI: fine-tune on English sentence pairs, then evaluate zero-shot in every language.

In: encoders, XNLI in an official layout. Out: per model the accuracy on each test language and their average, for the
learning rate and epoch that are best on the development pairs of all languages together (`grid.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from pipeline.evaluation.encoder import Encoder, batches_by_length
from pipeline.evaluation.finetuning.batches import TokenRows, tokenize_pairs
from pipeline.evaluation.finetuning.grid import run_grids
from pipeline.evaluation.finetuning.loop import FinetuneConfig, FinetuneTask, Scores, load_with_head
from pipeline.evaluation.finetuning.scores import score_card, score_panel, score_table
from pipeline.evaluation.finetuning.xnli_data import LABELS, LabelledPairs, XnliData, read_xnli
from pipeline.evaluation.languages import left_out_line
from pipeline.evaluation.task import Results, Task
from pipeline.runtime.dist import Launch


@dataclass
class XnliConfig(FinetuneConfig):
    """Where XNLI is. The defaults of the grid are those of the paper."""

    data: str = ""  # directory with the official files, or datasets:facebook/xnli
    train_language: str = "en"  # language of the training pairs


def read(config: XnliConfig) -> XnliData:
    """Read all pairs that the task needs."""
    return read_xnli(config.data, config.train_language, config.languages, config.max_train, config.max_evaluation)


def evaluate_xnli(encoders: list[Encoder], config: XnliConfig, ranks: Launch, directory: Path) -> Results:
    """Per model, the test accuracy of the chosen learning rate in per cent. All ranks call it together."""
    return run_grids(encoders, read(config), make_task, config, directory, ranks)


def make_task(encoder: Encoder, data: XnliData, config: XnliConfig, ranks: Launch) -> FinetuneTask:
    """Tokenize everything once, for all grid points."""

    def rows_of(pairs: LabelledPairs) -> TokenRows:
        return tokenize_pairs(encoder, pairs.first, pairs.second, pairs.labels, config.max_length)

    rows, pad_id = data.convert(rows_of), encoder.tokenizer.pad_token_id

    def score(model: Any, split: str) -> Scores:
        size = config.micro_batch
        return {x: {"accuracy": accuracy(model, of, pad_id, size, ranks)} for x, of in getattr(rows, split).items()}

    return FinetuneTask(
        load=lambda: load_with_head(AutoModelForSequenceClassification, encoder, num_labels=len(LABELS)),
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


def xnli_table(results: Results) -> str:
    """One row per model: accuracy per language and the average, and the chosen grid point."""
    first = next(iter(results.values()))
    title = f"XNLI accuracy in per cent, trained on {first['train_pairs']} pairs of {first['train_language']}"
    return score_table(title, "dev", results, lambda scores: f"{scores['accuracy']:8.1f}", [left_out_line(results)])


def _card(results: Results) -> str:
    first = next(iter(results.values()))
    about = f"Accuracy in per cent, after fine-tuning on {first['train_pairs']:,} pairs of {first['train_language']}."
    return f"{about}\n\n{score_card(results, {'accuracy': 'accuracy'})}"


PANEL = "XNLI accuracy in per cent, zero-shot but for the language of training"
TASK = Task(
    name="xnli",
    settings=XnliConfig,
    check=read,
    evaluate=evaluate_xnli,
    table=xnli_table,
    panels=lambda results: [score_panel(PANEL, results, "accuracy")],
    card=_card,
    shared=True,
    place=40,
)
