"""Relation loss per language on rows that training never sees.

In: the distiller, the held-out rows of a `BatchSource`. Out: mean loss per language. All ranks call it together and
share the rows out among them; the result is the same on every rank and, up to summation order, for any rank count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.data.batches import BatchSource


def heldout_losses(
    row_losses: Callable[..., torch.Tensor],
    source: BatchSource,
    micro_batch: int,
    rank: int,
    world_size: int,
    device: torch.device,
    progress: Callable[[], None],
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Mean relation loss per language.

    `row_losses` maps int64 `[B, L]` ids and `segments` (a `Batch`'s) to the loss of each row, fp32 `[B]`. Every rank
    runs the same number of forwards, because ZeRO-3 gathers parameters inside them: where chunks run out, a rank
    repeats the first and drops the result.
    """
    input_ids_BL, segments_BS = source.heldout_batch(source.languages)
    counts = torch.tensor(source.heldout_counts)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)
    chunks = [(start, min(start + micro_batch, len(owner))) for start in range(0, len(owner), micro_batch)]
    totals = torch.zeros(2, len(source.languages), dtype=torch.float64, device=device)
    for turn in range(-(-len(chunks) // world_size)):
        number = turn * world_size + rank
        start, stop = chunks[number] if number < len(chunks) else chunks[0]
        segments = None if segments_BS is None else segments_BS[start:stop]
        losses = row_losses(input_ids_BL[start:stop].to(device), segments=segments).double()
        progress()
        if number < len(chunks):
            totals[0].index_add_(0, owner[start:stop], losses)
            totals[1].index_add_(0, owner[start:stop], torch.ones_like(losses))
    sum_over_ranks(totals)
    means = (totals[0] / totals[1]).tolist()
    return dict(zip(source.languages, means, strict=True))
