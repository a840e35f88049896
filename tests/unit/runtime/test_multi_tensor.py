"""Overflow check and norm of all gradients together: right values in a few operations."""

from __future__ import annotations

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.runtime.multi_tensor import TESTED_WITH, use_multi_tensor_checks


class Launches(TorchDispatchMode):
    """Counts operations: on a GPU each is at least one launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def optimizer(gradients):
    """The attributes of DeepSpeed's optimizer that the two methods read. Real one: tests/dist/test_checkpoint.py."""
    zero = types.SimpleNamespace(bit16_groups=[0], averaged_gradients={0: gradients}, device=torch.device("cpu"))
    zero.get_grad_norm_direct = zero.has_overflow_partitioned_grads_serial = None
    return zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_one_non_finite_element_anywhere_is_an_overflow(dtype, bad):
    gradients = [torch.full((n,), torch.finfo(dtype).max, dtype=dtype) for n in (5, 1, 9)]
    if bad is not None:
        gradients[1][0] = bad
    zero = optimizer([gradients[0], None, torch.empty(0, dtype=dtype), *gradients[1:]])
    assert use_multi_tensor_checks(zero, TESTED_WITH) is None
    assert zero.has_overflow_partitioned_grads_serial().tolist() == [bad is not None]


def test_a_rank_without_gradients_has_no_overflow():
    zero = optimizer([None])
    use_multi_tensor_checks(zero, TESTED_WITH)
    assert zero.has_overflow_partitioned_grads_serial().tolist() == [False]


def test_launches_do_not_grow_with_the_number_of_gradients():
    counts = []
    for number in (2, 200):
        zero = optimizer([torch.ones(3, dtype=torch.float16) for _ in range(number)])
        use_multi_tensor_checks(zero, TESTED_WITH)
        with Launches() as launches:
            zero.has_overflow_partitioned_grads_serial()
        counts.append(launches.count)
    assert counts[0] == counts[1] < 10


def test_another_deepspeed_keeps_its_own_methods_with_a_warning():
    zero = optimizer([])
    warning = use_multi_tensor_checks(zero, "0.20.0")
    assert warning is not None
    assert "DeepSpeed 0.20.0" in warning
    assert zero.get_grad_norm_direct is None
