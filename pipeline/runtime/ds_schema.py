"""Every key that a DeepSpeed JSON may have, with its type, its range, and the reason where only one value works.

In: the parsed JSON. Out: nothing, or a `UserError` that names file, dotted key, value and fix. The keys are those of
DeepSpeed 0.19's own models. DeepSpeed ignores unknown keys at the top level and ends with a traceback on others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, did_you_mean

AUTO = "auto"


@dataclass(frozen=True)
class Rule:
    """A condition on one value, and the words with which an error message continues after "it"."""

    accepts: Callable[[Any], bool]
    words: str

    def problem(self, value: Any) -> str | None:
        return None if self.accepts(value) else self.words


Section = Mapping[str, "Rule | Section"]


def _is_same(value: Any, known: Any) -> bool:
    return type(value) is type(known) and value == known  # `true` is not 1


def _number(least: float = 0, most: float = 2**63 - 1, integer: bool = True) -> Rule:
    """A finite number from `least` to `most`, by default an integer. As in DeepSpeed, 5e8 is an integer."""

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN is not
            return False
        return isinstance(value, int) or value.is_integer() or not integer

    return Rule(
        accepts, f"must be {'an integer' if integer else 'a number'} from {_exactly(least)} to {_exactly(most)}"
    )


def _exactly(number: float) -> str:
    """In few characters, and not rounded: 1e+10, and 4294967296 instead of 4.29497e+09, which is larger."""
    return short if float(short := f"{number:g}") == number and number < 2**53 else str(number)


def _choice(*values: Any) -> Rule:
    """One of `values`, which may contain None for `null`."""
    words = " or ".join(json.dumps(known) for known in values)
    return Rule(lambda value: any(_is_same(value, known) for known in values), f"must be {words}")


def _only(known: Any, why: str) -> Rule:
    """A key of DeepSpeed that may have only one value here; `why` completes the error message."""
    return Rule(lambda value: _is_same(value, known), f"must be {json.dumps(known)}, or left out: {why}")


def _from_recipe(rule: Rule) -> Rule:
    """A value that the recipe owns: `"auto"`, or the recipe's own value (ds_config.py compares)."""
    return Rule(
        lambda value: value == AUTO or rule.accepts(value), 'must be "auto", or left out: the recipe has its value'
    )


def _is_list_of(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


_FLAG = Rule(lambda value: isinstance(value, bool), "must be true or false")
_AUTO_FLAG = Rule(lambda value: isinstance(value, bool) or value == AUTO, 'must be true, false or "auto"')
_TEXT = Rule(lambda value: value is None or isinstance(value, str), "must be a string")
_TEXTS = Rule(lambda value: _is_list_of(value, lambda text: isinstance(text, str)), "must be a list of strings")
_FRACTION = _number(0, 1, integer=False)
_BETAS = Rule(
    lambda value: _is_list_of(value, _FRACTION.accepts) and len(value) == 2, "must be a list of 2 numbers, each 0 to 1"
)
_MASTER = "master weights and moments are fp32 here, and so are the checkpoints"
_EXACT = "its state is not in this pipeline's checkpoints, so that a resumed run would differ"
_NVME = "offload to nvme is not supported by this pipeline's checkpoints"
_BUCKET = _number(1, 10**10)  # elements; DeepSpeed allocates them at the start

_OPTIMIZER: Section = {
    "type": _choice("AdamW"),
    "params": {
        "lr": _from_recipe(_number(0, 1e6, integer=False)),
        "betas": _from_recipe(_BETAS),
        "eps": _from_recipe(_number(0, 1, integer=False)),
        "weight_decay": _from_recipe(_number(0, 1e6, integer=False)),
        "torch_adam": _only(
            True,
            "DeepSpeed's own Adam compiles at start and keeps its step count where a checkpoint by parameter name cannot "
            "restore it exactly",
        ),
        "adam_w_mode": _only(True, "weight decay is decoupled from the gradient (AdamW)"),
        "fused": _choice(True, False, None),
        "foreach": _choice(True, False, None),
        "amsgrad": _only(False, f"its third moment is not saved; {_EXACT}"),
        "maximize": _only(False, "the loss would grow"),
        "capturable": _only(False, "there is no CUDA graph here"),
        "differentiable": _only(False, "nothing differentiates through the step"),
    },
}

_FP16: Section = {
    "enabled": _AUTO_FLAG,
    "auto_cast": _only(False, "the student's parameters are fp16 themselves"),
    "loss_scale": _number(0, 2**32, integer=False),
    "initial_scale_power": _number(0, 32),
    "loss_scale_window": _number(1),
    "hysteresis": _number(1),
    "consecutive_hysteresis": _FLAG,
    "min_loss_scale": _number(1, 2**32),
    "fp16_master_weights_and_grads": _only(False, _MASTER),
}

_BF16: Section = {
    "enabled": _AUTO_FLAG,
    "immediate_grad_update": _FLAG,
    "check_grad_overflow": _only(True, "a non-finite gradient must skip the step"),
    "bf16_master_weights_and_grads": _only(False, _MASTER),
    "bf16_optimizer_states": _only(False, _MASTER),
}

_OFFLOAD: Section = {
    "device": _choice("none", "cpu"),
    "nvme_path": _only(None, _NVME),
    "buffer_count": _number(0, 1000),
    "pin_memory": _FLAG,
}

_ZERO: Section = {
    "stage": Rule(_number(0, 3).accepts, "must be 1, 2 or 3"),  # ds_config.py says why not 0
    "contiguous_gradients": _FLAG,
    "reduce_scatter": _FLAG,
    "reduce_bucket_size": _BUCKET,
    "use_multi_rank_bucket_allreduce": _FLAG,
    "allgather_partitions": _FLAG,
    "allgather_bucket_size": _BUCKET,
    "overlap_comm": _FLAG,
    "compute_grad_norm": _only(True, "the gradient norm is logged and used for clipping"),
    "load_from_fp32_weights": _FLAG,
    "elastic_checkpoint": _FLAG,
    "offload_param": {**_OFFLOAD, "buffer_size": _number(), "max_in_cpu": _number()},
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": _FLAG,
        "pipeline_write": _FLAG,
        "fast_init": _FLAG,
        "ratio": _only(1, "a part of the optimizer on the CPU needs DeepSpeed's own Adam"),
        "super_offload": _only(False, "it needs DeepSpeed's own Adam"),
        "cpuadam_cores_perc": _FRACTION,
    },
    "zenflow": _only(None, _EXACT),
    "sub_group_size": _number(1),
    "stage3_prefetch_bucket_size": _number(),
    "stage3_param_persistence_threshold": _number(),
    "stage3_model_persistence_threshold": _number(),
    "stage3_max_live_parameters": _number(),
    "stage3_max_reuse_distance": _number(),
    "stage3_gather_16bit_weights_on_model_save": _FLAG,
    "stage3_module_granularity_threshold": _number(),
    "stage3_use_all_reduce_for_fetch_params": _FLAG,
    "stage3_allgather_sequential": _FLAG,
    "ignore_unused_parameters": _FLAG,
    "legacy_stage1": _only(False, "DeepSpeed's old stage 1 has no state by parameter name"),
    "round_robin_gradients": _FLAG,
    "parameter_alignment": _FLAG,
    "zero_hpz_partition_size": _only(
        1,
        "ZeRO++ keeps a second copy of the parameters that a resume does not refresh: the first step would use old weights",
    ),
    "zero_quantized_weights": _only(False, "weights rounded in communication differ from those of a resumed run"),
    "zero_quantized_nontrainable_weights": _only(False, "frozen weights would be rounded, and exported so"),
    "zero_quantized_gradients": _only(False, "rounded gradients depend on the number of ranks"),
    "memory_efficient_linear": _FLAG,
    "pipeline_loading_checkpoint": _FLAG,
    "override_module_apply": _FLAG,
    "log_trace_cache_warnings": _FLAG,
    "enable_sanity_checks": _FLAG,
    "save_muon_momentum_buffer_in_memory": _only(False, "the optimizer is AdamW"),
    "leaf_module": {"classes": _TEXTS, "names": _TEXTS, "name_suffixes": _TEXTS},
}

