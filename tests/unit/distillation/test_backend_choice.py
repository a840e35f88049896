"""A backend that is wrong, or missing on this machine, is never used."""

from __future__ import annotations

import pytest
import torch

from pipeline.distillation import backend_choice, relations
from pipeline.distillation.backend_choice import choose_backend, gradient_error


def tensors(dtype=torch.float32):
    return torch.randn(2, 40, 32).to(dtype), torch.randn(2, 40, 24).to(dtype)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_right_backends_are_within_tolerance(dtype, near):
    limit = backend_choice.TOLERANCES[dtype] * (backend_choice.NEAR_FACTOR if near else 1)
    for name in relations.BACKENDS:
        assert gradient_error(name, *tensors(dtype), 4, near) <= limit


def test_a_wrong_backend_is_refused(monkeypatch):
    def wrong(*arguments):
        result = relations.chunked_relation(*arguments)
        if result.grad_queries_BLD is not None:
            result.grad_queries_BLD *= 1.001
        return result

    monkeypatch.setitem(relations.BACKENDS, "chunked", wrong)
    with pytest.raises(RuntimeError, match=r"(?s)no backend.*gradient error 1.0e-03 is over 1e-05"):
        choose_backend(*tensors(), 4)


def test_a_backend_that_rounds_too_coarsely_near_the_optimum_is_refused(monkeypatch):
    """Right for a student far from its teacher, useless for one that has nearly arrived."""

    def coarse(teacher_BLD, teacher_keys_BLD, student_BLD, student_keys_BLD, *arguments):
        result = relations.chunked_relation(teacher_BLD, teacher_keys_BLD, student_BLD, student_keys_BLD, *arguments)
        if result.grad_queries_BLD is not None:
            result.grad_queries_BLD += 3e-6 * student_BLD
        return result

    monkeypatch.setitem(relations.BACKENDS, "chunked", coarse)
    assert gradient_error("chunked", *tensors(), 4) < backend_choice.TOLERANCES[torch.float32]
    with pytest.raises(RuntimeError, match="no backend"):
        choose_backend(*tensors(), 4)


def test_a_missing_kernel_is_passed_over(monkeypatch):
    def missing(*arguments):
        raise RuntimeError("no kernel here")

    monkeypatch.setitem(relations.BACKENDS, "chunked", missing)
    with pytest.raises(RuntimeError, match=r"(?s)chunked: not usable here \(no kernel here\)"):
        choose_backend(*tensors(), 4)


def test_the_choice_is_the_same_at_every_start_and_leaves_randomness_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    teacher, student = torch.zeros(2, 40, 32), torch.zeros(2, 40, 24)
    assert choose_backend(teacher, student, 4) == choose_backend(teacher, student, 4)
    assert torch.equal(torch.rand(2), expected)
