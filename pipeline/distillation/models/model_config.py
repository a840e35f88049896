"""A model's config.json, checked before transformers reads it, and the form of every message about a model.

In: a path. Out: the file's content. A `UserError` is raised where the config would make transformers build another model
than the one that was trained, run code of the model, or build something of an impossible size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.tokenizer_ids import POSITIONS_FROM_PADDING
from pipeline.distillation.models.architectures import ArchitectureSpec, architecture_of_type
from pipeline.errors import UserError

CONFIG_FILE = "config.json"
LFS_POINTER = b"version https://git-lfs"
MOST_CONFIG_BYTES = 16 << 20  # real ones have kilobytes
MOST_LAYERS, MOST_OF_ANYTHING = 1000, 1 << 30  # of anything else: heads, widths, rows of a table
LAYER_KEYS = ("num_hidden_layers", "n_layers")
COUNTS = (
    *(*LAYER_KEYS, "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "embedding_size", "dim", "n_heads", "hidden_dim"),
)
UNQUANTISED = "Use unquantised weights (fp32, bf16 or fp16): the model that it was made from"
# Keys of a config.json that make transformers read other files or formats, each with its cause and fix.
ELSEWHERE = {
    "quantization_config": ("its weights are quantised", UNQUANTISED),
    "compression_config": ("its weights are compressed", UNQUANTISED),
    "transformers_weights": (
        "it names its own weights file",
        "Remove the key and rename that file to model.safetensors",
    ),
    "configuration_files": ("it names other config files", "Replace config.json by the right one of them"),
}


@dataclass(frozen=True)
class ModelName:
    """A model as the user wrote it (a directory or hub name), and what messages call it: teacher, student or model."""

    name: str
    role: str = "teacher"

    def error(self, cause: str, fix: str) -> UserError:
        """The form of every message about a model that cannot be loaded."""
        return UserError(f"the {self.role} {self.name!r} cannot be loaded: {one_line(cause)}. {fix}")


def one_line(text: object) -> str:
    """An exception or text of many lines as one line of at most 500 characters."""
    words = " ".join(str(text).split())
    return (words[:500] + " ..." if len(words) > 500 else words or type(text).__name__).rstrip(".")


def check_no_lfs_pointer(path: Path, model: ModelName) -> None:
    """Raise a `UserError` if `path` holds a pointer that git-lfs has not replaced by the file."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise model.error(f"{path} is a Git LFS pointer, not the file", f"Run: git -C {path.parent} lfs pull")


def read_config(path: Path, model: ModelName) -> dict[str, Any]:
    """`config.json` as a mapping. Raises `UserError` as the module's first lines say."""
    fix = "Fetch it again, or copy the config.json of the model that it was made from"
    if not path.is_file():
        raise model.error(f"{path.name} is missing in {path.parent}", fix)
    check_no_lfs_pointer(path, model)
    content = path.read_bytes() if path.stat().st_size <= MOST_CONFIG_BYTES else b""
    try:
        config = json.loads(content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise model.error(f"{path} is not readable JSON ({one_line(error)})", fix) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise model.error(f"{path} has no `model_type`", fix)
    try:
        architecture = architecture_of_type(config["model_type"], bool(config.get("is_decoder")))
    except UserError as error:
        raise UserError(f"the {model.role} {model.name!r} cannot be loaded: {error}") from None
    if problem := _config_problem(config, architecture):
        raise model.error(f"in {path}, {problem[0]}", problem[1])
    return config


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number that a config may hold")


def _config_problem(config: Mapping[str, Any], architecture: ArchitectureSpec) -> tuple[str, str] | None:
    """The first problem of a config and its fix."""
    for key, (cause, fix) in ELSEWHERE.items():
        if config.get(key):
            return f"`{key}` is set: {cause}", fix
    code = config.get("auto_map")
    if code and (not isinstance(code, dict) or {"AutoConfig", "AutoModel"} & set(code)):
        return (
            "`auto_map` requires the model's own code, which is never run here",
            "If transformers' own class is right for it, remove `auto_map` from config.json; otherwise choose another model",
        )
    positions = config.get("position_embedding_type")
    if architecture.learned_positions and positions not in (None, "absolute"):
        return (
            f"`position_embedding_type` is {positions!r}: transformers computes absolute positions only, so this would "
            "not be the model that was trained",
            "Choose a model with absolute positions",
        )
    padding = config.get("pad_token_id", 0)
    if config["model_type"] in POSITIONS_FROM_PADDING and not (type(padding) is int and padding >= 0):
        return (
            f"`pad_token_id` is {one_line(repr(padding)[:60])}, and this architecture counts positions from it",
            "Set it to the id of the padding token (1 in RoBERTa and XLM-R)",
        )
    for key in COUNTS:
        value = config.get(key)
        most = MOST_LAYERS if key in LAYER_KEYS else MOST_OF_ANYTHING
        if value is not None and not (type(value) is int and 0 < value <= most):
            return f"`{key}` is {one_line(repr(value)[:60])}; it must be an integer from 1 to {most}", "Correct it"
    return None
