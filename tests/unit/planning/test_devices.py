"""The published peak of the GPU on which a run trains."""

from __future__ import annotations

from pipeline.planning.devices import _DRIVER_NAMES, DEVICES, peak_flops_per_s


def test_the_peak_of_a_gpu_by_its_drivers_name() -> None:
    assert peak_flops_per_s("NVIDIA H200", "fp16") == 989e12
    assert peak_flops_per_s("NVIDIA H200", "fp32") == 67e12
    assert peak_flops_per_s("Tesla T4", "fp16") == 65e12


def test_a_gpu_with_other_rates_has_no_peak_here() -> None:
    for name in ("NVIDIA H100 PCIe", "NVIDIA A10G", "CPU (x86_64)"):
        assert peak_flops_per_s(name, "fp16") is None


def test_every_row_of_the_table_but_the_cpu_has_a_name_of_the_driver() -> None:
    assert set(_DRIVER_NAMES.values()) == DEVICES.keys() - {"cpu"}
