"""DeepSpeed JSON against recipe and device, the learning rate schedule, and weight decay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from pipeline.errors import UserError
from pipeline.runtime.ds_config import BatchShape, Precisions, precision_of, resolve, split_batch
from pipeline.runtime.optimizer import OptimizerConfig, learning_rate, parameter_groups
from tests.conftest import REPO

GPU = Precisions(fp16=True, bf16=True, bf16_fast=True, device="a GPU")
OLD_GPU = Precisions(fp16=True, bf16=False, bf16_fast=False, device="an old GPU")
CPU = Precisions(fp16=False, bf16=True, bf16_fast=False, device="this CPU")
FAST_CPU = Precisions(fp16=False, bf16=True, bf16_fast=True, device="this CPU")
BATCH = BatchShape(micro_batch=4, accumulation=2)


def resolved(path: Path, can: Precisions) -> tuple[dict, list[str]]:
    return resolve(path, "recipes/x.yaml", OptimizerConfig(), BATCH, 8, can)


@pytest.mark.parametrize("path", sorted((REPO / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_resolve_without_auto(path: Path) -> None:
    config, warnings = resolved(path, GPU)
    assert warnings == []
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 64
    assert precision_of(config) == ("bf16" if "bf16" in path.stem else "fp16")


@pytest.mark.parametrize(
    ("given", "fused"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"fused": None}, None),
        ({"foreach": True}, False),
        ({"foreach": False}, True),
    ],
)
def test_adamw_is_fused_unless_the_json_says_otherwise(given: dict, fused: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {"params": given}}))
    assert resolved(path, GPU)[0]["optimizer"]["params"]["fused"] is fused


def test_no_timer_waits_for_the_gpu() -> None:
    from deepspeed.utils.config import get_timers_config

    config, _ = resolved(REPO / "ds_configs" / "zero2.json", GPU)
    assert get_timers_config(config).enabled is False


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_zero3_keeps_torchs_linear(name: str) -> None:
    """DeepSpeed's replaces `F.linear` in the complete process, the teacher included."""
    config, _ = resolved(REPO / "ds_configs" / f"{name}.json", GPU)
    assert config["zero_optimization"]["memory_efficient_linear"] is False


@pytest.mark.parametrize(("can", "instead"), [(CPU, "fp32"), (FAST_CPU, "bf16")])
def test_fp16_falls_back_with_one_warning(can: Precisions, instead: str) -> None:
    config, warnings = resolved(REPO / "ds_configs" / "zero2.json", can)
    assert precision_of(config) == instead
    assert len(warnings) == 1
    assert "zero2.json" in warnings[0]
    assert "this CPU" in warnings[0]
    assert instead in warnings[0]


def test_fp16_where_bf16_is_faster_is_done_and_said() -> None:
    both = Precisions(fp16=True, bf16=True, bf16_fast=True, device="this CPU", bf16_faster=True)
    config, warnings = resolved(REPO / "ds_configs" / "zero2.json", both)
    assert precision_of(config) == "fp16"
    (warning,) = warnings
    better = warning.rpartition("as in ")[2]
    config, warnings = resolved(REPO / better, both)
    assert (precision_of(config), warnings) == ("bf16", [])


def test_bf16_on_a_gpu_without_bf16_names_the_config_to_use() -> None:
    with pytest.raises(UserError, match=r"zero2\.json"):
        resolved(REPO / "ds_configs" / "zero2_bf16.json", OLD_GPU)


def test_auto_precision_is_never_silently_off(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}))
    assert precision_of(resolved(path, GPU)[0]) == "fp16"


def gradients_config(path: Path, precision: str, stage: int, **keys: Any) -> Path:
    zero = {"stage": stage, **keys.pop("zero", {})}
    path.write_text(json.dumps({precision: {"enabled": True}, "zero_optimization": zero, **keys}))
    return path


