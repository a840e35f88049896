"""The `triton` backend's kernels in Triton's interpreter, against the float64 reference.

`test_triton_backend.py` runs this file in a process of its own, because TRITON_INTERPRET must be set before Triton is
imported. The interpreter is slow (about 30 ms per block of a tile), so shapes are the smallest with several tiles. It has
no bf16.
"""

from __future__ import annotations

import logging

import pytest
import torch

from pipeline.distillation.relations import fused, relation_kl
from pipeline.distillation.relations.selection import FAR, NEAR, gradient_error
from pipeline.errors import UserError
from tests.host_reads import HostReads
from tests.unit.distillation.relation_cases import errors, loss_and_gradient, make

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3}
LONG = {torch.float32: 48, torch.float16: 80}  # two tiles, the second one not full
pytestmark = pytest.mark.parametrize("dtype", LIMITS, ids=str)


@pytest.mark.parametrize("layout", ["full rows", "padded rows", "segments"])
@pytest.mark.parametrize("head_dims", [(16, 6), (8, 8), (16, 8), (24, 12), (64, 64)], ids=str)
def test_triton_agrees_with_the_reference(head_dims, layout, dtype):
    length = LONG[dtype]
    teacher, student = make(
        2, length, *(2 * head_dim for head_dim in head_dims), dtype, scale=0.6 if head_dims[0] == 64 else 1
    )
    given = {
        "full rows": {},
        "padded rows": {"lengths": torch.tensor([length, 20])},
        "segments": {"segments": [[length - 20, 20], [1, 7, 33]]},
    }
    loss_error, gradient_error, loss = errors(teacher, [student], 2, backend="triton", **given[layout])
    assert 0.1 < loss < 3
    assert loss_error < 1e-6
    assert gradient_error <= LIMITS[dtype]


def test_triton_near_the_optimum(dtype):
    teacher, student = make(1, LONG[dtype], 16, 16, dtype, scale=2.0, distance=0.085)
    _, gradient_error, loss = errors(teacher, [student], 2, backend="triton")
    assert 0.003 < loss < 0.03
    assert gradient_error <= {torch.float32: 5e-6, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("where", [FAR, NEAR])
def test_triton_passes_the_check_of_the_first_batch(where, dtype):
    """With room: the check's own limits are wider for both precisions."""
    like_BLD = torch.empty(1, LONG[dtype], 16, dtype=dtype)
    limit = {torch.float32: {FAR: 1e-6, NEAR: 5e-6}, torch.float16: {FAR: 1e-3, NEAR: 1e-3}}[dtype][where]
    assert gradient_error("triton", like_BLD, like_BLD, 2, where) <= limit


@pytest.mark.parametrize("outliers", ["teacher", "student", "both", "one token"])
def test_triton_with_outliers(outliers, dtype):
    """Logits beyond the fixed shift's limit: the kernels then use row maxima."""
    teacher, student = make(2, LONG[dtype], 32, 24, dtype)
    if outliers == "one token":
        teacher[0, 3, :8] *= 100
        student[0, 3, :6] *= 100
    else:
        teacher = teacher * (12 if outliers != "student" else 1)
        student = student * (12 if outliers != "teacher" else 1)
    loss_error, gradient_error, _ = errors(teacher, [student], 4, torch.tensor([LONG[dtype], 40]), backend="triton")
    assert loss_error < 1e-5
    assert gradient_error <= {torch.float32: 2e-5, torch.float16: 2e-3}[dtype]


def test_triton_twice_is_bit_for_bit_the_same_and_padding_changes_nothing(dtype):
    teacher, student = make(2, LONG[dtype], 16, 12, dtype)
    lengths = torch.tensor([11, 40])
    first, second = (loss_and_gradient(relation_kl, teacher, [student], 2, lengths, backend="triton") for _ in range(2))
    teacher[0, 11:], student[0, 11:] = 50.0, -50.0
    third = loss_and_gradient(relation_kl, teacher, [student], 2, lengths, backend="triton")
    for loss, gradient in (second, third):
        assert loss == first[0]
        assert torch.equal(gradient, first[1])
    assert torch.count_nonzero(first[1].view(2, -1, 12)[0, 11:]) == 0


def test_triton_reads_nothing(dtype):
    """The interpreter computes outside torch, so this counts the host's part only."""
    teacher, student = make(2, 20, 16, 12, dtype)
    student.requires_grad_()
    with HostReads() as reads:
        for layout in ({}, {"lengths_B": torch.tensor([20, 11])}, {"segments": [[12, 8], [7, 1]]}):
            relation_kl(teacher, student, 2, backend="triton", **layout).backward()
    assert reads.count == 0


def test_triton_serves_training_after_inference_mode(dtype):
    teacher, student = make(1, 21, 16, 12, dtype)
    with torch.inference_mode():
        first = relation_kl(teacher, student, 2, backend="triton").item()
    assert loss_and_gradient(relation_kl, teacher, [student], 2, backend="triton")[0] == first


def test_triton_does_not_hide_a_nan(dtype):
    teacher, student = make(1, 40, 16, 16, dtype)
    student[0, 3, 2] = float("nan")
    loss, gradient = loss_and_gradient(relation_kl, teacher, [student], 2, backend="triton")
    assert loss != loss
    assert gradient.isnan().any()


def test_triton_with_a_teacher_of_another_precision(dtype):
    teacher, student = make(1, 40, 16, 12)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    loss_error, gradient_error, _ = errors(teacher.to(other), [student.to(dtype)], 2, backend="triton")
    assert loss_error < 1e-6
    assert gradient_error <= LIMITS[dtype]


def test_triton_leaves_relations_of_two_tensors_to_another_backend(dtype, caplog):
    fused._report_pairs.cache_clear()
    teacher, student = make(1, 40, 16, 12, dtype)
    of_teacher, of_student = (teacher, teacher.flip(1)), [student, student.flip(1)]
    with caplog.at_level(logging.WARNING):
        mine, again = (loss_and_gradient(relation_kl, of_teacher, of_student, 2, backend="triton") for _ in range(2))
    other = {torch.float32: "chunked", torch.float16: "flash"}[dtype]
    theirs = loss_and_gradient(relation_kl, of_teacher, of_student, 2, backend=other)
    assert mine[0] == again[0] == theirs[0]
    assert torch.equal(mine[1], theirs[1])
    assert [record.message for record in caplog.records] == [
        f"relation backend triton: relations of two tensors, such as q-k, are computed by `{other}`"
    ]


def test_triton_names_what_it_cannot_compute(dtype):
    teacher, student = make(1, 40, 16, 12, dtype)
    with pytest.raises(UserError, match=r"have no float64.*set `relations.backend`"):
        relation_kl(teacher, student.double(), 2, backend="triton")
    with pytest.raises(UserError, match="interpreter has no bfloat16"):
        relation_kl(teacher.bfloat16(), student, 2, backend="triton")
    wide = torch.zeros(1, 4, 129, dtype=dtype)
    with pytest.raises(UserError, match=r"129 channels.*128"):
        relation_kl(wide, wide, 1, backend="triton")
