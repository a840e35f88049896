"""Relation loss per language on held-out rows, which training never reads.

In: the loss of each row by each student's distiller, a `BatchSource`. Out: the mean loss per language. All ranks call it together and
divide the rows among them. The result is the same on every rank and, given the loss of each row, for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pipeline.data.batches import BatchSource


class Rank(Protocol):
    """This process among the ranks: `Launch` of runtime/dist.py."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def sum(self, values: torch.Tensor) -> torch.Tensor: ...


def heldout_losses(
    row_losses: Sequence[Callable[..., torch.Tensor]],
    source: BatchSource,
    micro_batch: int,
    rank: Rank,
    progress: Callable[[], None],
) -> list[dict[str, float]]:
    """Mean relation loss per language, for each of several models.

    Every rank runs the same number of forwards, because ZeRO-3 gathers parameters inside them. A rank without a chunk of
    its own repeats the first one and drops the result.

    Args:
        row_losses: of each model, maps int64 [B, L] ids and `segments` (of a `Batch`) to the loss of each row, fp32 [B].
        source: the rows, of all its languages.
        micro_batch: rows of one forward.
        rank: which chunks this process computes, on which device, and the sum over the ranks, in place.
        progress: is called after every forward.
    """
    input_ids_BL, segments_BS = source.heldout_batch(source.languages)
    num_rows = len(input_ids_BL)
    chunks = [(start, min(start + micro_batch, num_rows)) for start in range(0, num_rows, micro_batch)]
    losses_MB = torch.zeros(len(row_losses), num_rows, dtype=torch.float64, device=rank.device)
    for turn in range(num_turns(source, micro_batch, rank)):
        number = turn * rank.world_size + rank.rank
        start, stop = chunks[number] if number < len(chunks) else chunks[0]
        segments = None if segments_BS is None else segments_BS[start:stop]
        chunk_BL = input_ids_BL[start:stop].to(rank.device)
        for model, losses_of in enumerate(row_losses):
            losses = losses_of(chunk_BL, segments=segments)
            progress()
            if number < len(chunks):
                losses_MB[model, start:stop] = losses
    rank.sum(losses_MB)  # each row was computed on one rank
    return [_by_language(losses_B, source) for losses_B in losses_MB.cpu()]


def num_turns(source: BatchSource, micro_batch: int, rank: Rank) -> int:
    """Number of forwards of each model on each rank: all chunks of `micro_batch` rows, divided among the ranks."""
    chunks = -(-sum(source.heldout_counts) // micro_batch)
    return -(-chunks // rank.world_size)


def _by_language(losses_B: torch.Tensor, source: BatchSource) -> dict[str, float]:
    of_languages = losses_B.split(source.heldout_counts)  # the same order of summation on every device
    return {name: losses.mean().item() for name, losses in zip(source.languages, of_languages, strict=True)}
