"""The DeepSpeed engine of the student. This is the only file that imports deepspeed.

In: a module, its trained parameters and an effective config. Out: forward, backward, step, and the engine's state as
`Fragment`s: the flat pieces of the fp32 master weights and Adam moments that this rank owns. With them, checkpoints are saved
and loaded by parameter name, at any ZeRO stage and any number of ranks, without DeepSpeed's own files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.command_line import is_verbose
from pipeline.runtime import gpus

os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpus.available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
import deepspeed  # noqa: E402  (the accelerator is chosen, and the log level set, before this import)
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.utils.logging import set_log_level_from_string  # noqa: E402

from pipeline.distillation.compiled_layers import is_compiled  # noqa: E402
from pipeline.runtime.determinism import deterministic_kernels  # noqa: E402
from pipeline.runtime.ds_config import Precisions  # noqa: E402
from pipeline.runtime.optimizer import MOMENTS, OptimizerConfig, parameter_groups  # noqa: E402
from pipeline.runtime.zero_step import StepResult, ZeroStep, reason_for_deepspeeds_step  # noqa: E402

if is_verbose():
    set_log_level_from_string("info")


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this rank owns, as a range of a flat fp32 buffer.

    `start` and `numel` address the flattened parameter; `offset` addresses the buffer. Every element of every trained
    parameter belongs to exactly one rank, so the fragments of all ranks together are the model.
    """

    name: str
    start: int
    numel: int
    buffer: torch.Tensor
    offset: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's slice [numel] of `tensor`: the buffer itself or a moment, which has the same layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def device_precisions(device: torch.device) -> Precisions:
    """The precisions that this device computes natively, as reported by DeepSpeed and torch."""
    accelerator = get_accelerator()
    if device.type == "cuda":
        bf16 = gpus.has_bf16(device)
        return Precisions(bool(accelerator.is_fp16_supported()), bf16, bf16, gpus.describe(device).name)
    features, fp16 = _cpu_features(), bool(accelerator.is_fp16_supported())
    fast = not {"avx512_bf16", "amx_bf16"}.isdisjoint(features)
    return Precisions(fp16, True, fast, "this CPU", fp16 and "amx_bf16" in features and "amx_fp16" not in features)


