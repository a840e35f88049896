"""The relation loss: every backend against the float64 reference, its time and memory, with the naive method next to it.

In: the backends in `BACKENDS`, whichever there are. Out: the relative error of the gradient far from the teacher and close to
it in each precision, and per shape the milliseconds of forward and backward with the memory above the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.figures import Figures, NotHere, Row
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.timing import added_peak_mib, device, free_memory, half_precision, median_ms, on_gpu
from benchmarks.naive_baseline import naive_relation
from pipeline.distillation.relations import relation_kl
from pipeline.distillation.relations.backends import BACKENDS
from pipeline.distillation.relations.reference import relation_kl_reference
from pipeline.distillation.relations.selection import (
    FAR,
    NEAR,
    NUM_CHECKED_HEADS,
    check_pair,
    choose_backend,
    gradient_error,
)
from pipeline.errors import UserError

ERRORS, TIMES, CHOICE = "Error of the gradient", "Time and memory of one relation", "Choice at the start of a run"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHECKED_ROWS = 4
STRETCHES = (5, 3, 8)  # sixteenths of a row: the documents of the shape with separate documents
Loss = Callable[..., torch.Tensor]  # (teacher_BLD, student_BLD, heads, segments=...)


@dataclass(frozen=True)
class Shape:
    """One relation: rows, tokens, widths of teacher and student, relation heads."""

    name: str
    rows: int
    tokens: int
    teacher: int
    student: int
    heads: int
    separate: bool = False  # each row is several documents

    @property
    def text(self) -> str:
        return f"{self.name}: {self.rows} x {self.tokens}, {self.teacher}/{self.student}, {self.heads} heads"

    def tensors(self, dtype: torch.dtype, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher and student, `[rows, tokens, width]`, unit variance, the same at every call."""
        generator = torch.Generator(device=device()).manual_seed(0)

        def one(width: int) -> torch.Tensor:
            size = (rows or self.rows, self.tokens, width)
            return torch.randn(size, device=device(), generator=generator).to(dtype)

        return one(self.teacher), one(self.student).requires_grad_()

    @property
    def segments(self) -> list[list[int]] | None:
        return [[part * self.tokens // 16 for part in STRETCHES]] * self.rows if self.separate else None


FULL_SHAPES = (
    Shape("large", 32, 512, 1024, 384, 64),
    Shape("base", 32, 512, 768, 384, 48),
    Shape("quickstart", 16, 128, 384, 384, 48),
    Shape("long", 4, 2048, 1024, 384, 64),
    Shape("large, separate documents", 32, 512, 1024, 384, 64, separate=True),
)
TINY_SHAPES = (
    Shape("large", 2, 48, 128, 96, 4),
    Shape("base", 2, 32, 96, 48, 4),
    Shape("quickstart", 3, 16, 48, 48, 4),
    Shape("long", 1, 64, 128, 96, 4),
    Shape("large, separate documents", 2, 48, 128, 96, 4, separate=True),
)


def measure(setting: Setting, figures: Figures) -> None:
    """Errors first: a fast backend that is wrong is of no use."""
    shapes = TINY_SHAPES if setting.is_tiny else FULL_SHAPES
    for shape in shapes:
        for backend in BACKENDS:
            figures.attempt(ERRORS, _names(shape, backend), partial(_errors, shape, backend))
    for shape in shapes[:3]:
        figures.attempt(CHOICE, {"shape": shape.text}, partial(_choice, shape))
    joined = [shape for shape in shapes if not shape.separate]  # the naive method knows no others
    cases = [(shape, backend, _loss_of(backend)) for shape in shapes for backend in BACKENDS]
    cases += [(shape, "naive", naive_relation) for shape in joined]
    compiled = torch.compile(naive_relation, dynamic=False)
    cases += [(shape, "naive, compiled", compiled) for shape in (joined[:1] if setting.is_tiny else joined)]
    for shape, name, loss in cases:
        figures.attempt(TIMES, _names(shape, name), partial(_time, shape, loss))
        free_memory()


def chosen_backend(setting: Setting) -> str:
    """The backend that a run of the XLM-R-large-shaped job chooses here."""
    return _choice((TINY_SHAPES if setting.is_tiny else FULL_SHAPES)[0])["chosen"]


def _names(shape: Shape, backend: str) -> Row:
    return {"shape": shape.text, "backend": backend}


def _loss_of(backend: str) -> Loss:
    def loss(teacher_BLD: torch.Tensor, student_BLD: torch.Tensor, heads: int, segments=None) -> torch.Tensor:
        return relation_kl(teacher_BLD, student_BLD, heads, backend=backend, segments=segments)

    return loss


def _errors(shape: Shape, backend: str) -> Row:
    """Relative gradient errors, "far, near" per precision. A backend that does not run in one precision says why."""
    row: Row = {}
    for name, dtype in DTYPES.items():
        try:
            error_of = _error_of_documents if shape.separate else _error_of_rows
            far, near = (error_of(shape, backend, dtype, where) for where in (FAR, NEAR))
            row |= {f"{name} far": far, f"{name} near": near}
        except (RuntimeError, UserError) as error:
            if on_gpu() and not _lacks_kernel(error):
                raise
            row |= {f"{name} far": "not usable here", f"{name} near": str(error).splitlines()[0]}
    return row


def _error_of_rows(shape: Shape, backend: str, dtype: torch.dtype, where: str) -> float:
    """As the check at the start of a run."""
    teacher, student = shape.tensors(dtype, 1)
    return gradient_error(backend, teacher, student, shape.heads, where)


def _error_of_documents(shape: Shape, backend: str, dtype: torch.dtype, where: str) -> float:
    """The same for a row of several documents."""
    widths = (shape.teacher // shape.heads, shape.student // shape.heads)
    teacher, student = check_pair(where, shape.tokens, NUM_CHECKED_HEADS, *widths)
    teacher, student = teacher.to(device(), dtype), student.to(device(), dtype).requires_grad_()
    exact = student.detach().double().requires_grad_()
    arguments: dict[str, Any] = {"segments": (shape.segments or [])[:1]}
    weight = NUM_CHECKED_HEADS * shape.tokens  # without it the gradient would underflow in fp16
    (weight * relation_kl(teacher, student, NUM_CHECKED_HEADS, backend=backend, **arguments)).backward()
    (weight * relation_kl_reference(teacher, exact, NUM_CHECKED_HEADS, **arguments)).backward()
    assert student.grad is not None
    assert exact.grad is not None
    return float((student.grad.double() - exact.grad).norm() / exact.grad.norm())


def _lacks_kernel(error: Exception) -> bool:
    """Whether the device or build has no such kernel, as opposed to a kernel that crashed."""
    return "CUDA error" not in str(error) and type(error).__name__ != "OutOfMemoryError"


def _choice(shape: Shape) -> Row:
    teacher, student = shape.tensors(half_precision(), CHECKED_ROWS)
    name, report = choose_backend(teacher, student, shape.heads)
    return {"chosen": name, "report": "; ".join(line.removeprefix("relation backend ") for line in report)}


def _time(shape: Shape, loss: Loss) -> Row:
    """Forward and backward; and whether the gradient is the same in every bit each time."""
    teacher, student = shape.tensors(half_precision())
    arguments = {"segments": shape.segments} if shape.segments else {}

    def once() -> torch.Tensor:
        student.grad = None
        loss(teacher, student, shape.heads, **arguments).backward()
        assert student.grad is not None
        return student.grad

    try:
        row: Row = {"ms": median_ms(once, 8, 2), "peak MiB": added_peak_mib(once)}
    except (RuntimeError, UserError) as error:
        if on_gpu() and not _lacks_kernel(error):
            raise
        raise NotHere(f"not usable here ({str(error).splitlines()[0]})") from error
    first = once().clone()
    return row | {"same bits": all(torch.equal(first, once()) for _ in range(3))}
