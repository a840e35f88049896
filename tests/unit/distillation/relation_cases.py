"""Teachers and students for tests of the relation loss, and its errors against the float64 reference."""

from __future__ import annotations

import torch

from pipeline.distillation.relations import relation_kl
from pipeline.distillation.relations.backends import BACKENDS as ALL_BACKENDS
from pipeline.distillation.relations.reference import relation_kl_reference

BACKENDS = [name for name in ALL_BACKENDS if name != "triton"]  # a CPU only interprets it: test_triton_backend.py
# Relative gradient error against float64 on the same rounded inputs.
FAR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # KL about 1
NEAR = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # KL about 0.01


def make(batch, length, width_T, width_S, dtype=torch.float32, scale=1.0, distance=None, seed=0):
    """Teacher and student; with `distance` the student is the teacher plus that much noise."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(batch, length, width_T, generator=generator) * scale
    if distance is None:
        student = torch.randn(batch, length, width_S, generator=generator) * scale
    else:
        student = teacher + distance * torch.randn(batch, length, width_T, generator=generator)
    return teacher.to(dtype), student.to(dtype)


def loss_and_gradient(function, teacher, students, heads, lengths=None, **keywords):
    """Loss and the gradients for the student's queries (and keys: then `teacher` is a pair as well)."""
    leaves = [student.detach().clone().requires_grad_() for student in students]
    loss = function(teacher, tuple(leaves) if len(leaves) == 2 else leaves[0], heads, lengths, **keywords)
    loss.backward()
    return loss.item(), torch.cat([leaf.grad.double().flatten() for leaf in leaves])


def errors(teacher, students, heads, lengths=None, backend="chunked", **keywords):
    """Relative error of loss and gradient, and the loss."""
    exact_loss, exact = loss_and_gradient(
        relation_kl_reference, teacher, [s.double() for s in students], heads, lengths, **keywords
    )
    loss, gradient = loss_and_gradient(relation_kl, teacher, students, heads, lengths, backend=backend, **keywords)
    return abs(loss - exact_loss) / exact_loss, float((gradient - exact).norm() / exact.norm()), exact_loss
