"""What a process says about GPUs that it cannot use. No GPU is needed: torch.cuda's answers are stated, its errors are quoted."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import Recipe
from pipeline.doctor.machine import device_findings
from pipeline.errors import UserError
from pipeline.runtime import allotment, engine, gpus
from pipeline.runtime.allotment import check_allotted_gpus, unused_gpu_warning
from pipeline.runtime.dist import read_launch
from pipeline.runtime.engine import device_precisions
from pipeline.training.checks import Inputs
from tests.conftest import REPO

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, uuid="11111111", total_memory=80 * 2**30)
V100 = SimpleNamespace(name="Tesla V100-SXM2-32GB", major=7, minor=0, uuid="22222222", total_memory=32 * 2**30)
# As torch raises them (c10/cuda/CUDAFunctions.cpp, c10/cuda/CUDAException.cpp).
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NOT_READY = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that might "
    "have already set an error? Error 802: system not yet initialized"
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
NO_GPU = "No CUDA GPUs are available"
OF_A_DEVICE = (
    "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might "
    "be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)


@pytest.fixture
def cuda(no_launcher: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A build of torch for CUDA 13.0 on a machine with an NVIDIA driver; torch sees no GPU yet."""
    no_launcher.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    no_launcher.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "nvidiactl").touch()
    no_launcher.setattr(allotment, "NVIDIA_DRIVER", tmp_path / "nvidiactl")
    no_launcher.setattr(torch.cuda, "is_available", lambda: False)
    return no_launcher


def torch_says(cuda: pytest.MonkeyPatch, text: str) -> None:
    """`torch.cuda.init` raises this."""

    def init() -> None:
        raise RuntimeError(text)

    cuda.setattr(torch.cuda, "init", init)


def show(cuda: pytest.MonkeyPatch, *properties: SimpleNamespace, error: str = "") -> None:
    """Torch sees these GPUs. A computation on one of them ends in `error`, if there is one."""

    def compute(device: torch.device, num: int) -> float:
        if error:
            raise torch.AcceleratorError(OF_A_DEVICE.format(error))
        return float(num)

    def of(device: torch.device | int) -> SimpleNamespace:
        return properties[device.index if isinstance(device, torch.device) else device]

    cuda.setattr(torch.cuda, "is_available", lambda: True)
    cuda.setattr(torch.cuda, "device_count", lambda: len(properties))
    cuda.setattr(torch.cuda, "set_device", lambda device: None)
    cuda.setattr(torch.cuda, "get_device_properties", of)
    cuda.setattr(torch.cuda, "get_device_capability", lambda device: (of(device).major, of(device).minor))
    cuda.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    cuda.setattr(gpus, "sum_of_ones", compute)


# -- torch sees no GPU


