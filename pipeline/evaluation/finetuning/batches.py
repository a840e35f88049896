"""Tokenised inputs of a fine-tuning task and what is to be predicted from each; batches padded to their longest row.

In: whatever a Hugging Face tokenizer returns. Out: the tensors that a model takes. Used by finetune.py, xnli.py and
mlqa.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.evaluation.encoder import Encoder, pad_rows

TEXTS_AT_ONCE = 1000  # the tokenizer's own lists are many times the size of the arrays that are kept


@dataclass
class TokenRows:
    """Row i: token ids, segment ids where the family has them (BERT), and its targets."""

    ids: list[np.ndarray]
    segments: list[np.ndarray]  # empty where the tokenizer gives none, or the model has no rows for them
    targets: torch.Tensor  # int64 [rows, targets per row]

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, numbers: Sequence[int], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
        """What the model is called with for these rows."""
        input_ids, mask = pad_rows([self.ids[n].tolist() for n in numbers], pad_id, device)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if self.segments:
            inputs["token_type_ids"], _ = pad_rows([self.segments[n].tolist() for n in numbers], 0, device)
        return inputs

    def chunks_by_length(self, size: int) -> list[list[int]]:
        """All row numbers in groups of alike length: little padding."""
        order = sorted(range(len(self)), key=lambda n: len(self.ids[n]))
        return [order[start : start + size] for start in range(0, len(order), size)]


def known_segments(segments: list[np.ndarray], model_config: Any) -> list[np.ndarray]:
    """The tokenizer's segment ids if the model has an embedding row for each, else none, which it takes for all 0.

    RoBERTa bodies with BERT's tokenizer (klue/roberta, guwenbert) have one row, DistilBERT none.
    """
    rows = getattr(model_config, "type_vocab_size", 0) or 0
    return segments if rows > max((int(row.max()) for row in segments if len(row)), default=0) else []


def tokenize_pairs(
    encoder: Encoder, first: Sequence[str], second: Sequence[str], targets: Sequence[int], max_length: int
) -> TokenRows:
    """Two texts a row, the longer one cut first where both together are too long."""
    ids, segments = [], []
    for start in range(0, len(first), TEXTS_AT_ONCE):
        stop = start + TEXTS_AT_ONCE
        encoded = encoder.tokenizer(
            list(first[start:stop]), list(second[start:stop]), truncation=True, max_length=max_length
        )
        ids += [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]
        segments += [np.array(row, dtype=np.int8) for row in encoded.get("token_type_ids", [])]
    segments = known_segments(segments, encoder.model.config)
    return TokenRows(ids, segments, torch.tensor(targets, dtype=torch.int64).reshape(len(ids), -1))


def global_batches(num_rows: int, batch: int, order: torch.Generator) -> Iterator[list[int]]:
    """One epoch: every row once, in an order that follows from the generator's seed alone."""
    numbers = torch.randperm(num_rows, generator=order).tolist()
    for start in range(0, num_rows, batch):
        yield numbers[start : start + batch]
