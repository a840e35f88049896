"""The `triton` backend without a GPU: in Triton's interpreter, compiled for GPUs that are not here, and where it cannot run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from packaging.version import Version

from pipeline.distillation.relations import relation_kl
from pipeline.errors import UserError
from tests.conftest import REPO

# Bytes of registers that earlier Tritons (3.4 of torch 2.8, 3.6 of torch 2.11) store in two of the 30 kernels.
SPILLED_BY_TRITON = {
    "3.4": {("gradient_kernel", 80, torch.float16, (64, 64)): 12, ("sums_kernel", 90, torch.float32, (16, 6)): 8},
    "3.6": {("gradient_kernel", 80, torch.float16, (16, 6)): 4, ("sums_kernel", 80, torch.float32, (16, 6)): 8},
}
INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
POINTERS = {"DIAGONALS": "fp32", "SHIFTS": "fp32", "FACTORS": "fp32", "KL": "fp32", "SPANS": "i32", "TILES": "i32"}


def test_triton_in_its_interpreter(tmp_path):
    triton = pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("Triton 3.6's interpreter reads arrays of one element as numbers, which numpy 2.4 does not allow")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(INTERPRETED)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout[-2000:]


def compiled(kernel, capability: int, dtype: torch.dtype, head_T: int, head_S: int) -> dict[str, str | bytes]:
    """Triton's intermediate and machine code of a kernel, made without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pipeline.distillation.relations.backends import RelationInputs
    from pipeline.distillation.relations.fused import constants_of

    teacher, student = (torch.empty(1, 1, head_dim, dtype=dtype) for head_dim in (head_T, head_S))
    constants = constants_of(RelationInputs(teacher, None, student, None, 1, ()))
    pointers = {**POINTERS, "X_T": ELEMENTS[dtype], "X_S": ELEMENTS[dtype], "GRADIENT": ELEMENTS[dtype]}
    names = kernel.arg_names
    signature = {
        name: f"*{pointers[name]}" if name in pointers else "constexpr" if name in constants
        else "fp32" if name.startswith("scale") else "i32"
        for name in names
    }  # fmt: skip
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in pointers}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return compile(source, GPUTarget("cuda", capability, 32)).asm


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "head_dims"),
    [
        (torch.float16, (16, 6)), (torch.float16, (64, 64)), (torch.bfloat16, (16, 8)),
        (torch.float32, (16, 6)), (torch.float32, (64, 64)),
    ],
    ids=str,
)  # fmt: skip
def test_triton_kernels_compile_without_spilling_registers(capability, dtype, head_dims, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")
    from pipeline.distillation.relations import _triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (kernels.diagonals_kernel, kernels.sums_kernel, kernels.gradient_kernel):
        source = tmp_path / "kernel.ptx"
        source.write_text(compiled(kernel, capability, dtype, *head_dims)["ptx"])
        target = re.search(r"^\.target (sm_\w+)", source.read_text(), re.MULTILINE)[1]
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={target}",
            str(source),
            "-o",
            str(tmp_path / "cubin"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        (registers,) = re.findall(r"Used (\d+) registers", report)
        print(f"{kernel.__name__}: {registers} registers")
        # In fp32 ptxas may store one register of 40 or 96 to keep more programs on a multiprocessor: 4 bytes.
        allowed = 4 if dtype == torch.float32 else 0
        of_version = SPILLED_BY_TRITON.get(".".join(triton.__version__.split(".")[:2]), {})
        allowed = of_version.get((kernel.__name__, capability, dtype, head_dims), allowed)
        assert max(map(int, re.findall(r"(\d+) bytes spill", report))) <= allowed, f"{kernel.__name__}: {report}"


def test_triton_on_a_cpu_says_what_to_do():
    pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")
    x_BLD = torch.randn(1, 5, 16)
    with pytest.raises(
        UserError, match=r"`triton` cannot run here: .* on `cpu`\. .*set `relations.backend` to `flash`"
    ) as caught:
        relation_kl(x_BLD, x_BLD, 2, backend="triton")
    assert "\n" not in str(caught.value)


def test_triton_that_is_not_installed_is_no_import_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x_BLD = torch.randn(1, 5, 16)
    with pytest.raises(UserError, match="Triton is not installed"):
        relation_kl(x_BLD, x_BLD, 2, backend="triton")


def test_triton_is_not_imported_before_it_is_needed():
    program = """
import sys
sys.modules["triton"] = None  # an import of it fails
from pipeline.distillation.relations.backends import BACKENDS
assert "triton" in BACKENDS
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPO, check=True, env={**os.environ, "PYTHONPATH": str(REPO)})
