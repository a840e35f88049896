"""A model's config.json, checked before transformers sees it, and the one form of every message about a model.

In: a path. Out: the file's content, with everything refused that would have the model read otherwise than it was trained,
run code, or build something of an impossible size. Used by model_files.py and loading.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.distillation.models.architectures import ArchitectureSpec, architecture_of_type
from pipeline.errors import UserError

CONFIG_FILE = "config.json"
LFS_POINTER = b"version https://git-lfs"
MOST_CONFIG_BYTES = 16 << 20  # real ones are kilobytes
MOST_LAYERS, MOST_OF_ANYTHING = 1000, 1 << 30  # of anything else: heads, widths, rows of a table
LAYER_KEYS = ("num_hidden_layers", "n_layers")
COUNTS = (
    *(*LAYER_KEYS, "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "embedding_size", "dim", "n_heads", "hidden_dim"),
)
UNQUANTISED = "Give unquantised weights (fp32, bf16 or fp16): the model that it was made from"
# Keys by which a config.json has its model read by other means than the ones here, and what to do about each.
ELSEWHERE = {
    "quantization_config": "its weights are quantised. " + UNQUANTISED,
    "compression_config": "its weights are compressed. " + UNQUANTISED,
    "transformers_weights": "it names its own weights file. Take the key out and call that file model.safetensors",
    "configuration_files": "it names other config files. Put the right one in its place",
}


def refusal(role: str, name: str, cause: str, fix: str) -> UserError:
    return UserError(f"the {role} {name!r} cannot be loaded: {one_line(cause)}. {fix}")


def one_line(text: object) -> str:
    """An exception or text of many lines as the beginning of one."""
    words = " ".join(str(text).split())
    return (words[:500] + " ..." if len(words) > 500 else words or type(text).__name__).rstrip(".")


def read_config(path: Path, name: str, role: str) -> dict[str, Any]:
    """`config.json` as a mapping, with everything refused that would have the model read otherwise than it was trained."""
    fix = "Fetch it again, or copy the config.json of the model that it was made from"
    if not path.is_file():
        raise refusal(role, name, f"{path.name} is missing in {path.parent}", fix)
    content = path.read_bytes() if path.stat().st_size <= MOST_CONFIG_BYTES else b""
    if content.startswith(LFS_POINTER):
        raise refusal(role, name, f"{path} is a Git LFS pointer, not the file", f"Run: git -C {path.parent} lfs pull")
    try:
        config = json.loads(content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise refusal(role, name, f"{path} is not readable JSON ({one_line(error)})", fix) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise refusal(role, name, f"{path} has no `model_type`", fix)
    try:
        family = architecture_of_type(config["model_type"], bool(config.get("is_decoder")))
    except UserError as error:
        raise UserError(f"the {role} {name!r} cannot be loaded: {error}") from None
    problem = _config_problem(config, family)
    if problem:
        raise refusal(role, name, f"in {path}, {problem[0]}", problem[1])
    return config


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of a config")


def _config_problem(config: Mapping[str, Any], family: ArchitectureSpec) -> tuple[str, str] | None:
    """What is wrong, and the fix."""
    for key, why in ELSEWHERE.items():
        if config.get(key):
            cause, _, fix = why.partition(". ")
            return f"`{key}` is set: {cause}", fix
    code = config.get("auto_map")
    if code and (not isinstance(code, dict) or {"AutoConfig", "AutoModel"} & set(code)):
        return (
            "`auto_map` asks for the model's own code, which is never run here",
            "Where transformers' own class is right, take `auto_map` out of config.json; otherwise choose another model",
        )
    positions = config.get("position_embedding_type")
    if family.learned_positions and positions not in (None, "absolute"):
        return (
            f"`position_embedding_type` is {positions!r}: transformers computes absolute positions only, so this would "
            "not be the model that was trained",
            "Choose a model with absolute positions",
        )
    for key in COUNTS:
        value = config.get(key)
        most = MOST_LAYERS if key in LAYER_KEYS else MOST_OF_ANYTHING
        if value is not None and not (type(value) is int and 0 < value <= most):
            return f"`{key}` is {one_line(repr(value)[:60])}; it must be a whole number from 1 to {most}", "Correct it"
    return None
