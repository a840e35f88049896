"""Every key that a DeepSpeed JSON may have, with its type, its range, and the reason where only one value works.

In: the parsed JSON. Out: nothing, or a `UserError` that names file, dotted key, value and fix. The keys are those of
DeepSpeed 0.19's own models. DeepSpeed ignores unknown keys at the top level and ends with a traceback on others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, did_you_mean

AUTO = "auto"


@dataclass(frozen=True)
class Flag:
    """`true` or `false`."""

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "must be true or false"


@dataclass(frozen=True)
class Number:
    """A finite number from `least` to `most`, by default an integer. As in DeepSpeed, 5e8 is an integer."""

    least: float = 0
    most: float = 2**63 - 1
    integer: bool = True

    def problem(self, value: Any) -> str | None:
        kind = "an integer" if self.integer else "a number"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and isinstance(value, float):
            is_number = math.isfinite(value) and (value.is_integer() or not self.integer)
        if is_number and self.least <= value <= self.most:
            return None
        return f"must be {kind} from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Choice:
    """One of a few values, `null` included where it is listed."""

    values: tuple[Any, ...]

    def problem(self, value: Any) -> str | None:
        if any(type(value) is type(known) and value == known for known in self.values):
            return None
        return f"must be {' or '.join(json.dumps(known) for known in self.values)}"


@dataclass(frozen=True)
class Only:
    """A key of DeepSpeed that may have only one value here; `why` completes the error message."""

    value: Any
    why: str

    def problem(self, value: Any) -> str | None:
        if type(value) is type(self.value) and value == self.value:
            return None
        return f"must be {json.dumps(self.value)}, or left out: {self.why}"


@dataclass(frozen=True)
class Text:
    """A string, or `null` for none."""

    def problem(self, value: Any) -> str | None:
        return None if value is None or isinstance(value, str) else "must be a string"


@dataclass(frozen=True)
class Numbers:
    """A list of `count` numbers of one kind."""

    each: Number
    count: int

    def problem(self, value: Any) -> str | None:
        if isinstance(value, list) and len(value) == self.count and not any(map(self.each.problem, value)):
            return None
        return f"must be a list of {self.count} numbers, each {self.each.least:g} to {self.each.most:g}"


@dataclass(frozen=True)
class Texts:
    """A list of strings."""

    def problem(self, value: Any) -> str | None:
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return None
        return "must be a list of strings"


@dataclass(frozen=True)
class FromRecipe:
    """A value that the recipe owns: `"auto"`, or the recipe's own value (ds_config.py compares)."""

    rule: Number | Numbers

    def problem(self, value: Any) -> str | None:
        if value == AUTO:
            return None
        found = self.rule.problem(value)
        return f'{found}, or "auto" for the recipe\'s value' if found else None


@dataclass(frozen=True)
class AutoFlag:
    """`true`, `false`, or `"auto"`: on where the device supports it."""

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, bool) or value == AUTO else 'must be true, false or "auto"'


Rule = Flag | Number | Choice | Only | Text | Numbers | Texts | FromRecipe | AutoFlag
Section = Mapping[str, "Rule | Section"]

_FRACTION = Number(0, 1, integer=False)
_MASTER = "master weights and moments are fp32 here, and so are the checkpoints"
_EXACT = "its state is not in this pipeline's checkpoints, so that a resumed run would differ"
_NVME = "offload to nvme is not supported by this pipeline's checkpoints"
_BUCKET = Number(1, 10**10)  # elements; DeepSpeed allocates them at the start

_OPTIMIZER: Section = {
    "type": Choice(("AdamW",)),
    "params": {
        "lr": FromRecipe(Number(0, 1e6, integer=False)),
        "betas": FromRecipe(Numbers(_FRACTION, 2)),
        "eps": FromRecipe(Number(0, 1, integer=False)),
        "weight_decay": FromRecipe(Number(0, 1e6, integer=False)),
        "torch_adam": Only(
            True,
            "DeepSpeed's own Adam compiles at start and keeps its step count where a checkpoint by parameter name cannot "
            "restore it exactly",
        ),
        "adam_w_mode": Only(True, "weight decay is decoupled from the gradient (AdamW)"),
        "fused": Choice((True, False, None)),
        "foreach": Choice((True, False, None)),
        "amsgrad": Only(False, f"its third moment is not saved; {_EXACT}"),
        "maximize": Only(False, "the loss would grow"),
        "capturable": Only(False, "there is no CUDA graph here"),
        "differentiable": Only(False, "nothing differentiates through the step"),
    },
}

