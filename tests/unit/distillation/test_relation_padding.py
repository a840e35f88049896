"""Padding, several documents in a row, and rows of a batch: which tokens count in the relation loss, and with which weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.distillation.relations import relation_kl, relation_kl_by_row
from pipeline.distillation.relations.reference import relation_kl_reference
from tests.unit.distillation.relation_cases import BACKENDS, errors, loss_and_gradient, make

aten = torch.ops.aten


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_a_segment_see_only_that_segment(backend):
    teacher, student = make(2, 50, 32, 24)
    segments = [[20, 30], [7, 1, 25]]
    loss_error, gradient_error, loss = errors(teacher, [student], 4, backend=backend, segments=segments)
    assert loss_error < 1e-5
    assert gradient_error < 1e-6
    by_hand = 0.0
    for row, parts in enumerate(segments):
        start = 0
        for size in parts:
            piece = slice(start, start + size)
            value = relation_kl_reference(teacher[row : row + 1, piece], student[row : row + 1, piece], 4)
            by_hand += value.item() * size / sum(parts) / 2
            start += size
    assert loss == pytest.approx(by_hand, rel=1e-9)


class AttentionPairs(TorchDispatchMode):
    """Counts the pairs of tokens for which `flash` computes attention, per head."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
            self.count += args[0].shape[0] * args[0].shape[2] ** 2
        return func(*args, **(kwargs or {}))


def test_separate_documents_cost_little_more_than_their_pairs():
    """Lengths as in a batch of 512 tokens; padded to the longest the pairs would be 2.9 times those that are needed."""
    segments = [[512], [300, 212], [40, 90, 120, 262], [500, 12], [256, 256], [129, 383], [64, 448], [30, 200, 282]]
    lengths = [length for parts in segments for length in parts]
    needed = 4 * sum(length**2 for length in lengths)
    assert 4 * len(lengths) * 512**2 > 2.9 * needed
    teacher, student = make(len(segments), 512, 8, 8)
    with AttentionPairs() as pairs:
        relation_kl(teacher, student.requires_grad_(), 1, backend="flash", segments=segments)
    assert needed < pairs.count < 1.35 * needed
    full = AttentionPairs()
    with full:
        relation_kl(teacher, student, 1, backend="flash")
    assert full.count == 4 * len(segments) * 512**2


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_dropped_exactly(backend):
    """Values at padded positions change neither loss nor gradient, and get no gradient."""
    teacher, student = make(2, 30, 32, 24)
    lengths = torch.tensor([30, 11])
    first = loss_and_gradient(relation_kl, teacher, [student], 4, lengths, backend=backend)
    teacher[1, 11:], student[1, 11:] = 50.0, -50.0
    second = loss_and_gradient(relation_kl, teacher, [student], 4, lengths, backend=backend)
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    gradient = second[1].view(2, 30, 24)
    assert torch.count_nonzero(gradient[1, 11:]) == 0
    assert torch.allclose(first[1], second[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[30, 0], [0, 12], [0, 0]])
def test_a_row_of_padding_alone_counts_as_zero(backend, counts):
    teacher, student = make(2, 30, 32, 24)
    teacher[[count == 0 for count in counts]] = math.nan  # nothing of such a row is used
    lengths = torch.tensor(counts)
    loss, gradient = loss_and_gradient(relation_kl, teacher, [student], 4, lengths, backend=backend)
    rows = [
        relation_kl_reference(t[None, :n], s[None, :n], 4).item() if n else 0.0
        for t, s, n in zip(teacher, student, counts, strict=True)
    ]
    assert loss == pytest.approx(sum(rows) / 2, rel=1e-5)
    for count, gradient_LD in zip(counts, gradient.view(2, 30, 24), strict=True):
        assert torch.count_nonzero(gradient_LD[:count]) == count * 24
        assert torch.count_nonzero(gradient_LD[count:]) == 0


def test_mean_over_rows_of_any_micro_batch_split():
    """Every row has the same weight in any split, which gradient accumulation relies on."""
    teacher, student = make(5, 30, 32, 24)
    lengths = torch.tensor([30, 11, 2, 25, 19])
    by_row = relation_kl_by_row(teacher, student, 4, lengths)
    assert by_row.shape == (5,)
    assert relation_kl(teacher, student, 4, lengths).item() == pytest.approx(by_row.mean().item(), rel=1e-6)
    for row in range(5):
        alone = relation_kl(teacher[row : row + 1], student[row : row + 1], 4, lengths[row : row + 1])
        assert alone.item() == pytest.approx(by_row[row].item(), rel=1e-5)
