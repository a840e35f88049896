"""Relation loss per language on held-out rows, which training never reads.

In: the distiller's loss of each row, a `BatchSource`. Out: the mean loss per language. All ranks call it together and
divide the rows among them. The result is the same on every rank and, up to summation order, for any number of ranks.
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
    counts = torch.tensor(source.heldout_counts)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts).to(rank.device)
    chunks = [(start, min(start + micro_batch, len(owner))) for start in range(0, len(owner), micro_batch)]
    totals = torch.zeros(2, len(source.languages), dtype=torch.float64, device=rank.device)
    for turn in range(-(-len(chunks) // rank.world_size)):
        number = turn * rank.world_size + rank.rank
        start, stop = chunks[number] if number < len(chunks) else chunks[0]
        segments = None if segments_BS is None else segments_BS[start:stop]
        losses = row_losses(input_ids_BL[start:stop].to(rank.device), segments=segments).double()
        progress()
        if number < len(chunks):
            totals[0].index_add_(0, owner[start:stop], losses)
            totals[1].index_add_(0, owner[start:stop], torch.ones_like(losses))
    rank.sum(totals)
    means = (totals[0] / totals[1]).tolist()
    return dict(zip(source.languages, means, strict=True))
