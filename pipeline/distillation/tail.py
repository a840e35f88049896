"""The terms of the loss that read the two models' outputs: `relations.tail`.

In: both last hidden states and the batch's `SequenceMask`. Out: one loss per term. `relation` and `mse` compare token by
token. `pooled` compares sentence vectors: of each document where `documents: separate` keeps documents apart, else of
each row. Equations: docs/method.md.

Shape suffixes: B rows, L positions, D channels (d: of a narrower student), S documents of a row, N sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from pipeline.distillation.config import RelationsConfig
from pipeline.distillation.documents import SequenceMask
from pipeline.distillation.relations.backends import working_dtype
from pipeline.distillation.relations.loss import relation_kl
from pipeline.errors import UserError

OUTPUT, POOLED = "output", "pooled"  # names of the terms among the parts of the loss
GatherRows = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def own_rows(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """The rows of all ranks, if there is only one."""
    return [rows]


class SentenceProjection(nn.Module):
    """The learned matrix W [D, d] that maps a narrower (or wider) student's sentence vectors to the teacher's width."""

    def __init__(self, weight_Dd: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_Dd.clone())

    def forward(self, vectors_Nd: torch.Tensor) -> torch.Tensor:
        return vectors_Nd @ self.weight.to(vectors_Nd.dtype).T


def sentence_projection(
    relations: RelationsConfig, widths: tuple[int, int], seed: int, basis_Dd: torch.Tensor | None = None
) -> SentenceProjection | None:
    """The projection of a student before its first step; None where none is needed.

    Args:
        widths: of the last hidden states of teacher and student
        seed: of a random start
        basis_Dd: the components on which a projected student began, from which the projection then starts too
    """
    shape = projection_shape(relations, *widths)
    if shape is None:
        return None
    if basis_Dd is None:
        basis_Dd = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
    return SentenceProjection(basis_Dd)


def projection_shape(relations: RelationsConfig, teacher: int, student: int) -> tuple[int, int] | None:
    """[D, d] of the learned projection between these widths; None where there is none."""
    return (teacher, student) if relations.compares_sentences and teacher != student else None


class Tail(nn.Module):
    """The terms that `config.tail` names. Its only parameters are those of the projection.

    Args:
        basis_Dd: the components on which a projected student's output is expressed (`Student.basis_Dd`), for `mse`
        projection: of sentence vectors, where the widths differ (`Student.projection`)
        gather_rows: all ranks' rows of a tensor [n, ...], in rank order; this rank's are the tensor itself, with its graph
    """

    def __init__(
        self,
        config: RelationsConfig,
        basis_Dd: torch.Tensor | None = None,
        projection: SentenceProjection | None = None,
        gather_rows: GatherRows = own_rows,
    ) -> None:
        super().__init__()
        if POOLED in config.tail_terms and config.pooling == "auto":
            raise ValueError("`pooling: auto` is resolved from the teacher's files before the loss is built")
        self.config, self.projection, self._gather_rows = config, projection, gather_rows
        self.basis_Dd = basis_Dd  # not a buffer: an engine in half precision would round it

    def losses(
        self, teacher_BLD: torch.Tensor, student_BLd: torch.Tensor, mask: SequenceMask, backend: str
    ) -> list[torch.Tensor]:
        """One loss per term, in the order of `config.tail_terms`. `backend`: of the relation loss."""
        losses = []
        for term in self.config.tail_terms:
            if term == "relation":
                heads, options = self.config.heads, mask.of_relations()
                losses.append(relation_kl(teacher_BLD, student_BLd, heads, backend=backend, **options))
            elif term == "mse":
                losses.append(self._squared_distance(teacher_BLD, student_BLd, mask))
            else:
                losses.append(self._pooled(teacher_BLD, student_BLd, mask))
        return losses

    def _squared_distance(
        self, teacher_BLD: torch.Tensor, student_BLd: torch.Tensor, mask: SequenceMask
    ) -> torch.Tensor:
        """Mean squared distance of the outputs, token by token."""
        target_BLD = teacher_BLD.float()
        if self.basis_Dd is not None:
            self.basis_Dd = self.basis_Dd.to(target_BLD.device)
            target_BLD = target_BLD @ self.basis_Dd
        if target_BLD.shape != student_BLd.shape:
            raise UserError(unequal_widths(teacher_BLD.shape[-1], student_BLd.shape[-1]))
        distance_BL = (student_BLd.float() - target_BLD).square().mean(-1)
        real_BL = mask.real_tokens(distance_BL)
        if real_BL is None:
            return distance_BL.mean()
        return ((distance_BL * real_BL).sum(1) / real_BL.sum(1).clamp(min=1)).mean()

    def _pooled(self, teacher_BLD: torch.Tensor, student_BLd: torch.Tensor, mask: SequenceMask) -> torch.Tensor:
        """The distance of the sentence vectors, in fp32 (float64 for float64 outputs)."""
        lengths_BS = document_lengths(teacher_BLD, mask)
        share_BS = sentence_shares(lengths_BS, self.config.pooling)
        pool_BSL = pooling_matrix(lengths_BS, teacher_BLD.shape[1], self.config.pooling)
        dtype = working_dtype(student_BLd.dtype)
        teacher_ND, student_Nd = (
            (pool_BSL.to(dtype) @ x_BLD.to(dtype)).flatten(0, 1) for x_BLD in (teacher_BLD, student_BLd)
        )
        share_N = share_BS.flatten().to(dtype)
        if self.projection is not None:
            student_Nd = self.projection(student_Nd)
        if self.config.pooled_distance == "similarity":
            return self._over_all_ranks(teacher_ND, student_Nd, share_N)
        if teacher_ND.shape != student_Nd.shape:
            raise ValueError("the widths differ and there is no projection: pass `Student.projection`")
        if self.config.pooled_distance == "mse":
            distance_N = (student_Nd - teacher_ND).square().mean(-1)
        else:
            distance_N = 1 - (_unit(student_Nd) * _unit(teacher_ND)).sum(-1)
        return (share_N * distance_N).sum() / len(teacher_BLD)

    def _over_all_ranks(
        self, teacher_ND: torch.Tensor, student_Nd: torch.Tensor, share_N: torch.Tensor
    ) -> torch.Tensor:
        """`similarity_kl` over the sentences of all ranks: the same value on each rank, with the gradient of its own rows.

        Ranks average their gradients, and each rank's is that of its own sentences alone, so it counts once per rank.
        """
        together = torch.cat([_unit(teacher_ND), _unit(student_Nd), share_N[:, None]], dim=1)
        of_ranks = self._gather_rows(together)
        sizes = [teacher_ND.shape[1], student_Nd.shape[1], 1]
        teacher_MD, student_Md, share_M1 = torch.cat(list(of_ranks)).split(sizes, dim=1)
        loss = similarity_kl(teacher_MD, student_Md, share_M1[:, 0], self.config.pooled_temperature)
        return loss + (len(of_ranks) - 1) * (loss - loss.detach())


def document_lengths(like_BLD: torch.Tensor, mask: SequenceMask) -> torch.Tensor:
    """Tokens of each unit that has a sentence vector, [B, S] padded with 0: each document, or each row without padding."""
    batch, length, device = *like_BLD.shape[:2], like_BLD.device
    if mask.documents is not None:
        return mask.documents.segments_BS.to(device, non_blocking=True)
    if mask.lengths_B is not None:
        return mask.lengths_B.to(device)[:, None]
    return torch.full((batch, 1), length, device=device)


def sentence_shares(lengths_BS: torch.Tensor, pooling: str) -> torch.Tensor:
    """The weight of each sentence in its row's loss, [B, S]; they add up to 1 in each row, to 0 in a row of padding alone.

    A document counts by its share of the row's tokens, so that a fragment at a row's edge counts little. With `cls` the
    first document has all the weight: only a row begins with the start token.
    """
    if pooling == "cls":
        is_first_BS = functional.one_hot(torch.zeros_like(lengths_BS[:, 0]), lengths_BS.shape[1])
        return is_first_BS * (lengths_BS > 0).float()
    return lengths_BS / lengths_BS.sum(1, keepdim=True).clamp(min=1)


def pooling_matrix(lengths_BS: torch.Tensor, length: int, pooling: str) -> torch.Tensor:
    """The matrix [B, S, L] whose product with the hidden states is the sentence vectors. Rows of absent documents are 0."""
    ends_BS1 = lengths_BS.cumsum(1)[:, :, None]
    starts_BS1 = ends_BS1 - lengths_BS[:, :, None]
    place_L = torch.arange(length, device=lengths_BS.device)
    inside_BSL = (place_L >= starts_BS1) & (place_L < ends_BS1)
    if pooling == "mean":
        return inside_BSL / lengths_BS.clamp(min=1)[:, :, None]
    token_BS1 = starts_BS1 if pooling == "cls" else ends_BS1 - 1
    return (inside_BSL & (place_L == token_BS1)).float()


def similarity_kl(
    teacher_ND: torch.Tensor, student_Nd: torch.Tensor, share_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean KL divergence of each sentence's distribution over the other sentences, from teacher to student.

    Args:
        teacher_ND, student_Nd: unit vectors
        share_N: the weight of each sentence; one of weight 0 is no sentence
        temperature: by which cosines are divided before the softmax
    """
    absent_N = share_N == 0
    itself_NN = torch.eye(len(share_N), dtype=torch.bool, device=share_N.device)
    excluded_NN = absent_N[None, :] | itself_NN
    lowest = torch.finfo(teacher_ND.dtype).min / 2  # finite: a sentence without others must not give NaN
    log_T, log_S = (
        (x @ x.T / temperature).masked_fill(excluded_NN, lowest).log_softmax(-1) for x in (teacher_ND, student_Nd)
    )
    kl_N = (log_T.exp() * (log_T - log_S)).masked_fill(excluded_NN, 0.0).sum(-1)
    return (share_N * kl_N).sum() / share_N.sum().clamp(min=1)


def _unit(x_ND: torch.Tensor) -> torch.Tensor:
    return functional.normalize(x_ND, dim=-1)


def unequal_widths(teacher: int, student: int) -> str:
    """The message about a tail term whose outputs cannot be subtracted."""
    return (
        f"`relations.tail: mse` needs equal widths, not {teacher} (teacher) and {student} (student), or a student whose layers "
        "are projected (`student.init: project`); use `tail: relation`, or `tail: pooled`, which learns a projection"
    )
