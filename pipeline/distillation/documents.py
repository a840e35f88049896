"""Padding, and several documents in one row: which tokens see each other, and at which positions they are.

In: the lengths of rows and of their documents. Out: what an encoder requires so that no token sees another document: position ids, and
a block-diagonal mask, or `DocumentAttention`, with which attention computes each document as it computes a row of its own.

Shape suffixes: B rows, L positions of a row, S documents of a row, H attention heads, d channels per head, T = B L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# What transformers and torch ask a mask for before they attend with it.
_ABOUT_ITS_SHAPE = {
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    *(torch.Tensor.dim, torch.Tensor.size),
}


@dataclass
class Documents:
    """The documents of a batch's rows, in place of the attention mask of a tap.

    Args:
        segments_BS: lengths of each row's documents, in order, padded with 0; best on the host. What follows the last
            document of a row is padding.
        restart_positions: whether each document's first token has the model's first position. False: positions are
            counted along the row.
    """

    segments_BS: torch.Tensor
    restart_positions: bool = False

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Of each row's documents. They are read once per batch, and from the host, without waiting for a GPU."""
        return [[length for length in row if length] for row in self.segments_BS.tolist()]

    def real_tokens(self, like_BL: torch.Tensor) -> torch.Tensor:
        """1 at real tokens, 0 at padding, int64 [B, L]."""
        return _are_real(self.segments_BS.sum(1), like_BL)

    def mask(self, like_BL: torch.Tensor) -> torch.Tensor:
        """True where two tokens are of one document, bool [B, 1, L, L]."""
        document_BL = self._numbers(like_BL)
        return (document_BL[:, :, None] == document_BL[:, None, :])[:, None]

    def added_mask(self, like_BL: torch.Tensor, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
        """The same as numbers to add to logits, [B, 1, L, L]; with `window`, also between tokens farther apart -inf."""
        seen_B1LL = self.mask(like_BL)
        if window is not None:
            seen_B1LL &= near(like_BL.shape[1], window, like_BL.device)
        return torch.zeros_like(seen_B1LL, dtype=dtype).masked_fill_(~seen_B1LL, float("-inf"))

    def positions(self, like_BL: torch.Tensor) -> torch.Tensor:
        """Each token's place in its document, counted from 0, int64 [B, L]."""
        ends_BS = self._ends(like_BL)
        starts_BS = torch.cat([torch.zeros_like(ends_BS[:, :1]), ends_BS], 1)
        return torch.arange(like_BL.shape[1], device=like_BL.device) - starts_BS.gather(1, self._numbers(like_BL))

    def attention(self, like_BL: torch.Tensor, window: int | None = None) -> DocumentAttention:
        """Attention inside each document; with `window`, inside each document and at most so many tokens away."""
        length = like_BL.shape[1]
        sizes = [size for row in self.lengths for size in (*row, length - sum(row)) if size]
        runs = [(len(list(same)), size) for size, same in groupby(sizes)]
        return DocumentAttention.of(runs, torch.Size([len(like_BL), 1, length, length]), window)

    def _ends(self, like_BL: torch.Tensor) -> torch.Tensor:
        return self.segments_BS.to(like_BL.device, non_blocking=True).cumsum(1)

    def _numbers(self, like_BL: torch.Tensor) -> torch.Tensor:
        """Which document of its row each token is of, int64 [B, L]. Padding counts as one more."""
        places_BL = torch.arange(like_BL.shape[1], device=like_BL.device).expand_as(like_BL)
        return torch.searchsorted(self._ends(like_BL), places_BL.contiguous(), right=True)


@dataclass
class SequenceMask:
    """Which positions of a batch are real tokens, and which of them see each other. By default all do."""

    lengths_B: torch.Tensor | None = None
    documents: Documents | None = None

    def real_tokens(self, like_BL: torch.Tensor) -> torch.Tensor | None:
        """1 at real tokens, 0 at padding, [B, L]; None where all are real."""
        if self.documents is not None:
            return self.documents.real_tokens(like_BL)
        if self.lengths_B is None:
            return None
        return _are_real(self.lengths_B, like_BL)

    def of_encoders(self, input_ids_BL: torch.Tensor) -> torch.Tensor | Documents | None:
        """The mask of a tap: None, [B, L] int64, or the documents."""
        if self.documents is None:
            return self.real_tokens(input_ids_BL)
        return self.documents

    def of_relations(self) -> dict[str, Any]:
        """The same mask as arguments of `relation_kl`."""
        return {"lengths_B": self.lengths_B} if self.documents is None else {"segments": self.documents.lengths}


def _are_real(counts_B: torch.Tensor, like_BL: torch.Tensor) -> torch.Tensor:
    """1 at each row's first tokens, so many as it has, int64 [B, L]."""
    counts_B = counts_B.to(like_BL.device, non_blocking=True)
    return (torch.arange(like_BL.shape[1], device=like_BL.device) < counts_B[:, None]).long()


def near(length: int, window: int, device: torch.device | None = None) -> torch.Tensor:
    """True where two places of a row are at most `window` apart, bool [L, L]."""
    places_L = torch.arange(length, device=device)
    return (places_L[:, None] - places_L).abs() <= window


class DocumentAttention(torch.Tensor):
    """An attention mask [B, 1, L, L] without values, for `scaled_dot_product_attention`: it computes one document after the other.

    No pair of tokens of two documents is computed, and each document's result has the bits of a row of its own: a mask with
    values sums in another order. It can only be given to attention, as `torch.nn.attention.bias.CausalBias`.
    """

    runs: Sequence[tuple[int, int]]  # documents of all rows in order: so many after each other, of this length
    window: int
    _near_LL: torch.Tensor | None  # of the longest document; None: there is no window

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]], shape: torch.Size, window: int | None) -> DocumentAttention:
        """The mask of rows with these documents."""
        mask = torch.Tensor._make_subclass(cls, torch.zeros((), dtype=torch.bool).expand(shape))
        mask.runs, mask.window = runs, window or 0
        mask._near_LL = None if window is None else near(max(length for _, length in runs), window)
        return mask

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is scaled_dot_product_attention:
            return kwargs.pop("attn_mask")._attend(*args, **kwargs)
        if function is torch.Tensor.detach:  # hooks of ZeRO-3 detach every argument of a layer
            (mask,) = args
            return cls.of(mask.runs, mask.shape, None if mask._near_LL is None else mask.window)
        if function not in _ABOUT_ITS_SHAPE:
            raise RuntimeError(f"{cls.__name__} has no values: only attention can use it, not {function}")
        return super().__torch_function__(function, types, args, kwargs)

    def _attend(self, query_BHLd: Any, key_BHLd: Any, value_BHLd: Any, **options: Any) -> torch.Tensor:
        """The result of `scaled_dot_product_attention` with this mask."""
        pieces = [
            x_BHLd.transpose(1, 2).flatten(0, 1).split([count * length for count, length in self.runs])
            for x_BHLd in (query_BHLd, key_BHLd, value_BHLd)
        ]
        results = []
        for (count, length), *of_run in zip(self.runs, *pieces, strict=True):
            query, key, value = (x_THd.unflatten(0, (count, length)).transpose(1, 2) for x_THd in of_run)
            mask = None
            if self._near_LL is not None and length >= self.window:  # transformers: no mask in a shorter row
                mask = self._near_LL[None, None, :length, :length]
            result = scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
            results.append(result.transpose(1, 2).flatten(0, 1))
        return torch.cat(results).unflatten(0, (len(query_BHLd), -1)).transpose(1, 2)
