"""The choice of a backend on the first batch: one that is wrong or missing on this machine is never used."""

from __future__ import annotations

import itertools

import pytest
import torch

from pipeline.distillation.relations.backends import BACKENDS, NotUsableHereError
from pipeline.distillation.relations.chunked import chunked_relation
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.distillation.relations.selection import (
    DIAGONALS,
    FAR,
    NEAR,
    NEAR_KL,
    TOLERANCES,
    check_pair,
    choose_backend,
    fastest_of_all,
    gradient_error,
)
from pipeline.errors import UserError


def tensors(dtype=torch.float32):
    return torch.randn(2, 40, 32).to(dtype), torch.randn(2, 40, 24).to(dtype)


LENGTHS_AND_HEAD_DIMS = [*itertools.product((32, 128), (1, 6, 16, 24, 64, 96, 384)), (512, 1), (512, 8), (512, 128)]


@pytest.mark.parametrize("where", TOLERANCES)
@pytest.mark.parametrize("dtype", TOLERANCES[FAR], ids=str)
def test_chunked_is_correct_for_every_head_size_and_length(dtype, where):
    """A check that gets harder with the head size would reject valid runs."""
    for length, head_dim in LENGTHS_AND_HEAD_DIMS:
        like_BLD = torch.empty(1, length, 2 * head_dim, dtype=dtype)
        error = gradient_error("chunked", like_BLD, like_BLD, 2, where)
        assert error <= TOLERANCES[where][dtype], (length, head_dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", TOLERANCES)
def test_flash_is_correct_in_half_precision(dtype, where):
    for head_dim in (6, 16, 96):
        like_BLD = torch.empty(1, 128, 2 * head_dim, dtype=dtype)
        assert gradient_error("flash", like_BLD, like_BLD, 2, where) <= TOLERANCES[where][dtype], head_dim


@pytest.mark.parametrize(("length", "head_dim"), [(128, 8), (128, 384), (512, 64)])
def test_the_check_is_as_hard_for_every_head_size(length, head_dim):
    losses = {where: relation_kl_reference(*check_pair(where, length, 2, head_dim, head_dim), 2) for where in DIAGONALS}
    assert 0.8 < losses[FAR] < 1.2
    assert losses[NEAR] == pytest.approx(NEAR_KL, rel=0.05)


def test_a_wrong_backend_is_rejected(monkeypatch):
    def wrong(inputs, with_gradient):
        result = chunked_relation(inputs, with_gradient)
        if result.grad_queries_BLD is not None:
            result.grad_queries_BLD *= 1.001
        return result

    monkeypatch.setitem(BACKENDS, "chunked", wrong)
    with pytest.raises(UserError, match=r"no backend.*error 1.0e-03 far from the teacher is over 1e-06") as caught:
        choose_backend(*tensors(), 4)
    assert "\n" not in str(caught.value)
    assert "relations.backend: chunked" in str(caught.value)


def test_a_backend_that_rounds_too_coarsely_near_the_optimum_is_rejected(monkeypatch):
    """It is correct for a student far from its teacher, and wrong for one close to it."""

    def coarse(inputs, with_gradient):
        result = chunked_relation(inputs, with_gradient)
        if result.grad_queries_BLD is not None:
            result.grad_queries_BLD += 4.4e-7 * inputs.student_BLD
        return result

    monkeypatch.setitem(BACKENDS, "chunked", coarse)
    assert gradient_error("chunked", *tensors(), 4, FAR) < TOLERANCES[FAR][torch.float32]
    with pytest.raises(UserError, match="close to the teacher is over 1e-05"):
        choose_backend(*tensors(), 4)


@pytest.mark.parametrize("error", [RuntimeError("no kernel here"), NotUsableHereError("chunked", "no kernel here")])
def test_a_backend_without_a_kernel_is_skipped(monkeypatch, error):
    def missing(*arguments):
        raise error

    monkeypatch.setitem(BACKENDS, "chunked", missing)
    with pytest.raises(UserError, match=r"chunked: not usable here \(no kernel here\)"):
        choose_backend(*tensors(), 4)


@pytest.mark.parametrize(
    ("seconds_of_ranks", "best"),
    [
        ([{"chunked": 2.0, "flash": 1.0}], "flash"),
        ([{"chunked": 2.0, "flash": 1.0}, {"chunked": 2.0, "flash": 3.0}], "chunked"),
        ([{"chunked": 2.0, "flash": 1.0}, {"chunked": 2.0}], "chunked"),
        ([{"flash": 1.0}, {"chunked": 2.0}], None),
        ([{}, {}], None),
    ],
)
def test_ranks_make_one_choice(seconds_of_ranks, best):
    """The choice does not depend on which rank makes it, and is a backend that all of them have."""
    assert fastest_of_all(seconds_of_ranks) == best
    assert fastest_of_all(seconds_of_ranks[::-1]) == best


def test_a_backend_that_another_rank_lacks_is_not_chosen():
    with pytest.raises(UserError, match="on every rank"):
        choose_backend(*tensors(), 4, gather=lambda found: [found, {}])


def test_the_choice_is_the_same_at_every_start_and_leaves_randomness_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    teacher, student = torch.zeros(2, 40, 32), torch.zeros(2, 40, 24)
    assert choose_backend(teacher, student, 4) == choose_backend(teacher, student, 4)
    assert torch.equal(torch.rand(2), expected)