def _cpu_features() -> set[str]:
    """Names of the instruction sets of this CPU."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    return set(Path("/proc/cpuinfo").read_text().split())  # torch 2.8


class StudentEngine:
    """A DeepSpeed engine whose state is accessible by parameter name."""

    def __init__(
        self,
        module: torch.nn.Module,
        trained: Mapping[str, torch.nn.Parameter],
        optimizer: OptimizerConfig,
        config: dict[str, Any],
        deterministic: bool = True,
    ):
        self._deterministic = deterministic
        self.shapes = {name: list(parameter.shape) for name, parameter in trained.items()}
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self.stage: int = config["zero_optimization"]["stage"]
        _forbid_compilation_at_start()
        _gather_compiled_layers_together(module)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(trained, optimizer.weight_decay),
            config=config,
            dist_init_required=False,
        )
        self._zero = self._engine.optimizer
        self._adam = self._zero.optimizer
        self.warnings: list[str] = []
        self._step: ZeroStep | None = None
        if self.stage in (1, 2):
            reason = reason_for_deepspeeds_step(self._zero, deepspeed.__version__, config)
            if reason:
                self.warnings.append(
                    f"each optimizer step is DeepSpeed's own, which checks gradient by gradient and waits for the GPU: {reason}"
                )
            else:
                self._step = ZeroStep(self._zero, self.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    @property
    def deepspeed_engine(self) -> Any:
        """DeepSpeed's engine, for comparisons with its own checkpoints and checks (tests/dist, tests/faults/sweeps)."""
        return self._engine

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one micro-batch. DeepSpeed divides by the number of micro-batches."""
        with deterministic_kernels(self._deterministic):
            self._engine.backward(loss)

    def step(self, learning_rate: float) -> StepResult | None:
        """Call it after each micro-batch. None until the last one of an optimizer step, then the result of the step."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary:
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
        self._engine.step()
        if not boundary:
            return None
        return self._step.result if self._step else self._result_of_deepspeed()

    def _result_of_deepspeed(self) -> StepResult:
        """The result of DeepSpeed's own step, which the host knows already."""
        skipped = bool(self._zero.overflow)
        norm = torch.nan if skipped else self._engine.get_global_grad_norm()
        on_device: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        if isinstance(norm, torch.Tensor):
            norm = norm.detach().to(**on_device).reshape(())
        else:
            norm = torch.full((), float(norm), **on_device)
        return StepResult(
            norm, torch.full((), skipped, device=self.device), torch.full((), self.loss_scale, **on_device)
        )

    @property
    def loss_scale(self) -> float:
        """The loss scale of the next step. Waits for the device."""
        return float(self._zero.loss_scale)

    # -- state, by parameter name

    def fragments(self) -> Iterator[Fragment]:
        """The fragments that this rank owns, in a fixed order."""
        return self._fragments_of_partitioned_parameters() if self.stage == 3 else self._fragments_of_flat_groups()

    def not_finite(self) -> str | None:
        """The name of a parameter whose fp32 fragment on this rank has NaN or infinite elements, or None."""
        for fragment in self.fragments():
            if not torch.isfinite(fragment.view(fragment.buffer)).all():
                return fragment.name
        return None

    def _fragments_of_flat_groups(self) -> Iterator[Fragment]:
        for parameters, buffer in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    where, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                    yield Fragment(self._names[id(parameter)], where.start, where.numel, buffer, place.start)

    def _fragments_of_partitioned_parameters(self) -> Iterator[Fragment]:
        rank = torch.distributed.get_rank()
        for parameters in self._zero.fp16_groups:
            for parameter in parameters:
                group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = rank * padded
                numel = min(padded, parameter.ds_numel - start)
                if numel > 0:
                    buffer = self._zero.fp32_partitioned_groups_flat[group]
                    yield Fragment(self._names[id(parameter)], start, numel, buffer, offset)

    def moment(self, fragment: Fragment, name: str) -> torch.Tensor:
        """`exp_avg` or `exp_avg_sq` of a fragment, fp32 [numel]; zeros before the first step, when Adam has none."""
        state = self._adam.state.get(fragment.buffer, {})
        if name not in state:
            return torch.zeros(fragment.numel, dtype=torch.float32)
        return fragment.view(state[name])

    def adam_step(self) -> int:
        """The number of updates that Adam has made, without skipped steps."""
        steps = [int(state["step"]) for state in self._adam.state.values() if "step" in state]
        return max(steps, default=0)

    def scaler_state(self) -> dict[str, float]:
        """The state of the dynamic loss scaler; empty where the scale is fixed."""
        scaler = self._zero.loss_scaler
        return {name: float(getattr(scaler, name)) for name in _SCALER_NUMBERS if hasattr(scaler, name)}

    @torch.no_grad()
    def load(self, read: Any, adam_step: int, scaler: Mapping[str, float]) -> None:
        """Fill every fragment.

        Adam's state is created here, before its first step, in the form that torch's AdamW continues from. The low-precision
        copies are refreshed last: otherwise the next forward would use the weights from before the load.

        Args:
            read: `read(kind, name, start, numel)` -> fp32 [numel]; kind is "weight" or the name of a moment
            adam_step: updates that Adam had made
            scaler: what `scaler_state` returned
        """
        for fragment in self.fragments():
            state = self._adam.state[fragment.buffer]
            if not state:
                # torch's AdamW keeps its step on the CPU, its fused one next to the parameter
                device = fragment.buffer.device if self._adam.defaults.get("fused") else torch.device("cpu")
                state["step"] = torch.full((), float(adam_step), dtype=torch.float32, device=device)
                for name in MOMENTS:
                    state[name] = torch.zeros_like(fragment.buffer, requires_grad=False)
            fragment.view(fragment.buffer).copy_(read("weight", fragment.name, fragment.start, fragment.numel))
            for name in MOMENTS:
                fragment.view(state[name]).copy_(read(name, fragment.name, fragment.start, fragment.numel))
        for name, value in scaler.items():
            if name in _SCALER_NUMBERS and hasattr(self._zero.loss_scaler, name):
                now = getattr(self._zero.loss_scaler, name)
                loaded = torch.full_like(now, value) if isinstance(now, torch.Tensor) else type(now)(value)
                setattr(self._zero.loss_scaler, name, loaded)
        self._refresh_low_precision()

    @torch.no_grad()
    def load_frozen(self, frozen: Mapping[str, torch.nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
        """Load the parameters without gradient from a checkpoint.

        Those that this attempt initialised may have other last bits, or come from a teacher or text that has changed since.
        """
        for name, parameter in frozen.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.copy_(weights[name])

    def _refresh_low_precision(self) -> None:
        if self.stage != 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:  # small parameters that ZeRO-3 does not partition
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def partition_teacher(teacher: torch.nn.Module, precision: str) -> Callable:
    """Partition the parameters of a frozen module over the ranks with a ZeRO-3 engine of its own, without optimizer.

    Each layer is gathered for its forward and released again, for teachers that do not fit on one device.
    """
    _forbid_compilation_at_start()
    _gather_compiled_layers_together(teacher)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # Release immediately: by default up to a billion gathered parameters stay, which is the complete teacher.
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "memory_efficient_linear": False,  # it would replace F.linear in the complete process
        },
        "fp16": {"enabled": precision == "fp16"},
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(model=teacher, config=config, dist_init_required=False)
    engine.eval()
    return engine


def _gather_compiled_layers_together(module: torch.nn.Module) -> None:
    """For ZeRO-3, which otherwise gathers each matrix by a hook: no hook may run inside a compiled layer."""
    for layer in filter(is_compiled, module.modules()):
        deepspeed.utils.set_z3_leaf_module(layer, True)


_SCALER_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _forbid_compilation_at_start() -> None:
    """On CPU, DeepSpeed would compile a shared-memory op at start: that takes minutes, and a kill leaves a stale lock."""
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
