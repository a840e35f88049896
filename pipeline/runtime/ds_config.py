"""Reads the DeepSpeed JSON, checks it against the recipe and resolves it to what this machine can run.

The recipe owns batch, learning rate and clipping. The JSON owns ZeRO stage, precision, communication, offload and the
optimizer's implementation. DeepSpeed silently ignores unknown keys and turns `"auto"` fp16 off, so it gets only resolved
values. This module does not import DeepSpeed; engine.py passes the result on.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.runtime import ds_schema
from pipeline.runtime.optimizer import OptimizerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BatchShape:
    """How the global batch is divided: rows per rank and micro-step, and micro-steps per optimizer step."""

    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class Precisions:
    """The precisions of a device.

    Attributes:
        bf16_fast: it has instructions for bf16 and does not emulate it
        bf16_faster: it has fp16 too, and multiplies matrices faster in bf16
    """

    fp16: bool
    bf16: bool
    bf16_fast: bool
    device: str
    bf16_faster: bool = False


def split_batch(global_batch: int, micro_batch: int, world_size: int) -> BatchShape:
    """Rows per rank and micro-step, and accumulation.

    Raises:
        UserError: the numbers do not divide; names values that do
    """
    if global_batch % world_size:
        # full micro-batches on every rank, where the batch is large enough for one
        unit = world_size * min(micro_batch, max(1, global_batch // world_size))
        near = unit * max(1, round(global_batch / unit))
        raise UserError(
            f"global_batch {global_batch} does not divide by {world_size} ranks; "
            f"use --set global_batch={near}, or another number of GPUs"
        )
    per_rank = global_batch // world_size
    micro_batch = min(micro_batch, per_rank)
    if per_rank % micro_batch:
        fits = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        largest = max(size for size in fits if size <= micro_batch)
        raise UserError(
            f"global_batch {global_batch} over {world_size} ranks is {per_rank} rows a rank, which does not divide into "
            f"micro-batches of {micro_batch}; micro_batch_per_gpu could be {', '.join(map(str, fits))}: "
            f"--set micro_batch_per_gpu={largest}"
        )
    return BatchShape(micro_batch, per_rank // micro_batch)


def read_ds_json(path: Path) -> dict[str, Any]:
    """The JSON as written, with every key checked (ds_schema.py). Raises `UserError`."""
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json"))) or "none"
        raise UserError(f"DeepSpeed config {path} not found. Configs here: {known}")
    config = ds_schema.parse(path)
    ds_schema.check(config, path)
    return config


def resolve(
    path: Path, recipe_path: str, optimizer: OptimizerConfig, batch: BatchShape, world_size: int, can: Precisions
) -> tuple[dict[str, Any], list[str]]:
    """The effective DeepSpeed config, and warnings to print once.

    A value in both JSON and recipe must be the same in both. `"auto"` means the recipe's value.

    Args:
        can: the precisions of this rank's device
    Raises:
        UserError: names the file, the key and both values
    """
    config = read_ds_json(path)
    owned: dict[str, Any] = {
        "train_batch_size": batch.micro_batch * batch.accumulation * world_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
    }
    _set_owned(config, owned, f"{path}", recipe_path)
    _resolve_optimizer(config, optimizer, path, recipe_path)
    config.setdefault("zero_optimization", {})
    config.setdefault("steps_per_print", 2**62)  # the pipeline prints its own console line
    config["timers"] = {"throughput": {"enabled": False}}  # DeepSpeed's would wait for the GPU twice in each step
    warnings = _resolve_precision(config, path, can)
    _check_stage(config, path)
    _check_gradients(config, path)
    return config, warnings


def _set_owned(config: dict[str, Any], owned: dict[str, Any], where: str, recipe_path: str) -> None:
    """Set the keys that the recipe owns; a `UserError` where the JSON has another value."""
    for key, value in owned.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(
                f"{where} sets `{key}` to {given}, but {recipe_path} makes it {value}; "
                f'the recipe owns it: remove it from {where} or write "auto"'
            )
        config[key] = value


def _resolve_optimizer(config: dict[str, Any], optimizer: OptimizerConfig, path: Path, recipe_path: str) -> None:
    section = copy.deepcopy(config.get("optimizer", {"type": "AdamW", "params": {}}))
    parameters = section.setdefault("params", {})
    section.setdefault("type", "AdamW")
    parameters.setdefault("torch_adam", True)
    parameters.setdefault("fused", not parameters.get("foreach"))  # one kernel for many tensors, on a CPU too
    if parameters.get("fused") and parameters.get("foreach"):
        raise UserError(f"{path} sets both `fused` and `foreach` in `optimizer.params`; keep one")
    owned = {"lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps}
    _set_owned(parameters, {**owned, "weight_decay": optimizer.weight_decay}, f"{path} optimizer.params", recipe_path)
    config["optimizer"] = section


def _resolve_precision(config: dict[str, Any], path: Path, can: Precisions) -> list[str]:
    """Replace fp16 where the device does not have it: by bf16 where that is fast, else by fp32. Returns warnings."""
    fp16 = config.setdefault("fp16", {"enabled": False})
    bf16 = config.setdefault("bf16", {"enabled": False})
    for name, section in (("fp16", fp16), ("bf16", bf16)):
        if section.get("enabled") == "auto":
            section["enabled"] = name == "fp16" and bf16.get("enabled") is not True
    if fp16.get("enabled") and bf16.get("enabled"):
        raise UserError(f"{path} enables both fp16 and bf16; keep one")
    if fp16.get("enabled") and not can.fp16:
        config["fp16"] = {"enabled": False}
        config["bf16"] = {"enabled": can.bf16_fast}
        instead = "bf16" if can.bf16_fast else "fp32"
        if config.get("data_types", {}).get("grad_accum_dtype") == "fp16":  # that of the student, as asked
            config["data_types"]["grad_accum_dtype"] = instead
        return [f"{path} asks for fp16, which {can.device} does not have: this run computes in {instead} instead"]
    if bf16.get("enabled") and not can.bf16:
        raise UserError(f"{path} asks for bf16, which {can.device} does not have; use ds_configs/zero2.json (fp16)")
    if fp16.get("enabled") and can.bf16_faster:
        return [
            f"{path} asks for fp16, and {can.device} is faster in bf16: enable `bf16` in place of `fp16`, as in ds_configs/zero2_bf16.json"
        ]
    return []


def _check_stage(config: dict[str, Any], path: Path) -> None:
    zero = config["zero_optimization"]
    stage = zero.setdefault("stage", 1)
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage}; use 1, 2 or 3. (Stage 0 with fp16 is broken in DeepSpeed 0.19: "
            "updates come out far too small; stage 1 on one GPU costs the same)"
        )
    if stage != 3 and zero.get("offload_param", {}).get("device", "none") != "none":
        raise UserError(
            f"{path} asks for `offload_param` at stage {stage}, where DeepSpeed ignores it: set zero_optimization.stage to 3, "
            "or remove it"
        )
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW runs on the offloaded partition, uncompiled


def _check_gradients(config: dict[str, Any], path: Path) -> None:
    """Reject sums and averages of gradients that end in a traceback in DeepSpeed 0.19 or need its other optimizer."""
    zero, precision = config["zero_optimization"], precision_of(config)
    accumulation = config.get("data_types", {}).get("grad_accum_dtype") or precision
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    lacks_fp32 = (zero["stage"], precision) == (1, "bf16") and not is_offloaded
    if accumulation not in ("fp32", precision):
        raise UserError(
            f"{path}: `data_types.grad_accum_dtype` is {accumulation}, but the student computes in {precision}: "
            f"""{"" if lacks_fp32 else 'write "fp32", or '}remove it to add up micro-batches in {precision}"""
        )
    if lacks_fp32 and accumulation == "fp32":
        raise UserError(
            f"{path}: for `data_types.grad_accum_dtype` fp32 with bf16 at stage 1 DeepSpeed has another optimizer, which this "
            "pipeline cannot save: set zero_optimization.stage to 2, which adds up in fp32 as well, or remove the key"
        )
    for key, default in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if config.get(key, default) != default and zero["stage"] != 1 and zero.get("reduce_scatter", True):
            raise UserError(
                f"{path}: `{key}` is {json.dumps(config[key])}, which DeepSpeed does not have at stage {zero['stage']} with "
                "`reduce_scatter`: remove it"
            )


def precision_of(config: dict[str, Any]) -> str:
    """The precision of an effective config: a key of `DTYPES`."""
    for name in ("fp16", "bf16"):
        if config[name].get("enabled"):
            return name
    return "fp32"


def loss_scale_floor(config: dict[str, Any]) -> float:
    """The minimum of fp16's dynamic loss scale; infinite where the scale is fixed, because then each overflow counts."""
    fp16 = config["fp16"]
    return float("inf") if fp16.get("loss_scale", 0) else float(fp16.get("min_loss_scale", 1))
