"""One safetensors file: written under the mode that the umask asks for, opened with the errno of the system."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.durable_files import unique_name
from data_prep.shards import read_again


def follow_umask(path: Path) -> None:
    """Give a file that safetensors wrote (0600) the mode of any other new file: a group that shares the run continues it."""
    probe = unique_name(path, ".tmp")
    with contextlib.suppress(OSError):  # a file system without modes
        descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            path.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))
        finally:
            os.close(descriptor)
            probe.unlink()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file` under the mode that the umask asks for."""
    save_file(tensors, path, metadata=metadata)
    follow_umask(path)


def open_tensors(path: Path) -> Any:
    """`safe_open`, with the errno of the system: the library reports "No such file" for whatever keeps it from opening."""

    def attempt() -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError):
            with open(path, "rb") as file:  # raises what the library hides
                file.read(1)
            raise

    return read_again(path, attempt)


def names_a_tensor_twice(path: Path) -> bool:
    """Whether a header holds one name twice: the library takes the last one."""
    levels: list[list[str]] = [[]]
    if header := read_again(path, lambda: _header_bytes(path)):
        json.loads(header, object_pairs_hook=lambda pairs: levels.append([key for key, _ in pairs]))
    return len(levels[-1]) != len(set(levels[-1]))  # the outermost object comes last


def _header_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(length) if length < os.fstat(file.fileno()).st_size else b""


def not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor with elements that are NaN or infinite."""
    return next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
