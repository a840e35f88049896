"""Deterministic gradients, on a GPU too, so that a resumed run ends with the same student as an uninterrupted one.

By default the attention kernels that torch chooses on a GPU (cuDNN's on Hopper, FlashAttention-2 elsewhere) sum the gradient
of the queries in any order: two runs of 12 steps on one H200 differed (benchmarks/results). Torch's strict mode selects
kernels that sum in a fixed order, and raises where there is none. It is on during the student's forward, which selects the
kernel of its backward, and during backward. The teacher keeps the fastest kernels: their forward is deterministic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")  # documented by cuBLAS as reproducible, accepted by torch's strict mode


def fix_workspace() -> None:
    """Set cuBLAS's workspace before CUDA starts. Raises `UserError` where the environment sets another one."""
    asked = os.environ.setdefault(WORKSPACE, FIXED_WORKSPACES[0])
    if asked not in FIXED_WORKSPACES:
        raise UserError(
            f"{WORKSPACE} is {asked!r} in the environment: with it matrix products may sum in any order, and a resumed run "
            f"differs in last bits. Run `unset {WORKSPACE}`, or give `--set deterministic=false`"
        )


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Torch's strict mode inside the block. Raises `UserError` where an operation has no deterministic kernel."""
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its setting is a property that type checkers do not know
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it would fill every empty tensor
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(
            f"this student cannot be trained with the same bits every time here: {str(error).splitlines()[0]} With `--set "
            "deterministic=false` it trains; a resumed run then differs from an uninterrupted one in last bits"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
