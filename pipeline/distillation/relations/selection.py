"""Chooses the backend of the relation loss on the first batch: the fastest of those that are correct on this machine.

Each backend is compared with the float64 reference in the run's own head sizes, precision and device, on one row of the
run's length (1024 tokens of it at most) and two heads. It is compared twice: for a student far from its teacher, as at
the beginning of a run, and for one close to it, as at the end, where rounding weighs most. Backends that agree are timed
on all heads: forward and backward of one relation of a tensor with itself (Q-Q), up to four full rows, the fastest of
five. Not measured: memory, relations of two tensors, separate documents. `chunked` needs the least memory; on a GPU it is
the slowest, chosen only where no other is correct. On a CPU nothing is timed: `chunked` was fastest there in every
measurement. The ranks exchange their results and make one choice. A backend named in `relations.backend` is used without
this check.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pipeline.distillation.relations.backends import BACKENDS, NotUsableHereError
from pipeline.distillation.relations.loss import DEFAULT_BACKEND, relation_kl
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.errors import UserError

NUM_CHECKED_HEADS = 2
MAX_CHECKED_TOKENS = 1024  # the reference keeps every map in float64
NUM_TIMED_ROWS = 4
NUM_REPEATS = 5
# Largest relative gradient error of a correct backend, by the student's precision. Close to the teacher, `chunked` in fp32
# has 1e-6 to 4.6e-6 on a CPU with the CPU build of torch 2.13, and up to 7.0e-6 with its CUDA build, which sums in another
# order (32 to 1024 tokens, 2 to 384 channels per head, most where heads are wide). The limit leaves a margin for further builds.
FAR, NEAR = "far from", "close to"
TOLERANCES = {
    FAR: {torch.float64: 1e-9, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    NEAR: {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2},
}
# Mean self-relation logit: maps of KL about 1 between two independent models, and more peaked ones. Logits depend on
# channels only through their rank, so with rank 8 a head of 384 channels is as hard a case as one of 8.
DIAGONALS = {FAR: 2.8, NEAR: 4.0}
RANK = 8
NEAR_KL, TRIAL_NOISE = 0.01, 0.05
MIN_CHECKED_HEAD_DIM = 2  # with one channel all rows of a map are nearly equal, and fp32 cancels to 3e-5 in any form


Gather = Callable[[dict[str, float]], list[dict[str, float]]]


def alone(found: dict[str, float]) -> list[dict[str, float]]:
    """The results of all ranks, if there is only one."""
    return [found]


@torch.enable_grad()
def choose_backend(
    teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int, gather: Gather = alone
) -> tuple[str, list[str]]:
    """The backend for tensors of these shapes, dtypes and device, and a report with one line per candidate.

    All ranks call it together; `gather` gives every rank the seconds per correct backend of each rank. Raises
    `UserError` if no backend is correct on every rank.
    """
    timed = student_BLD.device.type != "cpu"
    report, seconds = [], {}
    for name in BACKENDS if timed else (DEFAULT_BACKEND,):
        try:
            found, is_correct = _check(name, teacher_BLD, student_BLD, num_heads)
        except NotUsableHereError as problem:
            found, is_correct = f"not usable here ({problem.reason})", False
        except RuntimeError as problem:  # this device or build lacks a kernel
            found, is_correct = f"not usable here ({str(problem).splitlines()[0]})", False
        if is_correct:
            seconds[name] = _time(name, teacher_BLD, student_BLD, num_heads) if timed else 0.0
            found += f", {seconds[name] * 1e3:.2f} ms" if timed else ""
        report.append(f"relation backend {name}: {found}")
    best = fastest_of_all(gather(seconds))
    if best is None:
        raise UserError(
            f"no backend of the relation loss agrees with the float64 reference on every rank (here {student_BLD.device}; teacher "
            f"{teacher_BLD.shape[-1]} wide in {teacher_BLD.dtype}, student {student_BLD.shape[-1]} wide in "
            f"{student_BLD.dtype}, {num_heads} heads, {student_BLD.shape[1]} tokens): {'; '.join(report)}. Try "
            "another build of torch or another device; `relations.backend: chunked` trains without this check"
        )
    return best, [*report, f"relation backend chosen: {best}"]


def fastest_of_all(seconds_of_ranks: list[dict[str, float]]) -> str | None:
    """Of the backends that are correct on every rank, the one whose slowest rank is fastest. None: there is none."""
    correct = [name for name in BACKENDS if all(name in seconds for seconds in seconds_of_ranks)]
    return min(correct, key=lambda name: max(seconds[name] for seconds in seconds_of_ranks), default=None)


def _check(name: str, teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int) -> tuple[str, bool]:
    """A line for the report, and whether the backend is correct far from the teacher and close to it."""
    errors = {where: gradient_error(name, teacher_BLD, student_BLD, num_heads, where) for where in TOLERANCES}
    for where, error in errors.items():
        tolerance = max(TOLERANCES[where][x_BLD.dtype] for x_BLD in (teacher_BLD, student_BLD))
        if not error <= tolerance:
            return f"gradient error {error:.1e} {where} the teacher is over {tolerance:.2g}, not used", False
    return "gradient error " + ", ".join(f"{error:.1e} {where} the teacher" for where, error in errors.items()), True


def gradient_error(
    name: str, teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int, where: str
) -> float:
    """Relative gradient error for a student `where` (FAR or NEAR) the teacher; NEAR, both have the student's head size."""
    heads, length = min(NUM_CHECKED_HEADS, num_heads), min(student_BLD.shape[1], MAX_CHECKED_TOKENS)
    teacher, student = check_pair(
        where, length, heads, *(x_BLD.shape[-1] // num_heads for x_BLD in (teacher_BLD, student_BLD))
    )
    teacher = teacher.to(teacher_BLD.device, teacher_BLD.dtype)
    student = student.to(student_BLD.device, student_BLD.dtype).requires_grad_()
    exact = student.detach().double().requires_grad_()
    weight = heads * length  # as a loss scale: without it the gradient would underflow in fp16
    (weight * relation_kl(teacher, student, heads, backend=name)).backward()
    (weight * relation_kl_reference(teacher, exact, heads)).backward()
    assert student.grad is not None
    assert exact.grad is not None
    return float((student.grad.double() - exact.grad).norm() / exact.grad.norm())


def check_pair(
    where: str, length: int, heads: int, teacher_dim: int, student_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 teacher and student of one row, the same at every start, with `*_dim` channels per head (NEAR:
    `student_dim` both)."""
    diagonal = DIAGONALS[where]
    if where == FAR:
        return _tokens(length, heads, teacher_dim, 0, diagonal), _tokens(length, heads, student_dim, 1, diagonal)
    teacher, noise = (_tokens(length, heads, student_dim, seed, diagonal) for seed in (0, 1))
    trial_kl = relation_kl_reference(teacher, teacher + TRIAL_NOISE * noise, heads).item()
    # Near the optimum KL grows with the square of the noise.
    return teacher, teacher + TRIAL_NOISE * (NEAR_KL / trial_kl) ** 0.5 * noise


def _tokens(length: int, heads: int, head_dim: int, seed: int, diagonal: float) -> torch.Tensor:
    """Normal vectors of rank RANK in each head, [1, length, heads * head_dim], with that mean self-relation logit."""
    head_dim = max(head_dim, MIN_CHECKED_HEAD_DIM)
    rank = min(RANK, head_dim)
    wide = torch.randn(heads, head_dim, rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = torch.randn(1, length, heads, rank, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_1LAd = (torch.linalg.qr(wide).Q @ values)[..., 0]
    return x_1LAd.flatten(2) * (diagonal * head_dim**0.5 / rank) ** 0.5


def _time(name: str, teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, num_heads: int) -> float:
    """Fastest of a few forward and backward passes, in seconds."""
    rows = min(NUM_TIMED_ROWS, student_BLD.shape[0])
    teacher, student = (_random_like(x_BLD, rows, seed) for seed, x_BLD in enumerate((teacher_BLD, student_BLD)))
    seconds = []
    for _ in range(NUM_REPEATS):
        torch.cuda.synchronize(student.device)
        began = time.perf_counter()
        relation_kl(teacher, student, num_heads, backend=name).backward()
        torch.cuda.synchronize(student.device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _random_like(x_BLD: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """Unit-variance leaf tensor with the length, width, dtype and device of `x_BLD`; the same at every start."""
    values = torch.randn(rows, *x_BLD.shape[1:], generator=torch.Generator().manual_seed(seed))
    return values.to(x_BLD.device, x_BLD.dtype).requires_grad_()
