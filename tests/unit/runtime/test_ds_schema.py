"""Every key of the DeepSpeed JSON: types, ranges, unknown and duplicate keys, and settings that would break a resume."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.runtime import ds_schema
from pipeline.runtime.ds_config import BatchShape, Precisions, resolve
from pipeline.runtime.optimizer import OptimizerConfig
from tests.conftest import REPO

GPU = Precisions(fp16=True, bf16=True, bf16_fast=True, device="a GPU")
BASE = json.loads((REPO / "ds_configs" / "zero2.json").read_text())
DEEP = 100_000


def resolved(path: Path) -> dict[str, Any]:
    return resolve(path, "recipes/x.yaml", OptimizerConfig(), BatchShape(4, 2), 8, GPU)[0]


def error_of(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        resolved(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def with_value(dotted: str, value: Any) -> dict[str, Any]:
    return changed(BASE, dotted, value)


WRONG = [
    ("zero_optimization", 5, "must be an object"),
    ("zero_optimization", [], "must be an object"),
    ("fp16", True, '{"enabled": true}'),
    ("bf16", None, '{"enabled": true}'),
    ("fp16.enabled", 1, "true, false or"),
    ("fp16.enabled", "yes", "true, false or"),
    ("fp16.loss_scale", -1, "0 to"),
    ("fp16.loss_scale", True, "a number"),
    ("fp16.initial_scale_power", 1_000_000_000, "0 to 32"),
    ("fp16.initial_scale_power", "auto", "leave the key out"),
    ("fp16.loss_scale_window", 0, "1 to"),
    ("fp16.min_loss_scale", 0.5, "integer"),
    ("fp16.hysterisis", 2, "did you mean `hysteresis`"),
    ("bf16.check_grad_overflow", False, "skip the step"),
    ("bf16.bf16_master_weights_and_grads", True, "fp32"),
    ("optimizer", "AdamW", "must be an object"),
    ("optimizer.type", "Adam", '"AdamW"'),
    ("optimizer.params", None, "must be an object"),
    ("optimizer.params.foo", 1, "unknown key `optimizer.params.foo`"),
    ("optimizer.params.maximize", True, "the loss would grow"),
    ("optimizer.params.amsgrad", True, "not saved"),
    ("optimizer.params.torch_adam", False, "compiles at start"),
    ("optimizer.params.betas", [0.9], "left out"),
    ("optimizer.params.lr", "1e-3", '"auto"'),
    ("zero_optimization.stage", 4, "1, 2 or 3"),
    ("zero_optimization.stage", True, "1, 2 or 3"),
    ("zero_optimization.stage", "2", "1, 2 or 3"),
    ("zero_optimization.stge", 3, "did you mean `stage`"),
    ("zero_optimization.reduce_bucket_size", -1, "1 to"),
    ("zero_optimization.reduce_bucket_size", 10**18, "1 to"),
    ("zero_optimization.reduce_bucket_size", "auto", "leave the key out"),
    ("zero_optimization.overlap_comm", "false", "true or false"),
    ("zero_optimization.offload_optimizer", None, "or left out"),
    ("zero_optimization.offload_optimizer", {"device": "gpu"}, '"none" or "cpu"'),
    ("zero_optimization.offload_optimizer", {"device": "nvme"}, '"none" or "cpu"'),
    ("zero_optimization.offload_optimizer", {"device": "cpu", "ratio": 0.5}, "left out"),
    ("zero_optimization.offload_param", {"device": "cpu"}, "stage to 3"),
    ("zero_optimization.zero_hpz_partition_size", 2, "old weights"),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, "exported"),
    ("zero_optimization.legacy_stage1", True, "by parameter name"),
    ("zero_optimization.cpu_offload", True, '"offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization.leaf_module", {"names": [1]}, "list of strings"),
    ("communication_data_type", "float16", '"fp16"'),
    ("gradient_clipping", -1, '"auto", or left out'),
    ("train_batch_size", 0, '"auto", or left out'),
    ("train_batch_size", 1.5, '"auto", or left out'),
    ("steps_per_print", 0, "1 to"),
    ("activation_checkpointing", {}, "student.checkpointing"),
    ("checkpoint", {"load_universal": True}, "recipe's `checkpoint`"),
    ("scheduler", {"type": "WarmupLR"}, "remove `scheduler`"),
    ("gradient_cliping", 1.0, "did you mean `gradient_clipping`"),
    ("data_types.grad_accum_dtype", "fp8", '"bf16"'),
    ("flops_profiler.enabled", "true", "true or false"),
]


@pytest.mark.parametrize(("dotted", "value", "words"), WRONG, ids=[f"{key}={value}"[:60] for key, value, _ in WRONG])
def test_the_error_names_key_value_and_fix(dotted: str, value: Any, words: str, tmp_path: Path) -> None:
    message = error_of(tmp_path, json.dumps(with_value(dotted, value)))
    assert dotted.split(".")[-1] in message
    assert words in message


def printed_fixes(config: dict[str, Any], key: str, message: str) -> Iterator[dict[str, Any]]:
    """The config with each of the fixes that the message about `key` names, applied alone."""
    _, _, must_be = message.partition("it must be ")
    if re.search(r": remove `|or left out|leave the key out", message):
        removed = changed(config, key)
        for name, text in re.findall(r'write "(\w+)": (\{.*?\})', message):
            removed = changed(removed, f"{key.rpartition('.')[0]}.{name}", json.loads(text))
        yield removed
    for name in re.findall(r"did you mean `(\w+)`", message):
        yield changed(changed(config, key), ".".join([*key.split(".")[:-1], name]), value_of(config, key))
    words = must_be.partition('. "auto"')[0].partition(":" if "left out:" in must_be else "\n")[0]
    values = re.findall(r'\{"enabled": \w+\}|"\w+"|\btrue\b|\bfalse\b|\bnull\b', words)
    values += re.findall(r"\d", words) if re.match(r"\d", words) else []
    values += [limit for limits in re.findall(r"from (\S+) to ([^\s,]+)", words) for limit in limits]
    for value in values if "list of" not in words else []:
        yield changed(config, key, json.loads(value))


def value_of(config: dict[str, Any], dotted: str) -> Any:
    for name in dotted.split("."):
        config = config[name]
    return config


def changed(config: dict[str, Any], dotted: str, *value: Any) -> dict[str, Any]:
    """A copy with another value; without the key where no value is given."""
    config = json.loads(json.dumps(config))
    *parents, last = dotted.split(".")
    section = config
    for name in parents:
        section = section.setdefault(name, {})
    section.pop(last, None)
    if value:
        (section[last],) = value
    return config


CHECKED_WITH_THE_RECIPE = ("optimizer.params.foo", "zero_optimization.offload_param")


@pytest.mark.parametrize(
    ("dotted", "value"),
    [pytest.param(*row[:2], id=f"{row[0]}={row[1]}"[:60]) for row in WRONG if row[0] not in CHECKED_WITH_THE_RECIPE],
)
def test_every_printed_fix_is_accepted(dotted: str, value: Any, tmp_path: Path) -> None:
    config = changed(BASE, dotted, value)
    message = error_of(tmp_path, json.dumps(config))
    key = next(
        name for name in re.findall(r"`([\w.]+)`", message) if dotted.startswith(name) or name.startswith(dotted)
    )
    fixes = list(printed_fixes(config, key, message))
    assert fixes or re.search("must be an object|list of", message), message
    for fixed in fixes:
        ds_schema.check(fixed, Path("ds.json"))
        (tmp_path / "fixed.json").write_text(json.dumps(fixed))
        if dotted not in (
            "bf16",
            "data_types.grad_accum_dtype",
        ):  # beside the fp16 of `BASE`, one value is the next error
            resolved(tmp_path / "fixed.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * DEEP, "nested too deeply"),
        ('{"bf16":' * DEEP, "nested too deeply"),
        ('{"steps_per_print":' + "9" * 6000 + "}", "not valid JSON"),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', '"bf16" is there twice'),
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', '"stage" is there twice'),
        ('{"gradient_clipping": NaN}', "NaN"),
        ('{"gradient_clipping": 1e999}', "gradient_clipping"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ("", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
    ],
)
def test_text_that_is_not_a_config(text: str | bytes, words: str, tmp_path: Path) -> None:
    assert words in error_of(tmp_path, text)


def test_fused_and_foreach_together(tmp_path: Path) -> None:
    config = with_value("optimizer.params.fused", True)
    config["optimizer"]["params"]["foreach"] = True
    assert "keep one" in error_of(tmp_path, json.dumps(config))


def test_a_byte_order_mark_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    text = json.dumps(with_value("zero_optimization.sub_group_size", 1e9)).replace("1000000000.0", "1e9")
    path.write_text(text, encoding="utf-8-sig")
    assert resolved(path)["zero_optimization"]["sub_group_size"] == 1e9


def test_keys_are_deepspeeds_own() -> None:
    """A key that a later DeepSpeed renames or adds makes this test fail, not a user's run."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, model in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("fp16", DeepSpeedFP16Config),
        ("bf16", DeepSpeedBF16Config),
    ):
        section = ds_schema.CONFIG[name]
        assert isinstance(section, Mapping)
        theirs = {field.alias or key for key, field in model.model_fields.items()}
        removed = {key.split(".")[1] for key in ds_schema.REMOVED if key.startswith(name + ".")}
        assert set(section) | removed == theirs