@pytest.mark.parametrize(
    ("said", "visible", "words"),
    [
        (TOO_OLD, None, r"driver on your system is too old \(found version 11040\).*CUDA 13\.0.*Update the driver, or"),
        (NOT_READY, None, "system not yet initialized.*systemctl start nvidia-fabricmanager"),
        ("CUDA driver initialization failed, you might not have a CUDA gpu.", None, "dmesg"),
        (NO_GPU, "7", "No CUDA GPUs are available.*CUDA_VISIBLE_DEVICES is '7'.*nvidia-smi --list-gpus"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_cpus(
    cuda: pytest.MonkeyPatch, said: str, visible: str | None, words: str
) -> None:
    torch_says(cuda, said)
    if visible is not None:
        cuda.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"{words}.*export ALLOW_CPU_RANKS=1") as error:
        read_launch()
    assert "\n" not in str(error.value)
    assert str(error.value) in [finding.what for finding in device_findings() if finding.status == "fail"]
    cuda.setenv("ALLOW_CPU_RANKS", "1")
    assert read_launch().device.type == "cpu"


@pytest.mark.parametrize(
    ("said", "visible"), [(NO_DRIVER, None), (NO_GPU, None), (TOO_OLD, "")], ids=["container", "CPU job", "hidden"]
)
def test_a_process_that_has_no_gpu_runs_on_cpus(cuda: pytest.MonkeyPatch, said: str, visible: str | None) -> None:
    """Without the driver's library, without permission for a device, or with all of them hidden on purpose."""
    torch_says(cuda, said)
    if visible is not None:
        cuda.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert read_launch().device.type == "cpu"
    warning = unused_gpu_warning()
    assert (warning is None) == (visible == "")
    assert warning is None or said in warning


def test_a_build_of_torch_for_cpus_warns(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(torch.version, "cuda", None)
    check_allotted_gpus()
    assert "this is a build of torch for CPUs" in (unused_gpu_warning() or "")


def test_torchs_own_warning_about_its_driver_is_left_out(cuda: pytest.MonkeyPatch) -> None:
    """The error says the same once more, with what to do."""

    def is_available() -> bool:
        warnings.warn(f"CUDA initialization: {TOO_OLD} (Triggered internally at CUDAFunctions.cpp:119.)", stacklevel=2)
        warnings.warn("something else", stacklevel=2)
        return False

    cuda.setattr(torch.cuda, "is_available", is_available)
    with pytest.warns(UserWarning, match="something else") as said:
        assert not gpus.available()
    assert len(said) == 1


# -- torch sees a GPU


@pytest.mark.parametrize(
    ("properties", "error", "words"),
    [
        (H100, "CUDA-capable device(s) is/are busy or unavailable", "exclusive mode.*--compute-mode=DEFAULT"),
        (
            V100,
            "no kernel image is available for execution on the device",
            r"V100.*sm_70; torch is built for sm_75.*Install",
        ),
        (H100, "out of memory", "Other processes fill the GPU's memory"),
        (H100, "uncorrectable ECC error encountered", "dmesg"),
    ],
)
def test_a_gpu_on_which_torch_cannot_compute(
    cuda: pytest.MonkeyPatch, properties: SimpleNamespace, error: str, words: str
) -> None:
    show(cuda, properties, error=error)
    with pytest.raises(UserError, match=rf"cannot compute on cuda:0 .*{words}") as raised:
        read_launch()
    assert "\n" not in str(raised.value)
    assert "CUDA_LAUNCH_BLOCKING" not in str(raised.value), "that is for people who write kernels"
    assert [finding.what for finding in device_findings() if finding.status == "fail"] == [str(raised.value)]


def test_a_gpu_that_computes_a_wrong_sum(cuda: pytest.MonkeyPatch) -> None:
    show(cuda, H100)
    cuda.setattr(gpus, "sum_of_ones", lambda device, num: num - 1.0)
    with pytest.raises(UserError, match="the sum of 1024 ones is 1023"):
        read_launch()


def test_fewer_gpus_than_ranks(cuda: pytest.MonkeyPatch) -> None:
    show(cuda, H100, H100)
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "MASTER_PORT": "12345"}.items():
        cuda.setenv(name, value)
    with pytest.raises(UserError, match="local rank 2 has no GPU of its own: its process sees 2 on "):
        read_launch()


def test_one_visible_gpu_is_the_ranks_own(cuda: pytest.MonkeyPatch) -> None:
    """Whether it really is, the ranks find out when they meet: test_rank_devices.py."""
    show(cuda, H100)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_PORT": "12345"}.items():
        cuda.setenv(name, value)
    launch = read_launch()
    assert (launch.device, launch.local_rank, launch.rank) == (torch.device("cuda", 0), 0, 5)
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed reads its device from it"


@pytest.mark.parametrize(("properties", "expected"), [(H100, True), (V100, False)])
def test_bf16_only_where_the_gpu_has_it(cuda: pytest.MonkeyPatch, properties: SimpleNamespace, expected: bool) -> None:
    """`torch.cuda.is_bf16_supported()` says yes to V100 and T4, where bf16 is emulated."""
    show(cuda, properties)
    can = device_precisions(torch.device("cuda", 0))
    assert (can.bf16, can.bf16_fast, can.device) == (expected, expected, properties.name)


def inputs(config: str, dtype: str = "auto") -> Inputs:
    recipe = Recipe()
    recipe = dataclasses.replace(recipe, teacher_options=dataclasses.replace(recipe.teacher_options, dtype=dtype))
    return Inputs(recipe, Path("r.yaml"), REPO / "ds_configs" / config, 1, torch.device("cuda", 0), lambda recipe: None)


def test_a_v100_trains_in_fp16_and_rejects_bf16(cuda: pytest.MonkeyPatch) -> None:
    show(cuda, V100)
    cuda.setattr(engine, "get_accelerator", lambda: SimpleNamespace(is_fp16_supported=lambda: True))
    start = inputs("zero2.json")
    assert (start.precision, start.teacher_precision) == ("fp16", "fp16")
    with pytest.raises(
        UserError, match=r"asks for bf16, which Tesla V100.* does not have; use ds_configs/zero2\.json \(fp16\)"
    ):
        inputs("zero2_bf16.json").check_batch()
    with pytest.raises(
        UserError, match=r"dtype is bf16, which Tesla V100.* does not have; use one of auto, fp16, fp32"
    ):
        inputs("zero2.json", dtype="bf16").check_batch()
    show(cuda, H100)
    start = inputs("zero2_bf16.json", dtype="bf16")
    assert (start.precision, start.teacher_precision) == ("bf16", "bf16")
