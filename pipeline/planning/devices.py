"""The table of GPUs that a plan knows: one row of published figures each, with their source.

Rates are per GPU: dense (no sparsity), in one direction, in decimal units. Memory is what the driver shows, in GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UserError, did_you_mean
from pipeline.planning.assumptions import Assumptions


@dataclass(frozen=True)
class Device:
    """One GPU (or one CPU core) and its share of the node in which it is usually installed."""

    name: str
    memory_gib: float
    half_tflops: float  # fp16, and bf16 where the GPU has it, with fp32 accumulation
    fp32_tflops: float  # without TF32, which torch disables by default
    memory_gb_s: float
    link_gb_s: float  # to the other GPUs of the node
    network_gbit_s: float  # to other nodes
    processors: int  # streaming multiprocessors
    clock_ghz: float  # boost
    bf16: bool = True
    flash: bool = True  # has stock half-precision attention kernels (compute capability 8.0 and later)
    nvlink: bool = True
    source: str = ""

    @property
    def exponentials_per_s(self) -> float:
        """16 special functions per multiprocessor and clock (CUDA programming guide, compute capabilities 7.0 to 9.0)."""
        return 16 * self.processors * self.clock_ghz * 1e9

    def flops_per_s(self, precision: str) -> float:
        return 1e12 * (self.fp32_tflops if precision == "fp32" else self.half_tflops)


# Network: DGX-1 4 x 100 Gbit/s, DGX A100 8 x 200, DGX H100 and H200 8 x 400, for 8 GPUs; otherwise 25 per GPU, an assumption.
_V100 = "NVIDIA V100 data sheet (SXM2)"
_DEVICES = (
    Device("a100-40", 40, 312, 19.5, 1555, 300, 200, 108, 1.41, source="NVIDIA A100 data sheet (SXM)"),
    Device("a100-80", 80, 312, 19.5, 2039, 300, 200, 108, 1.41, source="NVIDIA A100 data sheet (SXM)"),
    Device("h100-80", 79.6, 989, 67, 3350, 450, 400, 132, 1.83, source="NVIDIA H100 data sheet (SXM)"),
    Device("h200", 140, 989, 67, 4800, 450, 400, 132, 1.83, source="NVIDIA H200 data sheet (SXM)"),
    *(
        Device(name, memory, 125, 15.7, 900, 150, 50, 80, 1.53, bf16=False, flash=False, source=_V100)
        for name, memory in (("v100-16", 16), ("v100-32", 32))
    ),
    Device(
        "t4", 15, 65, 8.1, 300, 16, 25, 40, 1.59, bf16=False, flash=False, nvlink=False, source="NVIDIA T4 data sheet"
    ),
    Device("l4", 22.5, 121, 30.3, 300, 32, 25, 58, 2.04, nvlink=False, source="NVIDIA L4 data sheet"),
    Device("l40s", 44.9, 362, 91.6, 864, 32, 25, 142, 2.52, nvlink=False, source="NVIDIA L40S data sheet"),
    Device("a10", 22.5, 125, 31.2, 600, 32, 25, 72, 1.70, nvlink=False, source="NVIDIA A10 data sheet"),
    Device("a40", 45, 150, 37.4, 696, 32, 25, 84, 1.74, nvlink=False, source="NVIDIA A40 data sheet"),
    Device("rtx3090", 24, 71, 35.6, 936, 32, 25, 82, 1.70, nvlink=False, source="NVIDIA GA102 whitepaper"),
    Device("rtx4090", 24, 165, 82.6, 1008, 32, 25, 128, 2.52, nvlink=False, source="NVIDIA Ada whitepaper"),
    # One core, to plan the quickstart: rates that reproduce benchmarks/results/2026-11-23-step.md at the assumed efficiency.
    Device(
        "cpu", 12, 0.16, 0.128, 15, 5, 1, 1, 3.0, flash=False, nvlink=False, source="bench_step.py on one EPYC core"
    ),
)
DEVICES = {device.name: device for device in _DEVICES}
# Names that the driver gives to GPUs with the rates of a row. Others, such as the H100 on a PCIe card, have lower rates.
_DRIVER_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100-80",
    "NVIDIA H200": "h200",
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-SXM2-32GB": "v100-32",
    "Tesla T4": "t4",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10": "a10",
    "NVIDIA A40": "a40",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def peak_flops_per_s(driver_name: str, precision: str) -> float | None:
    """The published peak of a GPU, by the name that the driver gives it. None: the table does not have it."""
    device = device_of_driver(driver_name)
    return None if device is None else device.flops_per_s(precision)


def device_of_driver(driver_name: str) -> Device | None:
    """The row of a GPU, by the name that the driver gives it. None: the table does not have it."""
    row = _DRIVER_NAMES.get(driver_name)
    return None if row is None else DEVICES[row]


def device_of(name: str) -> Device:
    """The row of the table. An unknown name is a `UserError` with the nearest known name."""
    if name not in DEVICES:
        raise UserError(
            f"--gpu {name} is not in the table; {did_you_mean(name, list(DEVICES))} "
            f"Known: {', '.join(DEVICES)}. To add one, add a row to pipeline/planning/devices.py"
        )
    return DEVICES[name]


@dataclass(frozen=True)
class Hardware:
    """A device and the shares of its peak rates that a plan assumes."""

    device: Device
    assumptions: Assumptions = Assumptions()  # noqa: RUF009  (frozen)

    @property
    def memory_bytes_per_s(self) -> float:
        return self.device.memory_gb_s * 1e9 * self.assumptions.memory_efficiency

    @property
    def host_copy_bytes_per_s(self) -> float:
        return self.assumptions.host_copy_gb_s * 1e9