def example(rule: Any) -> st.SearchStrategy:
    """Values that a rule accepts."""
    if isinstance(rule, Mapping):
        return st.fixed_dictionaries({}, optional={key: example(inner) for key, inner in rule.items()})
    candidates = [
        True,
        False,
        None,
        0,
        1,
        2,
        3,
        10,
        0.5,
        "auto",
        "fp16",
        "bf16",
        "fp32",
        "cpu",
        "none",
        "AdamW",
        [],
        ["x"],
    ]
    return st.sampled_from([value for value in candidates if rule.problem(value) is None] or [rule])


@given(zero=example(ds_schema.CONFIG["zero_optimization"]))
def test_deepspeed_accepts_what_is_accepted_here(zero: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    ds_schema.check({"zero_optimization": zero}, Path("ds.json"))
    DeepSpeedZeroConfig(**zero)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(
    key=st.sampled_from(sorted(ds_schema.CONFIG)),
    inner=st.sampled_from(
        sorted({key for rule in ds_schema.CONFIG.values() if isinstance(rule, Mapping) for key in rule})
    ),
    value=json_values,
    nested=st.booleans(),
)
def test_any_value_anywhere_is_resolved_or_rejected(
    key: str, inner: str, value: Any, nested: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({**BASE, key: {inner: value} if nested else value}))
    with suppress(UserError):  # anything else is a traceback
        assert "auto" not in json.dumps(resolved(path)["fp16"])
