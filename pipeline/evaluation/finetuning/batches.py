"""Tokenized inputs and targets of a fine-tuning task, in batches that are padded to their longest row.

In: the output of a Hugging Face tokenizer. Out: the input tensors of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.evaluation.encoder import Encoder, pad_rows

TEXTS_PER_CALL = 1000  # the tokenizer's lists need many times the memory of the arrays that are kept


@dataclass
class TokenRows:
    """Row i: its token ids, its segment ids where the model has them (BERT), and its targets."""

    ids: list[np.ndarray]
    segments: list[np.ndarray]  # empty where the tokenizer returns none or the model has no embeddings for them
    targets: torch.Tensor  # int64 [rows, targets per row]

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, numbers: Sequence[int], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The model's keyword arguments for these rows."""
        input_ids, mask = pad_rows([self.ids[n].tolist() for n in numbers], pad_id, device)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if self.segments:
            inputs["token_type_ids"], _ = pad_rows([self.segments[n].tolist() for n in numbers], 0, device)
        return inputs


def known_segments(segments: list[np.ndarray], model_config: Any) -> list[np.ndarray]:
    """The tokenizer's segment ids if the model has an embedding for each; else an empty list, and the model uses 0 for all.

    RoBERTa bodies with BERT's tokenizer (klue/roberta, guwenbert) have one embedding, DistilBERT has none.
    """
    rows = getattr(model_config, "type_vocab_size", 0) or 0
    return segments if rows > max((int(row.max()) for row in segments if len(row)), default=0) else []


def tokenize_pairs(
    encoder: Encoder, first: Sequence[str], second: Sequence[str], targets: Sequence[int], max_length: int
) -> TokenRows:
    """Tokenize two texts per row. Where both together are too long, the longer one is cut first."""
    ids, segments = [], []
    for start in range(0, len(first), TEXTS_PER_CALL):
        stop = start + TEXTS_PER_CALL
        encoded = encoder.tokenizer(
            list(first[start:stop]), list(second[start:stop]), truncation=True, max_length=max_length
        )
        ids += [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]
        segments += [np.array(row, dtype=np.int8) for row in encoded.get("token_type_ids", [])]
    segments = known_segments(segments, encoder.model.config)
    return TokenRows(ids, segments, torch.tensor(targets, dtype=torch.int64).reshape(len(ids), -1))


def global_batches(num_rows: int, batch: int, order: torch.Generator) -> Iterator[list[int]]:
    """One epoch: row numbers in batches, every row once, in an order that depends only on the generator's seed."""
    numbers = torch.randperm(num_rows, generator=order).tolist()
    for start in range(0, num_rows, batch):
        yield numbers[start : start + batch]
