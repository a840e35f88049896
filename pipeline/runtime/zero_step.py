"""The optimizer step of ZeRO-1 and -2 in 42 operations, without a host read.

In: DeepSpeed's ZeRO optimizer after backward, with the reduced gradients of this rank's partition. Out: the step that
DeepSpeed makes: norm, overflow check, clipping, loss scale, AdamW, all-gather. DeepSpeed 0.19.8 checks gradient by gradient
(2 905 operations for XLM-R-large's student) and decides in Python whether to skip, so that the host waits for the GPU. Here
each part is one multi-tensor operation, and AdamW skips on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.runtime.loss_scale import DeviceLossScaler

TESTED_WITH = "0.19.8"  # the DeepSpeed whose step this replaces
CHUNK = 2**18  # elements that a CPU converts to fp64 at a time: they stay in its cache


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, as 0-d tensors on the engine's device: reading one makes the host wait.

    `gradient_norm` (fp32) is NaN where the step was skipped. `skipped` (bool): a gradient was not finite, so no rank changed
    a parameter. `loss_scale` (fp32) is that of the next step.
    """

    gradient_norm: torch.Tensor
    skipped: torch.Tensor
    loss_scale: torch.Tensor


def reason_for_deepspeeds_step(zero: Any, version: str, config: dict[str, Any]) -> str | None:
    """Why DeepSpeed's own step must be used with this ZeRO-1 or -2 optimizer; None where ours can take its place."""
    if version != TESTED_WITH:
        return f"DeepSpeed is {version}, and ours is for {TESTED_WITH}"
    if not hasattr(zero, "averaged_gradients"):
        return f"{type(zero).__name__} keeps its gradients elsewhere"
    if zero.cpu_offload:
        return "the optimizer is offloaded to the CPU"
    if not zero.optimizer.defaults.get("fused"):
        return "`optimizer.params.fused` is not true"
    if config.get("wall_clock_breakdown"):
        return "`wall_clock_breakdown` times its parts"
    return None


class ZeroStep:
    """Replaces `step` of one DeepSpeed ZeRO-1 or -2 optimizer, on that instance."""

    def __init__(self, zero: Any, device: torch.device):
        self._zero = zero
        self._device = device
        self._pieces: list[_Pieces | None] = [None] * len(zero.bit16_groups)
        self._num_ranks = torch.distributed.get_world_size(zero.dp_process_group)
        is_padded = any(map(any, zero.round_robin_bit16_padding))  # parameters that do not follow each other directly
        is_summed_by_autograd = zero.gradient_accumulation_dtype == zero.dtype and not is_padded
        self._gradients_stay = self._num_ranks == 1 and is_summed_by_autograd
        if self._gradients_stay:
            _leave_gradients_to_autograd(zero)
        if zero.dtype == torch.float32:
            _share_master_weights(zero)
        if zero.loss_scaler.dynamic:
            zero.loss_scaler = DeviceLossScaler(zero.loss_scaler, device)
        self._scale = torch.full((), float(zero.loss_scale), dtype=torch.float32, device=device)
        self.result: StepResult | None = None
        zero.step = self.step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on the gradients of all micro-batches. `result` says how it went."""
        zero = self._zero
        gradients = self.gradients()
        scale = zero.loss_scaler.cur_scale if zero.loss_scaler.dynamic else self._scale
        scaled_norm = self._norm(gradients)
        norm, skipped = scaled_norm / scale, ~torch.isfinite(scaled_norm)
        divisor = scale * ((norm + 1e-6) / zero.clip_grad).clamp(min=1.0) if zero.clip_grad else scale
        found_inf = skipped.float()
        for group, of_group in enumerate(gradients):
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
            self._update(group, of_group, divisor, found_inf)
        zero.update_lp_params()  # the low-precision copy and the all-gather
        zero._lazy_init_hp_params_optimizer_state()
        if zero.loss_scaler.dynamic:
            zero.loss_scaler.update_scale(skipped)
            scale = zero.loss_scaler.cur_scale
        norm = torch.where(skipped, torch.nan, norm)
        zero._global_grad_norm = norm
        self.result = StepResult(norm, skipped, scale)

    def gradients(self) -> list[list[torch.Tensor]]:
        """This rank's reduced gradients by group, which tile its partition from the start."""
        zero = self._zero
        if self._gradients_stay:
            groups = zero.bit16_groups
            return [[p.grad if p.grad is not None else torch.zeros_like(p) for p in group] for group in groups]
        return [list(zero.averaged_gradients[group]) for group in range(len(zero.bit16_groups))]

    def _norm(self, gradients: list[list[torch.Tensor]]) -> torch.Tensor:
        """L2 norm over all groups and ranks, fp32 [], to DeepSpeed's last bit. Infinite or NaN if an element of any rank is."""
        squares_G = torch.stack([_sum_of_squares(of_group) for of_group in gradients])
        if self._num_ranks > 1:
            torch.distributed.all_reduce(squares_G, group=self._zero.dp_process_group)
        return torch.linalg.vector_norm(squares_G.sqrt())

    def _update(
        self, group: int, gradients: list[torch.Tensor], divisor: torch.Tensor, found_inf: torch.Tensor
    ) -> None:
        """AdamW on one group, on the gradients divided by `divisor`; no change where `found_inf` is 1."""
        zero = self._zero
        pieces = self._pieces[group]
        if pieces is None:
            pieces = self._pieces[group] = _Pieces(zero.single_partition_of_fp32_groups[group], gradients)
        if gradients[0].dtype != torch.float32:
            copies = pieces.in_fp32(gradients)
            gradients.clear()
            zero.free_grad_in_param_list(zero.bit16_groups[group])
            gradients = copies
        settings = zero.optimizer.param_groups[group]
        exp_avgs, exp_avg_sqs, step = pieces.adam_state(zero.optimizer)
        step.add_(1 - found_inf)
        torch._fused_adamw_(
            pieces.masters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            [step] * len(gradients),
            lr=settings["lr"],
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=found_inf,
        )
        pieces.release()


