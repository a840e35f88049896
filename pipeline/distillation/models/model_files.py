"""What a model's directory holds, read and checked before transformers sees it: config.json and safetensors, nothing else.

In: a directory or hub name. Out: `ModelFiles`: the config as it stands in the file, and of every tensor its file, type,
shape and place. No pickle is read, no code of a model runs, and no file outside the model's own directory is named.
Used by loading.py (load them) and by pipeline/training/identity.py (hash them).
"""

from __future__ import annotations

import json
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
    LFS_POINTER,
    UNQUANTISED,
    one_line,
    read_config,
    refusal,
)
from pipeline.errors import UserError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
FLOATS = ("F64", "F32", "BF16", "F16")
POSITIONS = "embeddings.position_embeddings.weight"


@dataclass(frozen=True)
class Tensor:
    """One tensor in a safetensors file; `start` and `end` count bytes of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `name` is what the user wrote, `whose` what messages call it."""

    name: str
    role: str
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # as named in the files

    @property
    def family(self) -> ArchitectureSpec:
        return architecture_of_type(self.config["model_type"])

    def encoder_tensors(self) -> dict[str, Tensor]:
        """The tensors of the encoder alone, without heads and buffers, by their names in it."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            inner = encoder_name(name, self.family)
            if is_harmless(inner, self.family, self.config):
                continue
            if inner in found:
                raise self.refusal(f"its files hold `{inner}` twice (once as `{name}`)", "Keep the right one of both")
            found[inner] = tensor
        return found

    def lacking(self, what: str) -> UserError:
        """Weights of the encoder are not in the files; they would be random."""
        names = sorted(self.tensors)
        wrapper = names[0].partition(".")[0] + "." if names else ""
        if wrapper != f"{self.family.prefix}." and wrapper != "." and all(name.startswith(wrapper) for name in names):
            fix = (
                f"All names begin with `{wrapper}`: save the model inside the wrapper again (`model._orig_mod` of "
                "torch.compile, `model.module` of DDP), or take that off the names"
            )
        else:
            fix = "Its files are not complete, or its config.json is another model's: fetch both again"
        shown = f"; they hold, for example, `{names[0]}`" if names else "; they hold no tensor at all"
        return self.refusal(f"its files lack weights of the encoder: {what}{shown}", fix)

    def refusal(self, cause: str, fix: str) -> UserError:
        """The one form of every message about a model that is not loaded."""
        return refusal(self.role, self.name, cause, fix)


def read_model(name_or_path: str | Path, role: str = "teacher", is_cached: bool = False) -> ModelFiles:
    """Config and tensor table of a model; whatever is wrong with them is a `UserError` that names it. With `is_cached`
    a hub name is not looked up in the network."""
    name = str(name_or_path)
    try:
        directory = find_directory(name_or_path, role, is_cached)
        config = read_config(directory / CONFIG_FILE, name, role)
        if (directory / ADAPTER_FILE).is_file():
            raise refusal(
                *(role, name, f"{ADAPTER_FILE} says that an adapter (LoRA) changes its weights"),
                "Merge it first: `merge_and_unload().save_pretrained(NEW_DIR)` of the peft model",
            )
        tensors: dict[str, Tensor] = {}
        for file in weight_files(directory, name, role):
            for key, tensor in read_tensors(file, name, role).items():
                if key in tensors:
                    raise refusal(
                        role,
                        name,
                        f"`{key}` is in two of its files, {tensors[key].file.name} and {file.name}",
                        "Fetch it again",
                    )
                tensors[key] = tensor
    except OSError as error:
        raise refusal(role, name, one_line(error), "Make its files readable, or fetch it again") from None
    files = ModelFiles(name, role, directory, config, tensors)
    _check_tensors(files)
    return files


# -- where it is


def looks_like_path(name: str) -> bool:
    """Hub names are NAME or OWNER/NAME; what starts like a path or names a directory of this repo is a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.split("/")[0] in ("artifacts", "runs")


def find_directory(name_or_path: str | Path, role: str = "teacher", is_cached: bool = False) -> Path:
    """The model's directory: itself, or one commit of it in the hub's cache, fetched where it is not there yet."""
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if path.is_dir() and name:
        return path
    if path.exists() and name:
        raise refusal(role, name, "it is a file", f"Name its directory: {path.parent}")
    if looks_like_path(name):
        if role != "teacher":
            raise UserError(
                f"there is no {role} at {name}. Give the directory that `python -m pipeline export RUN_DIR --output DIR` "
                "wrote, another Hugging Face directory, or a hub name"
            )
        raise UserError(
            f"there is no teacher at {name}. `{module_command('demo.teacher', '--output', name)}` makes the "
            "quickstart's (`make demo` does it all); for another one set `teacher:` to a Hugging Face directory or to a "
            "hub name like FacebookAI/xlm-roberta-base"
        )
    return _fetch(name, role, is_cached)


