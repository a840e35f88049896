"""What the ranks send each other in one optimizer step, and how long that takes.

In: the encoders and a `Setting`. Out: `Collective`s with the bytes of the whole tensor, as DeepSpeed 0.19 issues them;
benchmarks/bench_plan.py counts the real ones on 2 and 4 ranks. Times follow NCCL's own model of a ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.planning.assumptions import Assumptions
from pipeline.planning.devices import Device
from pipeline.planning.memory import BYTES, PREFETCHED_ELEMENTS, Setting
from pipeline.planning.meta_models import Encoders

# Seconds by which NCCL itself chooses algorithms (src/graph/tuning.cc), rings: start, and per hop over NVLink, PCIe, network.
# Messages below `SMALL_BYTES` take its `LL` protocol, larger ones `Simple`.
SMALL_BYTES = 65_536
LATENCIES_S = {
    "small": {"start": 6.6e-6, "nvlink": 0.6e-6, "pcie": 1.0e-6, "network": 2.7e-6},
    "large": {"start": 8.4e-6, "nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 14e-6},
}
SMALL_REDUCES = 5  # per step: losses, gradient norm, overflow, stop request, save poll


@dataclass(frozen=True)
class Collective:
    """`whole_bytes`: the reduced tensor, or the gathered one. `calls`: into how many operations it is cut."""

    kind: str  # all_reduce, all_gather, reduce_scatter
    what: str
    whole_bytes: int
    calls: int

    def sent_bytes(self, ranks: int) -> float:
        """On each rank's link, with rings: an all-reduce passes everything round twice, the others once."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * (ranks - 1) / ranks * self.whole_bytes


def collectives_of(encoders: Encoders, setting: Setting) -> list[Collective]:
    """Everything large in one optimizer step of `accumulation` micro-batches."""
    found = []
    if setting.teacher_partitioned:
        size = encoders.teacher_parameters * BYTES[setting.teacher_precision] * setting.accumulation
        calls = setting.accumulation * -(-encoders.teacher_parameters // PREFETCHED_ELEMENTS)
        found.append(Collective("all_gather", "teacher parameters", size, calls))
    trained = encoders.trained_parameters * setting.bytes_each
    buckets = -(-encoders.trained_parameters // setting.reduce_bucket) + 1
    if setting.stage == 3:
        return found + _zero3(encoders, setting, buckets)
    # ZeRO-1 waits for the last micro-batch, ZeRO-2 reduces after each. Both all-reduce whole buckets: DeepSpeed's
    # `reduce_scatter` cuts the result afterwards (`use_multi_rank_bucket_allreduce`, on by default).
    rounds = 1 if setting.stage == 1 else setting.accumulation
    groups = 2  # decayed and not
    found.append(Collective("all_reduce", "gradients", rounds * trained, rounds * buckets))
    found.append(Collective("all_gather", "updated parameters", trained, groups))
    return found


def _zero3(encoders: Encoders, setting: Setting, buckets: int) -> list[Collective]:
    """Large parameters are gathered for each forward and stay for its backward; small ones stay for good."""
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


def seconds_of(
    collective: Collective, device: Device, ranks: int, gpus_per_node: int, assumptions: Assumptions
) -> float:
    """Bytes over the slowest link, and the latency of every hop that they take."""
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // gpus_per_node)
    rate = ring_gb_s(device, nodes, min(ranks, gpus_per_node)) * 1e9 * assumptions.link_efficiency
    rounds = 2 if collective.kind == "all_reduce" else 1
    each = LATENCIES_S["small" if collective.whole_bytes < SMALL_BYTES * collective.calls else "large"]
    hops_s = (ranks - nodes) * each[_link(device)] + (nodes - 1) * each["network"]
    if collective.kind == "all_reduce":  # NCCL takes a tree over the nodes where that is shorter than the ring
        hops_s = min(hops_s, (min(ranks, gpus_per_node) - 1) * each[_link(device)] + math.log2(nodes) * each["network"])
    latency = each["start"] + rounds * hops_s
    return collective.sent_bytes(ranks) / rate + collective.calls * latency


def small_reduces_s(device: Device, ranks: int, gpus_per_node: int) -> float:
    """The few numbers that ranks agree on in every step: latency alone, up and down a tree."""
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // gpus_per_node)
    each = LATENCIES_S["small"]
    hops = math.log2(max(1, ranks / nodes)) * each[_link(device)] + math.log2(nodes) * each["network"]
    return SMALL_REDUCES * (each["start"] + 2 * hops)


def ring_gb_s(device: Device, nodes: int, gpus: int) -> float:
    """Within a node each GPU's own link; between nodes its rings share all of the node's network cards."""
    inside = device.link_gb_s if gpus > 1 else math.inf
    return inside if nodes == 1 else min(inside, gpus * device.network_gbit_s / 8)


def _link(device: Device) -> str:
    return "nvlink" if device.nvlink else "pcie"
