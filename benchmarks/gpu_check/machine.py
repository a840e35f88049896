"""The machine: device, versions, the attention kernels that torch chooses, and the limits that a step is compared with.

Limits: copy bandwidth, matrix products in the shapes of teacher and student, exponentials, the cost of a launch and of a read.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.figures import Figures, NotHere, Row
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.timing import device, half_precision, median_ms, on_gpu, synchronize
from benchmarks.measure import machine
from pipeline.provenance import library_versions
from pipeline.runtime.determinism import deterministic_kernels, fix_workspace

FACTS, LIMITS, ATTENTION = "Facts", "Limits", "Attention of the encoders"
SMI_FIELDS = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
TOKENS = 32 * 512  # of one step
# (rows, summed, columns) of the products in which most operations are
PRODUCTS = {
    "square 8192": (8192, 8192, 8192),
    "teacher's attention": (TOKENS, 1024, 1024),
    "teacher's FFN, in": (TOKENS, 1024, 4096),
    "teacher's FFN, out": (TOKENS, 4096, 1024),
    "student's attention": (TOKENS, 384, 384),
    "student's FFN, in": (TOKENS, 384, 1536),
    "student's FFN, out": (TOKENS, 1536, 384),
    "one relation's logits": (64 * 512, 16, 512),
}
ATTENTION_KERNEL = "aten::_scaled_dot_product_"
EXPONENTIAL_PROGRAMS = 132 * 64


def measure(setting: Setting, figures: Figures) -> None:
    """Facts, the encoders' attention, limits."""
    fix_workspace()  # before CUDA starts: deterministic kernels may need it
    figures.attempt(FACTS, {"fact": "machine"}, lambda: {"value": machine()})
    figures.attempt(FACTS, {"fact": "device"}, _device)
    figures.attempt(FACTS, {"fact": "driver, clocks, power, memory"}, _driver)
    figures.attempt(FACTS, {"fact": "versions"}, _versions)
    for name, shape in _attention_shapes(setting).items():
        figures.attempt(ATTENTION, {"of": name}, partial(_attention, *shape))
    for name, measure_limit in _limits(setting).items():
        figures.attempt(LIMITS, {"operation": name}, measure_limit)
    figures.attempt(FACTS, {"fact": "doctor"}, _doctor)


def _device() -> Row:
    if not on_gpu():
        return {"value": "no GPU"}
    about = torch.cuda.get_device_properties(0)
    capability = f"compute capability {about.major}.{about.minor}, {about.multi_processor_count} multiprocessors"
    return {"value": f"{about.name}, {capability}, {about.total_memory / 2**30:.1f} GiB"}


def _driver() -> Row:
    if not on_gpu():
        raise NotHere("there is no GPU")
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    return {"value": subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()}


def _versions() -> Row:
    versions: dict[str, str] = dict(library_versions()["packages"])
    if on_gpu():
        versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {"value": ", ".join(f"{name} {version}" for name, version in versions.items())}


