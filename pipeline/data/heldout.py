"""Relation loss per language on held-out rows, which training never reads.

In: the distiller's loss of each row, a `BatchSource`. Out: the mean loss per language. All ranks call it together and
divide the rows among them. The result is the same on every rank and, given the loss of each row, for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
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
    row_losses: Callable[..., torch.Tensor],
    source: BatchSource,
    micro_batch: int,
    rank: Rank,
    progress: Callable[[], None],
) -> dict[str, float]:
    """Mean relation loss per language.

    Every rank runs the same number of forwards, because ZeRO-3 gathers parameters inside them. A rank without a chunk of
    its own repeats the first one and drops the result.

    Args:
        row_losses: maps int64 [B, L] ids and `segments` (of a `Batch`) to the loss of each row, fp32 [B].
        source: the rows, of all its languages.
        micro_batch: rows of one forward.
        rank: which chunks this process computes, on which device, and the sum over the ranks, in place.
        progress: is called after every forward.
    """
    input_ids_BL, segments_BS = source.heldout_batch(source.languages)
    num_rows = len(input_ids_BL)
    chunks = [(start, min(start + micro_batch, num_rows)) for start in range(0, num_rows, micro_batch)]
    losses_B = torch.zeros(num_rows, dtype=torch.float64, device=rank.device)
    for turn in range(-(-len(chunks) // rank.world_size)):
        number = turn * rank.world_size + rank.rank
        start, stop = chunks[number] if number < len(chunks) else chunks[0]
        segments = None if segments_BS is None else segments_BS[start:stop]
        losses = row_losses(input_ids_BL[start:stop].to(rank.device), segments=segments)
        progress()
        if number < len(chunks):
            losses_B[start:stop] = losses
    rank.sum(losses_B)  # each row was computed on one rank
    of_languages = losses_B.cpu().split(source.heldout_counts)  # the same order of summation on every device
    return {name: losses.mean().item() for name, losses in zip(source.languages, of_languages, strict=True)}