@pytest.mark.parametrize(
    ("precision", "stage", "keys", "message"),
    [
        ("bf16", 1, {"data_types": {"grad_accum_dtype": "fp32"}}, "set zero_optimization.stage to 2"),
        ("bf16", 2, {"data_types": {"grad_accum_dtype": "fp16"}}, "is fp16, but the student computes in bf16"),
        ("fp16", 3, {"data_types": {"grad_accum_dtype": "bf16"}}, "is bf16, but the student computes in fp16"),
        ("fp16", 2, {"prescale_gradients": True}, "`prescale_gradients` is true, .* at stage 2"),
        ("bf16", 3, {"gradient_predivide_factor": 2.0}, "`gradient_predivide_factor` is 2.0, .* at stage 3"),
    ],
)
def test_gradients_that_deepspeed_would_end_at(
    precision: str, stage: int, keys: dict, message: str, tmp_path: Path
) -> None:
    """Each is a traceback in DeepSpeed 0.19.8, or in what reads its state."""
    with pytest.raises(UserError, match=message) as caught:
        resolved(gradients_config(tmp_path / "ds.json", precision, stage, **keys), GPU)
    assert str(tmp_path / "ds.json") in str(caught.value)
    assert "remove " in str(caught.value)
    resolved(gradients_config(tmp_path / "ds.json", precision, stage), GPU)


def fixed_configs(path: Path, message: str, key: str) -> list[dict[str, Any]]:
    """The config with each of the fixes that the message names, applied alone."""
    found = []
    for fix in re.findall(r'write ("\w+")|stage to (\d)|(remove (?:it|the key))', message):
        config = json.loads(path.read_text())
        *parents, last = key.split(".")
        section = config
        for name in parents:
            section = section[name]
        if fix[0]:
            section[last] = json.loads(fix[0])
        elif fix[1]:
            config["zero_optimization"]["stage"] = int(fix[1])
        else:
            del section[last]
        found.append(config)
    return found