_TYPES = ("fp16", "bf16", "fp32", None)

CONFIG: Section = {
    "train_batch_size": _from_recipe(_number(1)),
    "train_micro_batch_size_per_gpu": _from_recipe(_number(1)),
    "gradient_accumulation_steps": _from_recipe(_number(1)),
    "gradient_clipping": _from_recipe(_number(0, integer=False)),
    "optimizer": _OPTIMIZER,
    "fp16": _FP16,
    "bf16": _BF16,
    "zero_optimization": _ZERO,
    "zero_force_ds_cpu_optimizer": _only(False, "torch's AdamW runs on the offloaded partition, uncompiled"),
    "communication_data_type": _choice(*_TYPES),
    "seq_parallel_communication_data_type": _choice(*_TYPES),
    "prescale_gradients": _FLAG,
    "gradient_predivide_factor": _number(1e-6, 1e6, integer=False),
    "data_types": {"grad_accum_dtype": _choice(*_TYPES)},
    "wall_clock_breakdown": _FLAG,
    "memory_breakdown": _FLAG,
    "dump_state": _FLAG,
    "disable_allgather": _FLAG,
    "steps_per_print": _number(1),
    "comms_logger": {
        **{"enabled": _FLAG, "prof_all": _FLAG, "prof_ops": _TEXTS, "verbose": _FLAG, "debug": _FLAG},
    },
    "flops_profiler": {
        **{"enabled": _FLAG, "recompute_fwd_factor": _number(0, 100, integer=False), "profile_step": _number(1)},
        **{"module_depth": _number(-1), "top_modules": _number(1), "detailed": _FLAG, "output_file": _TEXT},
    },
    "aio": {  # settings of offload to nvme, without effect when nothing is offloaded there
        **{"block_size": _number(1), "queue_depth": _number(1), "intra_op_parallelism": _number(1)},
        **{"single_submit": _FLAG, "overlap_events": _FLAG, "use_gds": _only(False, _NVME)},
    },
}

REMOVED = {
    "scheduler": "the recipe's `optimizer.warmup_steps` and `optimizer.decay` are the schedule",
    "tensorboard": "TensorBoard is always written, to the run directory",
    "wandb": "metrics go to TensorBoard and metrics.jsonl in the run directory",
    "csv_monitor": "metrics go to TensorBoard and metrics.jsonl in the run directory",
    "torch_autocast": "it leaves state in the process that breaks later engines; use fp16 or bf16",
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
