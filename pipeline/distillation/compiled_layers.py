"""`torch.compile` layer by layer: one graph serves all layers of an encoder that are alike.

In: a tapped encoder. Out: the same module. Each layer's `forward` is compiled in place, so names in checkpoints, hooks of
ZeRO-3 and recomputed activations stay as they are, outside the graph. Only training batches run compiled: they have one
shape. Held-out batches, whose shapes vary, run in `uncompiled()`. A layer that is read (`TapLayer`) is not compiled.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters, get_compilation_metrics
from torch._inductor import config as inductor_config

from pipeline.distillation.tap import TappedEncoder
from pipeline.errors import UserError

logger = logging.getLogger(__name__)
LINEAR = nn.functional.linear


def compile_layers(encoder: TappedEncoder, key: str, deterministic: bool = True) -> None:
    """Compile each layer of `encoder` at its first batch.

    Args:
        encoder: its layers are changed in place; parameters and names are not.
        key: of the recipe, for messages: `student.compile`, say.
        deterministic: choose kernels without timing them, so that every start sums in the same order.
    """
    encoder.attends_by_document = False
    for layer in encoder.complete_layers:
        layer.forward = CompiledForward(layer, key, _options(deterministic))


def _options(deterministic: bool) -> dict[str, Any]:
    """Options of inductor. By default it times variants of its GPU kernels, and the fastest may differ between starts."""
    if not deterministic:
        return {}
    has_key = hasattr(inductor_config, "deterministic")  # newer versions of torch
    return {"deterministic": True} if has_key else {"triton.autotune_pointwise": False}


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is a layer that `compile_layers` compiled."""
    return isinstance(module.__dict__.get("forward"), CompiledForward)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Context in which compiled layers run as written. Their graphs stay."""
    before, CompiledForward.enabled = CompiledForward.enabled, False
    try:
        yield
    finally:
        CompiledForward.enabled = before


@contextlib.contextmanager
def _torchs_linear() -> Iterator[None]:
    """Context with torch's own `F.linear`, which DeepSpeed replaces in the complete process under ZeRO-3.

    In torch 2.11 a compiled layer has no gradients of the weights that DeepSpeed's function computes with.
    """
    replaced, nn.functional.linear = nn.functional.linear, LINEAR
    try:
        yield
    finally:
        nn.functional.linear = replaced


def check_compiler(key: str, device: torch.device) -> None:
    """Compile a small function and its gradient on `device`. Raises `UserError` where that does not work."""
    try:
        values = torch.ones(8, device=device, requires_grad=True)
        torch.compile(_small_function, dynamic=False, fullgraph=True)(values).backward()
    except Exception as error:  # a missing compiler, header, triton or writable directory: each has a type of its own
        needs = "triton and a C compiler" if device.type == "cuda" else "a C++ compiler (g++, or the one in CXX)"
        raise UserError(
            f"`{key}: true`, but torch.compile does not work on {device.type} here: {_first_line(error)} It requires {needs}, "
            f"Python's headers and a writable directory for its files. Install them, or give `--set {key}=false`"
        ) from error


def _small_function(values: torch.Tensor) -> torch.Tensor:
    return (values.sin() + 1).sum()


class CompiledForward:
    """The compiled `forward` of one layer.

    The first call is the warm-up: it makes a graph, or finds that of a layer like it. A graph that a later call requires is
    made too, because with it the run stays the one that a restart would repeat. It is logged as an error, because the run
    waits for each one, and no batch of a run should require it.
    """

    enabled: ClassVar[bool] = True

    def __init__(self, layer: nn.Module, key: str, options: dict[str, Any]) -> None:
        self._layer, self._key, self._options = layer, key, options
        self._plain = type(layer).forward.__get__(layer)
        self._compiled = torch.compile(self._plain, dynamic=False, fullgraph=True, options=options)
        self._first: dict[str, str] | None = None  # what the first call was, for messages

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if not CompiledForward.enabled:
            return self._plain(*arguments, **keywords)
        graphs = _num_graphs()
        try:
            with _torchs_linear():
                result = self._compiled(*arguments, **keywords)
        except (FailOnRecompileLimitHit, TorchDynamoException) as error:
            return self._without_graph(error, arguments, keywords)
        if self._first is None:
            self._first = self._describe(arguments, keywords)
        elif _num_graphs() > graphs:
            logger.error(
                f"`{self._key}`: a {type(self._layer).__name__} was compiled again after its first batch: "
                f"{self._changes(arguments, keywords)}. Training waited for it, and its results are right. All batches of a run "
                f"have one shape, so that this is a fault; if it repeats, resume with `--set {self._key}=false`"
            )
        return result

    def _without_graph(self, error: Exception, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Stop before the first step where a layer cannot be compiled; later, run this layer as written from now on."""
        name = type(self._layer).__name__
        if self._first is None:
            raise UserError(
                f"`{self._key}: true`, but torch.compile cannot compile a {name}: {_first_line(error)} "
                f"Give `--set {self._key}=false`"
            ) from error
        logger.error(
            f"`{self._key}`: a {name} could not be compiled again after its first batch: {_first_line(error)} What changed: "
            f"{self._changes(arguments, keywords)}. From now on it runs uncompiled: its results are right, and differ in last "
            f"bits. All batches of a run have one shape, so that this is a fault; resume with `--set {self._key}=false`"
        )
        self._compiled = self._plain
        return self._plain(*arguments, **keywords)

    def _describe(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, str]:
        """What decides whether a graph fits a call: its arguments, and torch's settings."""
        settings = {
            "training mode": self._layer.training,
            "gradients are recorded": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
        }
        given = {f"argument {number}": value for number, value in enumerate(arguments, start=1)}
        return {name: _described(value) for name, value in {**given, **keywords, **settings}.items()}

    def _changes(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
        """Differences from the first call. Torch's own words compare with the latest graph, which may be of another model."""
        then, now = self._first or {}, self._describe(arguments, keywords)
        changed = [f"{name}: {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
        return "; ".join(changed) or getattr(get_compilation_metrics()[-1], "recompile_reason", None) or "unknown"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        """For the copied layer: without this a copy would compute with the weights of the original."""
        return CompiledForward(copy.deepcopy(self._layer, memo), self._key, self._options)


def _num_graphs() -> int:
    """Graphs that torch has compiled in this process."""
    return counters["stats"]["unique_graphs"]


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return ", ".join(map(_described, value)) if isinstance(value, list | tuple) else str(value)


def _first_line(error: Exception) -> str:
    """The first line of a message, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'without a message'}."