@pytest.mark.parametrize(
    ("precision", "stage", "key", "keys"),
    [
        ("bf16", 1, "data_types.grad_accum_dtype", {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("bf16", 1, "data_types.grad_accum_dtype", {"data_types": {"grad_accum_dtype": "fp16"}}),
        ("bf16", 2, "data_types.grad_accum_dtype", {"data_types": {"grad_accum_dtype": "fp16"}}),
        ("fp16", 1, "data_types.grad_accum_dtype", {"data_types": {"grad_accum_dtype": "bf16"}}),
        ("fp16", 2, "prescale_gradients", {"prescale_gradients": True}),
        ("bf16", 3, "gradient_predivide_factor", {"gradient_predivide_factor": 2.0}),
        ("fp16", 2, "zero_optimization.offload_param", {"zero": {"offload_param": {"device": "cpu"}}}),
        ("fp16", 2, "train_batch_size", {"train_batch_size": 7}),
        ("fp16", 2, "optimizer.params.lr", {"optimizer": {"params": {"lr": 7}}}),
    ],
)
def test_the_fixes_of_an_error_are_accepted(precision: str, stage: int, key: str, keys: dict, tmp_path: Path) -> None:
    path = gradients_config(tmp_path / "ds.json", precision, stage, **keys)
    with pytest.raises(UserError) as error:
        resolved(path, GPU)
    fixes = fixed_configs(path, str(error.value), key)
    assert fixes
    for fixed in fixes:
        path.write_text(json.dumps(fixed))
        resolved(path, GPU)


def test_each_stage_that_is_named_is_accepted(tmp_path: Path) -> None:
    for stage in (0, 4):
        path = gradients_config(tmp_path / "ds.json", "fp16", stage)
        with pytest.raises(UserError) as error:
            resolved(path, GPU)
        named = re.findall(r"\d", re.findall(r"(?:use|must be) (1[^(.]*)", str(error.value))[0])
        assert named == ["1", "2", "3"]
        for number in named:
            resolved(gradients_config(path, "fp16", int(number)), GPU)


def test_the_config_for_a_gpu_without_bf16_exists_and_works() -> None:
    with pytest.raises(UserError) as error:
        resolved(REPO / "ds_configs" / "zero2_bf16.json", OLD_GPU)
    (named,) = re.findall(r"use (\S+\.json)", str(error.value))
    resolved(REPO / named, OLD_GPU)


@pytest.mark.parametrize(
    ("precision", "stage", "keys"),
    [
        ("bf16", 1, {"data_types": {"grad_accum_dtype": "bf16"}}),
        ("bf16", 2, {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("bf16", 3, {"data_types": {"grad_accum_dtype": None}}),
        ("fp16", 1, {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("bf16", 1, {"data_types": {"grad_accum_dtype": "fp32"}, "zero": {"offload_optimizer": {"device": "cpu"}}}),
        ("fp16", 1, {"gradient_predivide_factor": 2.0, "prescale_gradients": True}),
        ("fp16", 2, {"prescale_gradients": True, "zero": {"reduce_scatter": False}}),
    ],
)
def test_gradients_that_deepspeed_has(precision: str, stage: int, keys: dict, tmp_path: Path) -> None:
    resolved(gradients_config(tmp_path / "ds.json", precision, stage, **keys), GPU)


@pytest.mark.parametrize(("can", "instead"), [(CPU, "fp32"), (FAST_CPU, "bf16")])
def test_micro_batches_add_up_in_the_precision_that_replaces_fp16(
    can: Precisions, instead: str, tmp_path: Path
) -> None:
    path = gradients_config(tmp_path / "ds.json", "fp16", 1, data_types={"grad_accum_dtype": "fp16"})
    assert resolved(path, can)[0]["data_types"]["grad_accum_dtype"] == instead


@pytest.mark.parametrize(
    ("global_batch", "micro", "ranks", "expected"),
    [(256, 32, 8, BatchShape(32, 1)), (256, 8, 8, BatchShape(8, 4)), (16, 16, 2, BatchShape(8, 1))],
)
def test_batch_is_divided(global_batch: int, micro: int, ranks: int, expected: BatchShape) -> None:
    assert split_batch(global_batch, micro, ranks) == expected


def test_batch_that_does_not_divide_names_values_that_do() -> None:
    with pytest.raises(UserError, match="global_batch=12"):
        split_batch(13, 4, 3)
    with pytest.raises(UserError, match="1, 2, 3, 4, 6, 12"):
        split_batch(12, 5, 1)


def test_learning_rate_rises_and_falls() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0, decay="constant"), 11, 12) == 1.0


def test_cosine_is_that_of_transformers() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = get_cosine_schedule_with_warmup(torch.optim.SGD([parameter], lr=1.0), 0, 40)
    config = OptimizerConfig(lr=1.0, warmup_steps=0, decay="cosine")
    for step in range(40):
        assert learning_rate(config, step, 40) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        theirs.optimizer.step()
        theirs.step()
    assert learning_rate(config, 40, 40) == 0


def test_the_stable_rate_falls_at_the_end() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=3, decay="wsd", decay_share=0.25)
    rates = [learning_rate(config, step, 16) for step in range(17)]
    assert rates[:3] == [0.25, 0.5, 0.75]
    assert rates[3:] == [*[1.0] * 10, 0.75, 0.5, 0.25, 0.0]
    longer = [learning_rate(config, step, 32) for step in range(13)]
    assert longer == rates[:13], "more steps change nothing before the decay"
    rising = OptimizerConfig(lr=1.0, warmup_steps=14, decay="wsd", decay_share=1.0)
    assert learning_rate(rising, 14, 16) == 1.0, "a decay that is longer than what the warm-up leaves begins after it"
    with pytest.raises(UserError, match=r"optimizer\.decay_share"):
        OptimizerConfig(decay_share=1.5)


def test_biases_and_norms_are_not_decayed() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    trained = dict(layer.named_parameters())
    decayed, plain = parameter_groups(trained, 0.01)
    names = {id(parameter): name for name, parameter in trained.items()}
    assert decayed["weight_decay"] == 0.01
    assert plain["weight_decay"] == 0.0
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] for p in plain["params"])
    assert not any("bias" in names[id(p)] or "norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"warmup_steps": -1}])
def test_invalid_optimizer_settings(wrong: dict) -> None:
    with pytest.raises(UserError):
        OptimizerConfig(**wrong)
