"""What a run says when memory runs out. That the part is found in real steps: tests/dist/test_ends_of_ranks.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from pipeline.config import Recipe
from pipeline.distillation.config import StudentConfig
from pipeline.errors import DivergedRunError
from pipeline.runtime.dist import Launch
from pipeline.runtime.engine import StudentEngine
from pipeline.training.out_of_memory import (
    OutOfMemoryError,
    explained,
    explanation,
    is_out_of_memory,
    smaller_micro_batch,
)

# As torch 2.8 and later raise it.
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.06 GiB is free. Including "
    "non-PyTorch memory, this process has 78.03 GiB memory in use. Of the allocated memory 74.50 GiB is allocated by PyTorch, "
    "and 2.90 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
RECIPE = dataclasses.replace(Recipe(), global_batch=256, micro_batch_per_gpu=32)


def on(device: str, world_size: int = 8) -> Launch:
    return Launch(3 % world_size, world_size, 0, torch.device(device))


def raised_in(function: Callable, error: BaseException) -> BaseException:
    """The error with the function among its callers."""
    backward = dataclasses.make_dataclass("Engine", ["_engine", "_deterministic"])
    del backward
    try:
        raise error
    except BaseException as caught:
        return caught


class Full:
    """A DeepSpeed engine on a full GPU."""

    def backward(self, loss: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(CUDA)

    def is_gradient_accumulation_boundary(self) -> bool:
        raise torch.OutOfMemoryError(CUDA)
