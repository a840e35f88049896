"""The files of a model's directory, checked before transformers reads them: config.json and safetensors, nothing else.

In: a directory or hub name. Out: `ModelFiles`: the config as the file has it, and the file, dtype, shape and offsets of
every tensor. No pickle is read, no code of a model runs, and no file outside the model's directory is opened.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from data_prep.command_line import module_command
from pipeline.distillation.models.architectures import BUFFERS, ArchitectureSpec, architecture_of_type
from pipeline.distillation.models.model_config import (
    CONFIG_FILE,
    LAYER_KEYS,
    UNQUANTISED,
    ModelName,
    check_no_lfs_pointer,
    one_line,
    read_config,
)
from pipeline.errors import UserError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
FLOATS = ("F64", "F32", "BF16", "F16")
POSITIONS = "embeddings.position_embeddings.weight"
CONVERT = (
    "Weights are read from safetensors only; convert others with "
    "`AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)` where you trust them"
)


@dataclass(frozen=True)
class Tensor:
    """One tensor in a safetensors file; `start` and `end` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk."""

    model: ModelName
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # as named in the files

    @property
    def architecture(self) -> ArchitectureSpec:
        return architecture_of_type(self.config["model_type"])

    @property
    def num_parameters(self) -> int:
        """Number of values in all tensors, from the headers alone."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def encoder_tensors(self) -> dict[str, Tensor]:
        """The tensors of the encoder alone, without heads and buffers, by their names in it."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            inner = encoder_name(name, self.architecture)
            if is_ignored(inner, self.architecture, self.config):
                continue
            if inner in found:
                raise self.model.error(
                    f"its files hold `{inner}` twice (once as `{name}`)", "Keep the right one of both"
                )
            found[inner] = tensor
        return found

    def missing_weights_error(self, what: str) -> UserError:
        """The error about weights of the encoder that are not in the files. They would be random."""
        names = sorted(self.tensors)
        wrapper = names[0].partition(".")[0] + "." if names else ""
        own_prefix = f"{self.architecture.prefix}."
        if wrapper not in (own_prefix, ".") and all(name.startswith(wrapper) for name in names):
            fix = (
                f"All names begin with `{wrapper}`: save the model inside the wrapper again (`model._orig_mod` of "
                "torch.compile, `model.module` of DDP), or remove that prefix from the names"
            )
        else:
            fix = "Its files are not complete, or its config.json is another model's: fetch both again"
        shown = f"; they hold, for example, `{names[0]}`" if names else "; they hold no tensor at all"
        return self.model.error(f"its files lack weights of the encoder: {what}{shown}", fix)


def read_model(name_or_path: str | Path, role: str = "teacher", is_cached: bool = False) -> ModelFiles:
    """Config and tensor table of a directory or hub name. With `is_cached`, only the hub's cache is searched.

    Raises `UserError`, which names the file and the fix, if a file is missing, corrupt or of another kind.
    """
    model = ModelName(str(name_or_path), role)
    try:
        directory = find_directory(name_or_path, role, is_cached)
        config = read_config(directory / CONFIG_FILE, model)
        if (directory / ADAPTER_FILE).is_file():
            raise model.error(
                f"{ADAPTER_FILE} says that an adapter (LoRA) changes its weights",
                "Merge it first: `merge_and_unload().save_pretrained(NEW_DIR)` of the peft model",
            )
        tensors: dict[str, Tensor] = {}
        for file in _weight_files(directory, model):
            for key, tensor in _read_tensors(file, model).items():
                if key in tensors:
                    raise model.error(
                        f"`{key}` is in two of its files, {tensors[key].file.name} and {file.name}", "Fetch it again"
                    )
                tensors[key] = tensor
    except OSError as error:
        raise model.error(one_line(error), "Make its files readable, or fetch it again") from None
    files = ModelFiles(model, directory, config, tensors)
    _check_tensors(files)
    return files


# -- the directory


def looks_like_path(name: str) -> bool:
    """Hub names are NAME or OWNER/NAME. Names that start like a path or with a directory of this repository are paths."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.split("/")[0] in ("artifacts", "runs")