class _Pieces:
    """One group's partition of master weights and moments, as views in the shapes of its gradients."""

    def __init__(self, master: torch.Tensor, gradients: list[torch.Tensor]):
        self._master = master
        self._shapes = [gradient.shape for gradient in gradients]
        self.masters = self._views(master.detach())
        self._moments: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self._gradient: torch.Tensor | None = None
        self._gradients: list[torch.Tensor] = []

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [shape.numel() for shape in self._shapes]
        parts = flat.split([*sizes, flat.numel() - sum(sizes)])[: len(sizes)]
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def adam_state(self, adam: torch.optim.Optimizer) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """First moments, second moments and step, which are zero before the first step."""
        state = adam.state[self._master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=self._master.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(self._master, requires_grad=False)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in self._moments or self._moments[name][0] is not state[name]:
                self._moments[name] = state[name], self._views(state[name])
        return self._moments["exp_avg"][1], self._moments["exp_avg_sq"][1], state["step"]

    def in_fp32(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of the gradients. Their memory is allocated here and freed by `release`, but the views are kept."""
        if self._gradient is None:
            self._gradient = torch.empty_like(self._master, requires_grad=False)
            self._gradients = self._views(self._gradient)
        self._gradient.untyped_storage().resize_(self._gradient.numel() * self._gradient.element_size())
        torch._foreach_copy_(self._gradients, gradients)
        return self._gradients

    def release(self) -> None:
        if self._gradient is not None:
            self._gradient.untyped_storage().resize_(0)


def _sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    """fp32 []; summed in fp64, as DeepSpeed does. In fp32 the norm of an embedding gradient is wrong by a percent."""
    large = [g for g in gradients if g.device.type == "cpu" and g.numel() > CHUNK]
    others = [g for g in gradients if not (g.device.type == "cpu" and g.numel() > CHUNK)]
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    if others:
        total = torch.stack(torch._foreach_norm(others, 2, dtype=torch.float64)).pow(2.0).sum()
    for gradient in large:
        total += _sum_of_squares_on_cpu(gradient)
    return total.float()


def _sum_of_squares_on_cpu(gradient: torch.Tensor) -> torch.Tensor:
    """fp64 []. A CPU's norm in fp64 would first convert the complete tensor, which is slow and takes twice its memory."""
    buffer = torch.empty(CHUNK, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for chunk in gradient.reshape(-1).split(CHUNK):
        in_fp64 = buffer[: len(chunk)].copy_(chunk)
        total += torch.dot(in_fp64, in_fp64)
    return total


def _leave_gradients_to_autograd(zero: Any) -> None:
    """One rank has nothing to reduce: no hook copies a gradient into a bucket, and micro-batches add up in `grad`."""
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero._grad_acc_hooks.clear()
    zero.reduce_gradients = lambda pipeline_parallel=False: None  # at the end of a backward, ZeRO-1
    zero.overlapping_partition_gradients_reduce_epilogue = lambda: None  # the same, ZeRO-2


def _share_master_weights(zero: Any) -> None:
    """fp32: the partition of the parameters is the master weights, without a second copy of them."""
    rank = torch.distributed.get_rank(zero.dp_process_group)
    for master, partitions in zip(
        zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
    ):
        master.data = partitions[rank]
    zero._link_all_hp_params()  # DeepSpeed's own views of the master weights
