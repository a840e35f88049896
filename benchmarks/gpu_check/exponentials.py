"""A Triton kernel that computes nothing but exponentials: the limit of kernels like the relation loss."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK, ROUNDS = 1024, 256


@triton.jit
def exponentials(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """`out` [programs * BLOCK] fp32: ROUNDS exponentials for each element."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (at % 7).to(tl.float32) * -0.1
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + at, x)
