"""The parts of the check, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process: the function `measure(setting, figures)` of the module `benchmarks.gpu_check.MODULE`."""

    name: str
    title: str
    module: str
    limit_s: float
    function: str = "measure"
    needs: tuple[str, ...] = ("prepare",)


PARTS = (
    Part("prepare", "Teacher, tokenizer and shards", "prepare", 60, needs=()),
    Part("machine", "The machine and its limits", "machine", 50, needs=()),
    Part("relations", "The relation loss", "relation_backends", 90, needs=()),
    Part("step", "One training step, with each change on and off", "step", 150),
    Part("any-order", "The same step without deterministic kernels", "step", 40, "measure_any_order"),
    Part("plan", "The plan and the measured step", "prediction", 20, needs=("prepare", "step")),
    Part("reproducibility", "The same run twice, and resumed", "reproducibility", 110),
    Part("faults", "Not-a-number gradients and the loss scale", "faults", 50),
    Part("zero", "ZeRO stages, precisions, larger micro-batches", "zero", 90),
    Part("launcher", "The job by DeepSpeed's launcher", "launcher", 70),
    Part("quickstart", "The quickstart, with retrieval before and after", "quickstart", 130),
)
BY_NAME = {part.name: part for part in PARTS}


def with_needed(names: list[str]) -> list[Part]:
    """These parts and those that they need, in the order of `PARTS`."""
    chosen = set(names)
    for name in names:
        chosen |= set(BY_NAME[name].needs)
    return [part for part in PARTS if part.name in chosen]
