"""The numbers of a plan that are neither counted nor published: the share of each peak rate that is reached, fixed costs.

docs/planning.md gives the source of each, and says which one H200 has confirmed. The command line can change some.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumptions:
    """Shares are of the published rates in devices.py. Bytes and seconds are per GPU."""

    product_efficiency: float = 0.55  # of the dense peak, after the loss in the last wave of tiles
    attention_efficiency: float = 0.40  # of the dense peak and of the special-function rate
    fused_efficiency: float = 0.31  # of the same, for the fused loss: a prototype on one H200
    memory_efficiency: float = 0.80  # of the memory rate, for kernels that only move data
    strided_efficiency: float = 0.20  # of the memory rate, for copies of narrow heads: fitted to `flash` on one H200
    link_efficiency: float = 0.80  # of NVLink, PCIe and network
    launch_s: float = 12e-6  # host time per kernel that Python starts: the slow host of one H200
    host_copy_gb_s: float = 12.0  # pinned memory to GPU and back
    checkpoint_gb_s: float = 1.0  # file system and hashing, per node
    fixed_gib: float = 1.2  # CUDA context, cuBLAS workspaces, NCCL buffers
    fragmentation: float = 0.05  # of the memory that is allocated and freed within a step
    tokenizer_mb_s: float = 13.5  # text per core: benchmarks/results/2026-11-23-prepare.md
    text_bytes_per_token: float = 13.5 / 2.94  # the same measurement
    shard_bytes_per_token: float = 4.01  # the same measurement