_FP16: Section = {
    "enabled": AutoFlag(),
    "auto_cast": Only(False, "the student's parameters are fp16 themselves"),
    "loss_scale": Number(0, 2**32, integer=False),
    "initial_scale_power": Number(0, 32),
    "loss_scale_window": Number(1),
    "hysteresis": Number(1),
    "consecutive_hysteresis": Flag(),
    "min_loss_scale": Number(1, 2**32),
    "fp16_master_weights_and_grads": Only(False, _MASTER),
}

_BF16: Section = {
    "enabled": AutoFlag(),
    "immediate_grad_update": Flag(),
    "check_grad_overflow": Only(True, "a non-finite gradient must skip the step"),
    "bf16_master_weights_and_grads": Only(False, _MASTER),
    "bf16_optimizer_states": Only(False, _MASTER),
}

_OFFLOAD: Section = {
    "device": Choice(("none", "cpu")),
    "nvme_path": Only(None, _NVME),
    "buffer_count": Number(0, 1000),
    "pin_memory": Flag(),
}

_ZERO: Section = {
    "stage": Number(0, 3),  # ds_config.py says why not 0
    "contiguous_gradients": Flag(),
    "reduce_scatter": Flag(),
    "reduce_bucket_size": _BUCKET,
    "use_multi_rank_bucket_allreduce": Flag(),
    "allgather_partitions": Flag(),
    "allgather_bucket_size": _BUCKET,
    "overlap_comm": Flag(),
    "compute_grad_norm": Only(True, "the gradient norm is logged and used for clipping"),
    "load_from_fp32_weights": Flag(),
    "elastic_checkpoint": Flag(),
    "offload_param": {**_OFFLOAD, "buffer_size": Number(), "max_in_cpu": Number()},
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": Flag(),
        "pipeline_write": Flag(),
        "fast_init": Flag(),
        "ratio": Only(1, "a part of the optimizer on the CPU needs DeepSpeed's own Adam"),
        "super_offload": Only(False, "it needs DeepSpeed's own Adam"),
        "cpuadam_cores_perc": _FRACTION,
    },
    "zenflow": Only(None, _EXACT),
    "sub_group_size": Number(1),
    "stage3_prefetch_bucket_size": Number(),
    "stage3_param_persistence_threshold": Number(),
    "stage3_model_persistence_threshold": Number(),
    "stage3_max_live_parameters": Number(),
    "stage3_max_reuse_distance": Number(),
    "stage3_gather_16bit_weights_on_model_save": Flag(),
    "stage3_module_granularity_threshold": Number(),
    "stage3_use_all_reduce_for_fetch_params": Flag(),
    "stage3_allgather_sequential": Flag(),
    "ignore_unused_parameters": Flag(),
    "legacy_stage1": Only(False, "DeepSpeed's old stage 1 has no state by parameter name"),
    "round_robin_gradients": Flag(),
    "parameter_alignment": Flag(),
    "zero_hpz_partition_size": Only(
        1,
        "ZeRO++ keeps a second copy of the parameters that a resume does not refresh: the first step would use old weights",
    ),
    "zero_quantized_weights": Only(False, "weights rounded in communication differ from those of a resumed run"),
    "zero_quantized_nontrainable_weights": Only(False, "frozen weights would be rounded, and exported so"),
    "zero_quantized_gradients": Only(False, "rounded gradients depend on the number of ranks"),
    "memory_efficient_linear": Flag(),
    "pipeline_loading_checkpoint": Flag(),
    "override_module_apply": Flag(),
    "log_trace_cache_warnings": Flag(),
    "enable_sanity_checks": Flag(),
    "save_muon_momentum_buffer_in_memory": Only(False, "the optimizer is AdamW"),
    "leaf_module": {"classes": Texts(), "names": Texts(), "name_suffixes": Texts()},
}

_TYPES = ("fp16", "bf16", "fp32", None)

