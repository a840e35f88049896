"""The naive baseline of the benchmarks: MiniLMv2 as most code for it is written, and how time and memory are measured.

Complete Hugging Face models, all layers, Q, K and V from forward hooks, all relation maps in memory, `F.kl_div`; the step of
a plain training loop with torch's fused AdamW.

Shape suffixes: B rows, L positions, D channels, A relation heads, d channels per head.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

CLEAR_PEAK = "5"  # written to /proc/self/clear_refs, it resets the peak resident size of the process


def naive_relation(teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Mean KL over rows, heads and queries; autograd keeps every map."""

    def logits(x_BLD: torch.Tensor) -> torch.Tensor:
        x_BALd = x_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        return x_BALd @ x_BALd.transpose(-1, -2) / x_BALd.shape[-1] ** 0.5

    with torch.no_grad():
        target = logits(teacher_BLD).float().softmax(-1)
    return functional.kl_div(logits(student_BLD).float().log_softmax(-1), target, reduction="none").sum(-1).mean()


class HookedEncoder:
    """A complete Hugging Face encoder; hooks store the outputs of one layer's projections."""

    def __init__(self, model, layer: int) -> None:
        attention = model.encoder.layer[layer - 1].attention.self
        self.model, self.projections = model, [attention.query, attention.key, attention.value]

    def __call__(self, input_ids_BL: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        hooks = [p.register_forward_hook(lambda _, __, output: outputs.append(output)) for p in self.projections]
        self.model(input_ids=input_ids_BL, attention_mask=torch.ones_like(input_ids_BL), output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        return outputs


class NaiveTraining:
    """The loop of `transformers.Trainer`, written out: backward, clipping, fused AdamW on all parameters, no gradients."""

    def __init__(self, teacher, student, layers: tuple[int, int], num_heads: int) -> None:
        self.teacher, self.student = HookedEncoder(teacher, layers[0]), HookedEncoder(student, layers[1])
        self.num_heads = num_heads
        decayed = [p for p in student.parameters() if p.dim() > 1]
        plain = [p for p in student.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=1e-4, eps=1e-6, fused=True)

    def forward(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            of_teacher = self.teacher(input_ids_BL)
        of_student = self.student(input_ids_BL)
        pairs = zip(of_teacher, of_student, strict=True)
        return torch.stack([naive_relation(t, s, self.num_heads) for t, s in pairs]).sum()

    def optimizer_phase(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def interleaved_cpu_seconds(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each variant. Variants take turns, so that other load on the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            began = time.process_time()
            run()
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def added_peak_mb(run: Callable[[], None]) -> float:
    """Peak resident memory of `run` above that of the process before it, in MB (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    before = _status_kb("VmRSS")
    run()
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])
