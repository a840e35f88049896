"""ZeRO-1 and -2: overflow check and gradient norm of all gradients in a few kernel launches.

DeepSpeed 0.19.8 checks each gradient separately: fifteen launches per tensor and step, 2 905 in all for XLM-R-large's
student, while the GPU waits. Multi-tensor norms compute both for all gradients: the largest magnitude is finite exactly where
every element is, and a sum of squares in fp64 gives DeepSpeed's own norm to the last bit.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch

TESTED_WITH = "0.19.8"  # the DeepSpeed whose two methods these replace


def use_multi_tensor_checks(zero: Any, version: str) -> str | None:
    """Replace both methods on this ZeRO-1 or -2 optimizer.

    Returns:
        None, or a warning where `version` is another DeepSpeed than the tested one, whose methods are kept
    """
    if version != TESTED_WITH:
        return (
            f"DeepSpeed {version} checks its gradients one by one, which is slow on a GPU: the multi-tensor checks are "
            f"for {TESTED_WITH}"
        )
    one_by_one = zero.get_grad_norm_direct

    def get_grad_norm_direct(self: Any, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        if norm_type != 2 or self.model_parallel_rank != 0:
            return one_by_one(gradients, params, norm_type)
        # As in DeepSpeed, pairs end with the shorter list; the rest is padding.
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        paired = [gradient.detach() for gradient, _ in zip(real, params, strict=False)]
        total = torch.zeros((), device=self.device)
        if paired:
            total = torch.stack(torch._foreach_norm(paired, 2, dtype=torch.float64)).pow(2.0).sum().float()
        torch.distributed.all_reduce(total, group=self.dp_process_group)
        total = total.pow(0.5)
        return torch.where(torch.isfinite(total), total, -1.0)

    def has_overflow_partitioned_grads_serial(self: Any) -> torch.Tensor:
        groups = [self.averaged_gradients[group] for group in range(len(self.bit16_groups))]
        present = [gradient for group in groups for gradient in group if gradient is not None and gradient.numel()]
        if not present:
            return torch.zeros(1, dtype=torch.bool, device=self.device)
        largest = torch.stack(torch._foreach_norm(present, math.inf))  # NaN where any element is NaN
        return torch.isfinite(largest).all().logical_not().reshape(1)

    zero.get_grad_norm_direct = types.MethodType(get_grad_norm_direct, zero)
    zero.has_overflow_partitioned_grads_serial = types.MethodType(has_overflow_partitioned_grads_serial, zero)
    return None