CONFIG: Section = {
    "train_batch_size": FromRecipe(Number(1)),
    "train_micro_batch_size_per_gpu": FromRecipe(Number(1)),
    "gradient_accumulation_steps": FromRecipe(Number(1)),
    "gradient_clipping": FromRecipe(Number(0, integer=False)),
    "optimizer": _OPTIMIZER,
    "fp16": _FP16,
    "bf16": _BF16,
    "zero_optimization": _ZERO,
    "zero_force_ds_cpu_optimizer": Only(False, "torch's AdamW runs on the offloaded partition, uncompiled"),
    "communication_data_type": Choice(_TYPES),
    "seq_parallel_communication_data_type": Choice(_TYPES),
    "prescale_gradients": Flag(),
    "gradient_predivide_factor": Number(1e-6, 1e6, integer=False),
    "data_types": {"grad_accum_dtype": Choice(_TYPES)},
    "wall_clock_breakdown": Flag(),
    "memory_breakdown": Flag(),
    "dump_state": Flag(),
    "disable_allgather": Flag(),
    "steps_per_print": Number(1),
    "comms_logger": {
        **{"enabled": Flag(), "prof_all": Flag(), "prof_ops": Texts(), "verbose": Flag(), "debug": Flag()},
    },
    "flops_profiler": {
        **{"enabled": Flag(), "recompute_fwd_factor": Number(0, 100, integer=False), "profile_step": Number(1)},
        **{"module_depth": Number(-1), "top_modules": Number(1), "detailed": Flag(), "output_file": Text()},
    },
    "aio": {  # settings of offload to nvme, without effect when nothing is offloaded there
        **{"block_size": Number(1), "queue_depth": Number(1), "intra_op_parallelism": Number(1)},
        **{"single_submit": Flag(), "overlap_events": Flag(), "use_gds": Only(False, _NVME)},
    },
}

REMOVED = {
    "scheduler": "the recipe's `optimizer.warmup_steps` and `optimizer.decay` are the schedule",
    "tensorboard": "TensorBoard is always written, to the run directory",
    "wandb": "metrics go to TensorBoard and metrics.jsonl in the run directory",
    "csv_monitor": "metrics go to TensorBoard and metrics.jsonl in the run directory",
    "torch_autocast": "it leaves state behind that breaks later engines of the process; use fp16 or bf16",
    "amp": "DeepSpeed removed it; use fp16 or bf16",
    "elasticity": "DeepSpeed removed it; checkpoints here load at any number of ranks",
    "activation_checkpointing": "it would have no effect: the recipe's `student.checkpointing: true` recomputes activations",
    "checkpoint": "it would have no effect: the recipe's `checkpoint` section says how this pipeline saves",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'write "pin_memory" inside "offload_optimizer"',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "its name is stage3_gather_16bit_weights_on_model_save",
}


def parse(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `UserError` where the file is not one, or has a key twice."""
    try:
        config = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates, parse_constant=_not_a_number
        )
    except OSError as error:
        raise UserError(f"the DeepSpeed config {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON for DeepSpeed: it is nested too deeply") from None
    except ValueError as error:  # JSON, UTF-8, a number of thousands of digits, and the two hooks
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object: {{...}}")
    return config


def check(config: dict[str, Any], path: Path) -> None:
    """Raise a `UserError` for the first key that is unknown, removed, of a wrong type or out of range."""
    _check_section(config, CONFIG, "", path)


def _check_section(found: dict[str, Any], known: Section, prefix: str, path: Path) -> None:
    for key, value in found.items():
        name = prefix + key
        if name in REMOVED:
            raise UserError(f"{path}: remove `{name}`; {REMOVED[name]}")
        if key not in known:
            hint = did_you_mean(key, list(known))
            raise UserError(f"{path}: unknown key `{name}` (DeepSpeed would ignore it or stop at it); {hint}")
        rule = known[key]
        if isinstance(rule, Mapping):
            if not isinstance(value, dict):
                example = ': write {"enabled": true} or {"enabled": false}' if "enabled" in rule else ", or left out"
                raise UserError(f"{path}: `{name}` is {_shown(value)}; it must be an object{example}")
            _check_section(value, rule, name + ".", path)
        elif problem := rule.problem(value):
            fix = "" if value != AUTO else '. "auto" has no meaning here: leave the key out for DeepSpeed\'s default'
            raise UserError(f"{path}: `{name}` is {_shown(value)}; it {problem}{fix}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'the key "{key}" is there twice in one object; keep one of them')
        found[key] = value
    return found


def _not_a_number(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")
