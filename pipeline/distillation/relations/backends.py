"""The table of relation-loss backends, and what a backend gets and returns.

A backend is a function `(RelationInputs, with_gradient) -> RelationSums` in a module of this package. The decorator
`@relation_backend(NAME)` puts it into `BACKENDS`; `relations/__init__.py` imports every module of the package.

Shape suffixes: B rows of the batch, L positions of a row, D channels (each model has its own D).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.errors import UserError


class Span(NamedTuple):
    """A stretch of real tokens in one row. Its queries see its own keys and no others."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class RelationInputs:
    """One relation of teacher and student. `*_keys_BLD` None: the relation of a tensor with itself (Q-Q, K-K, V-V)."""

    teacher_BLD: torch.Tensor
    teacher_keys_BLD: torch.Tensor | None
    student_BLD: torch.Tensor
    student_keys_BLD: torch.Tensor | None
    num_heads: int
    spans: tuple[Span, ...]


@dataclass
class RelationSums:
    """Per row, the sum over heads and queries of KL (3), and its gradient (6) and (7), all without 1 / (A |x| B).

    `grad_queries_BLD` is None where no gradient was asked for. `grad_keys_BLD` is None in a relation of a tensor with
    itself: the gradient of the keys is then added to that of the queries.
    """

    kl_B: torch.Tensor
    grad_queries_BLD: torch.Tensor | None
    grad_keys_BLD: torch.Tensor | None


Backend = Callable[[RelationInputs, bool], RelationSums]
BACKENDS: dict[str, Backend] = {}


def relation_backend(name: str) -> Callable[[Backend], Backend]:
    """Decorator: the function is the backend `name` of `relations.backend`."""

    def register(backend: Backend) -> Backend:
        BACKENDS[name] = backend
        return backend

    return register


class NotUsableHereError(UserError):
    """A backend cannot run on this machine or with these inputs; `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the relation backend `{name}` cannot run here: {reason}. It is named in the recipe, or the run began with it; "
            "set `relations.backend` to `flash` or `chunked`, or to `auto` in a new run"
        )


def cached_on_device(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator for a function that makes a tensor on the host from hashable arguments, such as spans.

    The decorated function has the device as an additional first argument. It keeps the tensors of the last few calls, so
    that a layout which returns costs nothing, and the host does not wait for the copy of a new one.
    """

    @functools.lru_cache(maxsize=16)
    @torch.inference_mode(False)  # a tensor made in inference mode could not be saved for a later backward
    def on_device(device: torch.device, *arguments) -> torch.Tensor:
        on_host = build(*arguments)
        return on_host if device.type == "cpu" else on_host.pin_memory().to(device, non_blocking=True)

    return on_device


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the arithmetic: fp32 for half precision, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
