"""One safetensors file: written under the mode that the umask asks for, opened with the errno of the system."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.shards import read_again


def follow_umask(path: Path) -> None:
    """Give a file that safetensors wrote (0600) the mode of any other new file: a group that shares the run continues it."""
    probe = path.with_name(f".{path.name}.mode.tmp")
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


def not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor with elements that are NaN or infinite."""
    return next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
