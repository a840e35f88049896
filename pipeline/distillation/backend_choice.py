"""At the first batch: which backend of the relation loss is right on this machine, and which of those is fastest.

Every candidate is checked against the float64 oracle on a few heads of the run's own length, head sizes, precision
and device, once as a run begins (student far from the teacher) and once as it ends (close, with peaked maps, where
rounding weighs most); those that agree are timed on all heads. On a CPU nothing is timed: `chunked` has won there in every
measurement, and a choice by the clock could differ between two starts of one run. `relations.backend` pins it
everywhere.
"""

from __future__ import annotations

import time

import torch

from pipeline.distillation.relations import BACKENDS, relation_kl, relation_kl_reference

NUM_CHECKED_HEADS = 2
MAX_CHECKED_TOKENS = 1024  # the oracle keeps every map in float64
NUM_TIMED_ROWS = 4
NUM_REPEATS = 5
# Relative gradient error against the oracle that still counts as right, by the student's precision.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# A student close to its teacher: mean self-relation logit, which makes maps peaked, distance, and how much coarser the
# gradient may be there (the student's own rounding weighs more, the closer it is).
NEAR_DIAGONAL, NEAR_NOISE, NEAR_FACTOR = 8.0, 0.05, 2.0


@torch.enable_grad()
def choose_backend(teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int) -> tuple[str, list[str]]:
    """The backend for tensors of this kind, and what was found, one line per candidate."""
    tolerance = max(TOLERANCES[teacher_BLD.dtype], TOLERANCES[student_BLD.dtype])
    timed = student_BLD.device.type != "cpu"
    report, seconds = [], {}
    for name in BACKENDS if timed else ("chunked",):
        try:
            error = gradient_error(name, teacher_BLD, student_BLD, num_heads)
            error = max(error, gradient_error(name, teacher_BLD, student_BLD, num_heads, near=True) / NEAR_FACTOR)
        except RuntimeError as problem:  # a kernel that this device or build does not have
            report.append(f"relation backend {name}: not usable here ({str(problem).splitlines()[0]})")
            continue
        if not error <= tolerance:
            report.append(f"relation backend {name}: gradient error {error:.1e} is over {tolerance:.0e}, not used")
            continue
        seconds[name] = _time(name, teacher_BLD, student_BLD, num_heads) if timed else 0.0
        speed = f", {seconds[name] * 1e3:.2f} ms" if timed else ""
        report.append(f"relation backend {name}: gradient error {error:.1e}{speed}")
    if not seconds:
        raise RuntimeError("no backend of the relation loss agrees with the float64 oracle:\n" + "\n".join(report))
    best = min(seconds, key=seconds.__getitem__)
    return best, [*report, f"relation backend chosen: {best}"]


def gradient_error(
    name: str, teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int, near: bool = False
) -> float:
    """Relative error of the gradient on random input of the tensors' length, head sizes, precision and device.

    `near`: peaked maps and a student close to its teacher, who then has the student's head size.
    """
    heads = min(NUM_CHECKED_HEADS, num_heads)
    teacher, student = (
        _random_like(x_BLD[:, :MAX_CHECKED_TOKENS], 1, heads, num_heads, seed).detach()
        for seed, x_BLD in enumerate((student_BLD if near else teacher_BLD, student_BLD))
    )
    if near:
        scale = (NEAR_DIAGONAL * (student.shape[-1] // heads) ** -0.5) ** 0.5
        teacher, student = (scale * student).to(teacher_BLD.dtype), scale * (student + NEAR_NOISE * teacher)
    student.requires_grad_()
    relation_kl(teacher, student, heads, backend=name).backward()
    exact = student.detach().double().requires_grad_()
    relation_kl_reference(teacher, exact, heads).backward()
    assert student.grad is not None
    assert exact.grad is not None
    return float((student.grad.double() - exact.grad).norm() / exact.grad.norm())


def _time(name: str, teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int) -> float:
    """Fastest of a few forward and backward passes, in seconds."""
    rows = min(NUM_TIMED_ROWS, student_BLD.shape[0])
    teacher, student = (
        _random_like(x_BLD, rows, num_heads, num_heads, seed) for seed, x_BLD in enumerate((teacher_BLD, student_BLD))
    )
    seconds = []
    for _ in range(NUM_REPEATS):
        torch.cuda.synchronize(student.device)
        began = time.perf_counter()
        relation_kl(teacher, student, num_heads, backend=name).backward()
        torch.cuda.synchronize(student.device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _random_like(x_BLD: torch.Tensor, rows: int, heads: int, num_heads: int, seed: int) -> torch.Tensor:
    """Unit-variance leaf tensor with the length, head size, precision and device of `x_BLD`; the same at every start.

    Teacher and student take different seeds: were they equal, as equal widths would make them, the gradient would be 0.
    """
    width = heads * (x_BLD.shape[-1] // num_heads)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, x_BLD.shape[1], width, generator=generator)
    return values.to(x_BLD.device, x_BLD.dtype).requires_grad_()