def _fetch(name: str, role: str, is_cached: bool) -> Path:
    """All files from one commit: a hub name may move between two look-ups."""
    more: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_cached}
    missing_ok = {"_raise_exceptions_for_missing_entries": False}
    try:
        config = Path(str(cached_file(name, CONFIG_FILE, **more)))
        if config.parent.parent.name == "snapshots":
            more["revision"] = config.parent.name
        if cached_file(name, WEIGHTS_FILE, **more, **missing_ok) is None:
            index = cached_file(name, INDEX_FILE, **more, **missing_ok)
            if index is None:
                raise refusal(
                    *(role, name, "the hub has no safetensors file of it"),
                    f"Convert it where you trust it: hf download {name} --local-dir DIR, then `AutoModel.from_pretrained("
                    '"DIR").save_pretrained("NEW_DIR")` in Python',
                )
            for file in _files_of_index(Path(index), name, role):
                cached_file(name, file, **more)
    except UserError:
        raise
    except Exception as error:  # whatever network, cache and hub come up with
        raise refusal(
            *(role, name, f"no such directory, and as a hub name: {one_line(error)}"),
            "A hub name needs the network once (or `HF_HOME` with a filled cache); a directory needs config.json and "
            "model.safetensors",
        ) from None
    return config.parent


# -- *.safetensors


def weight_files(directory: Path, name: str, role: str) -> list[Path]:
    """The files that hold the weights: one, or those that the index names. They lie in the directory (a hub's cache
    links them to its blobs) and are safetensors."""
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        cause = f"{directory} holds no {WEIGHTS_FILE}" + (f" and no index of {', '.join(others[:3])}" if others else "")
        raise refusal(
            *(role, name, cause),
            "Weights are read from safetensors only; convert others with "
            "`AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)` where you trust them",
        )
    files = [directory / file for file in _files_of_index(index, name, role)]
    for file in files:
        if not file.is_file():
            raise refusal(role, name, f"{file} is missing, which {INDEX_FILE} names", "Fetch it again")
    return files


def _files_of_index(index: Path, name: str, role: str) -> list[str]:
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        names = sorted({str(file) for file in files})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refusal(role, name, f"{index} is no index of weights ({one_line(error)})", "Fetch it again") from None
    for file in names:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise refusal(
                *(role, name, f"{index} names {file!r}; it may name *.safetensors files beside it and nothing else"),
                "Weights are read from safetensors only; convert others with "
                "`AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)` where you trust them",
            )
    return names


def read_tensors(path: Path, name: str, role: str) -> dict[str, Tensor]:
    """The header of one safetensors file, which must describe the whole file."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise refusal(
                role, name, f"{path} is a Git LFS pointer, not the weights", f"Run: git -C {path.parent} lfs pull"
            )
    fix = "Fetch it again"
    try:
        with safe_open(path, framework="pt"):  # checks lengths, types and offsets against the file's size
            pass
        levels: list[list[str]] = [[]]
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _note_names(pairs, levels))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise refusal(role, name, f"{path} is cut short or corrupt ({one_line(error)})", fix) from None
    if len(levels[-1]) != len(set(levels[-1])):  # the outermost object comes last
        raise refusal(role, name, f"{path} names a tensor twice", fix)
    found = {}
    for key, entry in header.items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            found[key] = Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
    return found


def _note_names(pairs: list[tuple[str, Any]], levels: list[list[str]]) -> dict[str, Any]:
    levels.append([key for key, _ in pairs])
    return dict(pairs)


# -- which tensors are the encoder's


def encoder_name(name: str, family: ArchitectureSpec) -> str:
    """A tensor's name in the bare encoder: without the prefix of a class with a head, and as it is called today."""
    name = name.removeprefix(f"{family.prefix}.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def is_harmless(name: str, family: ArchitectureSpec, config: Mapping[str, Any]) -> bool:
    """Of a head or a buffer: the encoder computes the same without it."""
    if family.positions_key and name == POSITIONS and not config.get(family.positions_key, True):
        return True
    return name.endswith(BUFFERS) or name.startswith(tuple(f"{head}." for head in family.heads))


def _check_tensors(files: ModelFiles) -> None:
    """What can be told from names and types alone, before a model of the config's size is built."""
    tensors = files.encoder_tensors()
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise files.refusal(
                f"`{name}` is stored as {tensor.dtype} in {tensor.file.name}: its weights are quantised", UNQUANTISED
            )
    layer = re.compile(re.escape(files.family.layers) + r"\.(\d+)\.")
    numbers = {int(match[1]) for name in tensors if (match := layer.match(name))}
    for key in LAYER_KEYS:
        claimed = files.config.get(key)
        if claimed is not None and claimed > len(numbers):
            missing = next(number for number in range(claimed) if number not in numbers)
            raise files.lacking(f"those of `{files.family.layers}.{missing}` ({key} is {claimed} in {CONFIG_FILE})")