def find_directory(name_or_path: str | Path, role: str = "teacher", is_cached: bool = False) -> Path:
    """The model's directory, or one commit of it in the hub's cache, fetched if it is not there yet."""
    model = ModelName(str(name_or_path), role)
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111 (Path's raises where ~USER does not exist)
    if path.is_dir() and model.name:
        return path
    if path.exists() and model.name:
        raise model.error("it is a file", f"Name its directory: {path.parent}")
    if looks_like_path(model.name):
        if role != "teacher":
            raise UserError(
                f"{role} not found: {model.name} is not a directory. Give the directory that "
                f"`{module_command('pipeline', 'export', 'RUN_DIR', '--output', 'DIR')}` wrote, another Hugging Face directory, or a hub name"
            )
        raise UserError(
            f"teacher not found: {model.name} is not a directory. "
            f"`{module_command('demo.teacher', '--output', model.name)}` makes the quickstart's teacher (`make demo` does "
            "everything); for another one set `teacher:` to a Hugging Face directory or to a hub name like "
            "FacebookAI/xlm-roberta-base"
        )
    return _fetch(model, is_cached)


def _fetch(model: ModelName, is_cached: bool) -> Path:
    """All files from one commit, because a hub name may move between two requests."""
    more: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_cached}
    missing_ok = {"_raise_exceptions_for_missing_entries": False}
    try:
        config = Path(str(cached_file(model.name, CONFIG_FILE, **more)))
        if config.parent.parent.name == "snapshots":
            more["revision"] = config.parent.name
        if cached_file(model.name, WEIGHTS_FILE, **more, **missing_ok) is None:
            index = cached_file(model.name, INDEX_FILE, **more, **missing_ok)
            if index is None:
                raise model.error(
                    "the hub has no safetensors file of it",
                    f"Convert it where you trust it: hf download {model.name} --local-dir DIR, then "
                    '`AutoModel.from_pretrained("DIR").save_pretrained("NEW_DIR")` in Python',
                )
            for file in _files_of_index(Path(index), model):
                cached_file(model.name, file, **more)
    except UserError:
        raise
    except Exception as error:  # network, cache and hub raise many kinds
        raise model.error(
            f"no such directory, and as a hub name: {one_line(error)}",
            "A hub name needs the network once (or `HF_HOME` with a filled cache); a directory needs config.json and "
            "model.safetensors",
        ) from None
    return config.parent


# -- *.safetensors


def _weight_files(directory: Path, model: ModelName) -> list[Path]:
    """The safetensors files of the directory: model.safetensors, or those that the index names."""
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        no_index = f" and no index of {', '.join(others[:3])}" if others else ""
        raise model.error(f"{directory} holds no {WEIGHTS_FILE}{no_index}", CONVERT)
    files = [directory / file for file in _files_of_index(index, model)]
    for file in files:
        if not file.is_file():
            raise model.error(f"{file} is missing, which {INDEX_FILE} names", "Fetch it again")
    return files


def _files_of_index(index: Path, model: ModelName) -> list[str]:
    """File names in an index, each a *.safetensors file of the same directory."""
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        names = sorted({str(file) for file in files})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise model.error(f"{index} is no index of weights ({one_line(error)})", "Fetch it again") from None
    for file in names:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise model.error(
                f"{index} names {file!r}; it may name *.safetensors files of its own directory and nothing else",
                CONVERT,
            )
    return names


def _read_tensors(path: Path, model: ModelName) -> dict[str, Tensor]:
    """The header of one safetensors file, which must describe the complete file."""
    check_no_lfs_pointer(path, model)
    try:
        with safe_open(path, framework="pt"):  # checks lengths, types and offsets against the file's size
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unique_names)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise model.error(f"{path} is cut short or corrupt ({one_line(error)})", "Fetch it again") from None
    found = {}
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            found[key] = Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
    return found


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("it names a tensor twice")
    return dict(pairs)


# -- the encoder's tensors


def encoder_name(name: str, architecture: ArchitectureSpec) -> str:
    """A tensor's name in the bare encoder: without the prefix of a class with a head, and in today's spelling."""
    name = name.removeprefix(f"{architecture.prefix}.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def is_ignored(name: str, architecture: ArchitectureSpec, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a head or a buffer, without which the encoder computes the same."""
    if architecture.positions_key and name == POSITIONS and not config.get(architecture.positions_key, True):
        return True
    return name.endswith(BUFFERS) or name.startswith(tuple(f"{head}." for head in architecture.heads))


def _check_tensors(files: ModelFiles) -> None:
    """Check names and dtypes before a model of the config's size is built."""
    tensors = files.encoder_tensors()
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise files.model.error(
                f"`{name}` is stored as {tensor.dtype} in {tensor.file.name}: its weights are quantised", UNQUANTISED
            )
    layers = files.architecture.layers
    layer = re.compile(re.escape(layers) + r"\.(\d+)\.")
    numbers = {int(match[1]) for name in tensors if (match := layer.match(name))}
    for key in LAYER_KEYS:
        claimed = files.config.get(key)
        if claimed is not None and claimed > len(numbers):
            missing = next(number for number in range(claimed) if number not in numbers)
            raise files.missing_weights_error(f"those of `{layers}.{missing}` ({key} is {claimed} in {CONFIG_FILE})")