def _doctor() -> Row:
    """What `python -m pipeline doctor` says: its lines with a problem, or its last one."""
    command = [sys.executable, "-m", "pipeline", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    lines = done.stdout.strip().splitlines()
    return {"value": f"exit code {done.returncode}; {lines[-1] if lines else done.stderr.strip()[-300:]}"}


# -- attention


def _attention_shapes(setting: Setting) -> dict[str, tuple]:
    """Rows, heads, tokens, channels of a head; whether it is trained."""
    rows, tokens = (2, 32) if setting.is_tiny else (32, 512)
    return {"teacher": (rows, 16, tokens, 64, False), "student": (rows, 12, tokens, 32, True)}


def _attention(rows: int, heads: int, tokens: int, channels: int, is_trained: bool) -> Row:
    """The kernel that torch chooses, by default and in deterministic mode; whether the gradient has the same bits each time."""
    size = (rows, heads, tokens, channels)
    tensors = [torch.randn(size, device=device(), dtype=half_precision()).requires_grad_(is_trained) for _ in range(3)]

    def once() -> list[torch.Tensor]:
        torch.manual_seed(0)
        q, k, v = tensors
        out = scaled_dot_product_attention(q, k, v, dropout_p=0.1 if is_trained else 0.0)
        return list(torch.autograd.grad(out.float().square().sum(), tensors)) if is_trained else [out]

    row: Row = {}
    for name, deterministic in (("", False), ("deterministic ", True)):
        with deterministic_kernels(deterministic):
            first = once()
            same = all(torch.equal(a, b) for _ in range(4) for a, b in zip(first, once(), strict=True))
            row |= {f"{name}kernel": _kernel_of(once), f"{name}ms": median_ms(once), f"{name}same bits": same}
    return row


def _kernel_of(action: Callable[[], object]) -> str:
    """The name of the attention operation that torch dispatched to."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        action()
    names = {event.key for event in profiler.key_averages() if event.key.startswith(ATTENTION_KERNEL)}
    forward = sorted(name.removeprefix(ATTENTION_KERNEL) for name in names if not name.endswith("_backward"))
    return ", ".join(forward) or "not found"


# -- limits


def _limits(setting: Setting) -> dict[str, Callable[[], Row]]:
    """Name -> what measures it. Sizes are small in a tiny check."""
    shrink = 64 if setting.is_tiny else 1
    limits: dict[str, Callable[[], Row]] = {"copy on the device": partial(_copy, 2**30 // shrink**2)}
    for dtype in (torch.float16, torch.bfloat16):
        for name, shape in PRODUCTS.items():
            key = f"{name} {' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
            limits[key] = partial(_product, [max(16, n // shrink) for n in shape], dtype)
    limits["square 4096, float32"] = partial(_product, [4096 // shrink] * 3, torch.float32)
    limits["exponentials"] = _exponentials
    limits["a launch"] = _launch
    limits["a read of one number"] = _read
    limits["pinned memory to the device"] = partial(_transfer, 2**28 // shrink**2, pinned=True)
    limits["device to pinned memory"] = partial(_transfer, 2**28 // shrink**2, pinned=True, back=True)
    limits["device to pageable memory"] = partial(_transfer, 2**28 // shrink**2, pinned=False, back=True)
    return limits


def _copy(size_bytes: int) -> Row:
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return {"value": 2 * size_bytes / median_ms(lambda: target.copy_(source)) / 1e6, "unit": "GB/s, read and written"}


def _product(shape: list[int], dtype: torch.dtype) -> Row:
    rows, summed, columns = shape
    a = torch.randn(rows, summed, device=device()).to(dtype)
    b = torch.randn(summed, columns, device=device()).to(dtype)
    return {"value": 2 * rows * summed * columns / median_ms(lambda: a @ b) / 1e9, "unit": "TFLOP/s"}


def _exponentials() -> Row:
    """The limit of the relation loss: a kernel that computes nothing else."""
    if not on_gpu():
        raise NotHere("the kernel is written in Triton, for a GPU")
    from benchmarks.gpu_check.exponentials import BLOCK, ROUNDS, exponentials

    out = torch.empty(EXPONENTIAL_PROGRAMS * BLOCK, device=device())
    ms = median_ms(lambda: exponentials[(EXPONENTIAL_PROGRAMS,)](out, ROUNDS=ROUNDS, BLOCK=BLOCK))
    return {"value": out.numel() * ROUNDS / ms / 1e9, "unit": "10^12/s"}


def _launch() -> Row:
    """Host time of one small kernel while the device keeps up."""
    x = torch.zeros(1, device=device())
    return {"value": _host_us(lambda: x.add_(1), 500), "unit": "us"}


def _read() -> Row:
    x = torch.zeros(1, device=device())
    return {"value": _host_us(x.item, 200), "unit": "us"}


def _host_us(action: Callable[[], object], repeats: int) -> float:
    for _ in range(repeats):
        action()
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    spent = time.perf_counter() - began
    synchronize()
    return 1e6 * spent / repeats


def _transfer(size_bytes: int, pinned: bool, back: bool = False) -> Row:
    if not on_gpu():
        raise NotHere("there is no GPU")
    host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=pinned)
    on_device = torch.zeros(size_bytes, dtype=torch.uint8, device=device())
    source, target = (on_device, host) if back else (host, on_device)
    ms = median_ms(lambda: target.copy_(source, non_blocking=pinned))
    return {"value": size_bytes / ms / 1e6, "unit": "GB/s"}
