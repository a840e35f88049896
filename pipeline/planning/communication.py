"""The bytes that ranks send each other in one optimizer step, and the seconds of sending them.

In: the encoders and a `Setting`. Out: the `Collective`s that DeepSpeed 0.19 issues, with the bytes of the complete tensor.
benchmarks/bench_plan.py counts the real ones on 2 and 4 ranks. Times follow NCCL's own model of a ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.planning.devices import Hardware
from pipeline.planning.memory import BYTES, PREFETCHED_ELEMENTS, Setting
from pipeline.planning.meta_models import Encoders

# Seconds with which NCCL itself chooses algorithms (src/graph/tuning.cc), for rings: start, and per hop over NVLink, PCIe,
# network. Messages below `SMALL_BYTES` use its `LL` protocol, larger ones `Simple`.
SMALL_BYTES = 65_536
LATENCIES_S = {
    "small": {"start": 6.6e-6, "nvlink": 0.6e-6, "pcie": 1.0e-6, "network": 2.7e-6},
    "large": {"start": 8.4e-6, "nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 14e-6},
}
SMALL_REDUCES = 5  # per step: losses, gradient norm, overflow, stop request, save poll


@dataclass(frozen=True)
class Collective:
    """`total_bytes`: of the complete reduced or gathered tensor. `calls`: the number of operations that move it."""

    kind: str  # all_reduce, all_gather, reduce_scatter
    what: str
    total_bytes: int
    calls: int

    @property
    def rounds(self) -> int:
        """How often a ring passes everything round: twice for an all-reduce, once for the others."""
        return 2 if self.kind == "all_reduce" else 1

    def sent_bytes(self, ranks: int) -> float:
        """Bytes on each rank's link."""
        return self.rounds * (ranks - 1) / ranks * self.total_bytes


def collectives_of(encoders: Encoders, setting: Setting) -> list[Collective]:
    """Every large collective of one optimizer step of `accumulation` micro-batches."""
    found = []
    if setting.teacher_partitioned:
        size = encoders.teacher_parameters * BYTES[setting.teacher_precision] * setting.accumulation
        calls = setting.accumulation * -(-encoders.teacher_parameters // PREFETCHED_ELEMENTS)
        found.append(Collective("all_gather", "teacher parameters", size, calls))
    trained = encoders.trained_parameters * setting.bytes_each
    buckets = -(-encoders.trained_parameters // setting.reduce_bucket) + 1
    if setting.stage == 3:
        return found + _zero3(encoders, setting, buckets)
    # ZeRO-1 reduces after the last micro-batch, ZeRO-2 after each. Both all-reduce complete buckets: DeepSpeed's
    # `reduce_scatter` cuts the result afterwards (`use_multi_rank_bucket_allreduce`, on by default).
    rounds = 1 if setting.stage == 1 else setting.accumulation
    groups = 2  # of parameters: with and without weight decay
    found.append(Collective("all_reduce", "gradients", rounds * trained, rounds * buckets))
    found.append(Collective("all_gather", "updated parameters", trained, groups))
    return found


def _zero3(encoders: Encoders, setting: Setting, buckets: int) -> list[Collective]:
    """Large parameters are gathered for each forward and kept until its backward. Small ones are never partitioned."""
    each, rounds = setting.bytes_each, setting.accumulation
    sizes = [parameter.numel() for parameter in encoders.student.parameters()]
    small = [size for size in sizes if size <= setting.persistence_threshold]
    gathered = sum(sizes) - sum(small)
    calls = -(-gathered // PREFETCHED_ELEMENTS)
    return [
        Collective("all_gather", "parameters", rounds * gathered * each, rounds * calls),
        Collective("reduce_scatter", "gradients", rounds * encoders.trained_parameters * each, rounds * buckets),
        Collective("all_gather", "updated small parameters", sum(small) * each, len(small)),
    ]


def collective_s(collective: Collective, setting: Setting, hardware: Hardware) -> float:
    """Seconds for the bytes on the slowest link, and for the latency of every hop."""
    ranks, nodes, in_node = setting.world_size, setting.nodes, setting.gpus_in_node
    if ranks == 1:
        return 0.0
    rate = ring_gb_s(hardware, nodes, in_node) * 1e9 * hardware.assumptions.link_efficiency
    each = LATENCIES_S["small" if collective.total_bytes < SMALL_BYTES * collective.calls else "large"]
    link_s, network_s = each[_link(hardware)], each["network"]
    hops_s = (ranks - nodes) * link_s + (nodes - 1) * network_s
    if collective.kind == "all_reduce":  # NCCL uses a tree over the nodes where that is shorter than the ring
        hops_s = min(hops_s, (in_node - 1) * link_s + math.log2(nodes) * network_s)
    latency = each["start"] + collective.rounds * hops_s
    return collective.sent_bytes(ranks) / rate + collective.calls * latency


def small_reduces_s(setting: Setting, hardware: Hardware) -> float:
    """Seconds for the few numbers that ranks agree on in every step: the latency of a tree, up and down."""
    if setting.world_size == 1:
        return 0.0
    each, nodes = LATENCIES_S["small"], setting.nodes
    hops = math.log2(max(1, setting.world_size / nodes)) * each[_link(hardware)] + math.log2(nodes) * each["network"]
    return SMALL_REDUCES * (each["start"] + 2 * hops)


def ring_gb_s(hardware: Hardware, nodes: int, gpus: int) -> float:
    """Rate of a ring: within a node each GPU's own link; between nodes all network cards of a node together."""
    device = hardware.device
    inside = device.link_gb_s if gpus > 1 else math.inf
    return inside if nodes == 1 else min(inside, gpus * device.network_gbit_s / 8)


def _link(hardware: Hardware) -> str:
    return "nvlink" if hardware.device.nvlink else "pcie"
