"""The floating-point operations of a tapped encoder, from its shapes: what the model needs, not what a machine executes.

In: a `TappedEncoder` and a row length. Out: operations of one forward, a multiplication and an addition counting as two.
Matrix products of linear layers and of attention count. Embeddings, norms and activations do not, nor does the relation loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.distillation.tap import TappedEncoder

BACKWARD_OVER_FORWARD = 2  # a product's backward is two products of the same size


def forward_flops(encoder: TappedEncoder, seq_len: int) -> int:
    """Operations of one row of `seq_len` tokens. Attention counts as complete, also in layers with a window."""
    linear = sum(m.in_features * m.out_features for m in encoder.model.modules() if isinstance(m, nn.Linear))
    attention = encoder.num_attention_layers * 2 * seq_len * encoder.widths[0]  # per token: Q K^T, and the maps times V
    return 2 * seq_len * (linear + attention)


def training_flops(teacher: TappedEncoder, students: Sequence[TappedEncoder], seq_len: int) -> int:
    """Operations that distilling one row needs: the teacher's forward, and each student's forward and backward."""
    return forward_flops(teacher, seq_len) + sum(student_flops(student, seq_len) for student in students)


def student_flops(student: TappedEncoder, seq_len: int) -> int:
    """Operations of one student's forward and backward over one row."""
    return (1 + BACKWARD_OVER_FORWARD) * forward_flops(student, seq_len)
