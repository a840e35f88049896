"""Safetensors files: written with the permissions of the umask, opened with the operating system's own errors.

In: a path, tensors by name. Out: a file, an open file, or whether its header or its tensors can be trusted.
"""

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
    """Give a file of safetensors, which has mode 0600, the mode of any other new file: another user may continue the run."""
    probe = unique_name(path, ".tmp")
    with contextlib.suppress(OSError):  # a file system without modes
        descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            path.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))
        finally:
            os.close(descriptor)
            probe.unlink()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file` of safetensors, with the permissions of the umask."""
    save_file(tensors, path, metadata=metadata)
    follow_umask(path)


def open_tensors(path: Path) -> Any:
    """`safe_open` with the system's errno: the library reports "No such file" for every reason that prevents opening."""

    def attempt() -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError):
            with open(path, "rb") as file:  # raises the error that the library hides
                file.read(1)
            raise

    return read_again(path, attempt)


def has_duplicate_names(path: Path) -> bool:
    """Whether a header holds one tensor name twice. The library would silently use the last one."""
    levels: list[list[str]] = [[]]
    if header := read_again(path, lambda: _header_bytes(path)):
        json.loads(header, object_pairs_hook=lambda pairs: levels.append([key for key, _ in pairs]))
    return len(levels[-1]) != len(set(levels[-1]))  # the outermost object comes last


def _header_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(length) if length < os.fstat(file.fileno()).st_size else b""


def not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that has NaN or infinite elements, or None."""
    return next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
