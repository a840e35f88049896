"""Check the machine: devices, compiler, locks, run directory, ports, TensorBoard, Slurm.

In: the run directory. Out: a list of `Finding`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data_prep.shards import DataError
from pipeline.errors import UserError
from pipeline.runtime import preflight
from pipeline.runtime.allotment import allotted_gpus, why_unseen

REPO = Path(__file__).resolve().parent.parent.parent
LAUNCHER_PORT = 29500  # default master port of `deepspeed` and `torchrun`
FEW_FREE_BYTES = 5 * 2**30
COMMAND_TIMEOUT_S = 20


@dataclass(frozen=True)
class Finding:
    """The result of one check. `fail`: a run cannot work. `warn`: it can, with a caveat. `fix`: what to do."""

    status: Literal["ok", "warn", "fail"]
    subject: str
    what: str
    fix: str = ""


def machine_findings(run_dir: Path) -> list[Finding]:
    """All checks that need no recipe, in the order in which problems are fixed."""
    return [
        *device_findings(),
        compiler_finding(),
        *lock_findings(),
        guarded("run dir", lambda: run_dir_finding(run_dir)),
        port_finding(LAUNCHER_PORT),
        tensorboard_finding(),
        slurm_finding(),
    ]


def guarded(subject: str, look: Callable[[], Finding]) -> Finding:
    """The finding of `look`, or a failure with the message of its error, which says how to fix it."""
    try:
        return look()
    except (UserError, DataError) as error:
        return Finding("fail", subject, str(error))


def device_findings() -> list[Finding]:
    """GPUs or CPU, and their precisions."""
    from pipeline.runtime.engine import device_precisions

    num_gpus = torch.cuda.device_count()
    found = []
    if num_gpus:
        names = {torch.cuda.get_device_name(number) for number in range(num_gpus)}
        memory = min(torch.cuda.get_device_properties(number).total_memory for number in range(num_gpus))
        found.append(
            Finding("ok", "devices", f"{num_gpus} x {', '.join(names)}, {memory / 2**30:.0f} GiB or more each")
        )
        if len(names) > 1:
            found.append(
                Finding("warn", "devices", "GPUs of several kinds", "the slowest determines the speed: use one kind")
            )
    elif allotted := allotted_gpus():
        what = f"Slurm has allotted {allotted} GPU(s) here, and torch {torch.__version__} finds none"
        found.append(Finding("fail", "devices", what, why_unseen()))
    elif shutil.which("nvidia-smi"):
        what = f"nvidia-smi exists, but torch {torch.__version__} finds no GPU"
        fix = "install the torch build for your driver's CUDA (pytorch.org), and check CUDA_VISIBLE_DEVICES"
        found.append(Finding("fail", "devices", what, fix))
    else:
        found.append(Finding("ok", "devices", f"no GPU; {os.cpu_count()} CPU cores, ranks communicate over gloo"))
    can = device_precisions(torch.device("cuda", 0) if num_gpus else torch.device("cpu"))
    has = [name for name, there in (("fp16", can.fp16), ("bf16", can.bf16_fast)) if there]
    what = f"{can.device} computes in fp32{''.join(', ' + name for name in has)}"
    found.append(Finding("ok", "precision", what + ("" if has else "; half precision would be slower here")))
    return found


def compiler_finding() -> Finding:
    """A C++ compiler. Only `teacher_options.compile` requires one."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler and shutil.which(compiler):
        return Finding("ok", "compiler", compiler)
    fix = "required only for teacher_options.compile: install g++ or set CXX"
    return Finding("warn", "compiler", "no C++ compiler", fix)


def lock_findings() -> list[Finding]:
    """Locks that a killed compilation left. The next compilation would wait for them indefinitely without a message."""
    locks = preflight.stale_build_locks()
    if not locks:
        return [Finding("ok", "locks", "no stale compilation lock")]
    return [
        Finding("warn", "locks", f"{lock} was left by a killed compilation", f"rm {shlex.quote(str(lock))}")
        for lock in locks
    ]


def run_dir_finding(run_dir: Path) -> Finding:
    """Files can be written, synced and renamed in the run directory, and some space is free."""
    with preflight.without_trace(run_dir):
        preflight.check_run_dir(run_dir)
        free = shutil.disk_usage(run_dir).free
    what = f"{run_dir} can be written to, {free / 2**30:.1f} GiB free"
    if free < FEW_FREE_BYTES:
        return Finding("warn", "run dir", what, "free space, or use a --run-dir on another disk")
    return Finding("ok", "run dir", what)


def port_finding(port: int) -> Finding:
    """The default port of the launchers is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            fix = "deepspeed --master_port N pipeline/train.py ..., or torchrun --master_port N ..."
            return Finding(
                "warn", "ports", f"another program listens on {port}, the default port of the launchers", fix
            )
    return Finding("ok", "ports", f"{port}, the default port of the launchers, is free")


def tensorboard_finding() -> Finding:
    """TensorBoard starts and answers a request."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            from tensorboard import program

            board = program.TensorBoard()
            board.configure(
                argv=[None, "--logdir", empty, "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
            )
            with urllib.request.urlopen(board.launch(), timeout=COMMAND_TIMEOUT_S) as reply:
                reply.read(1)
        except (ImportError, OSError, urllib.error.URLError, program.TensorBoardServerException) as error:
            fix = "pip install -r requirements.txt; until then: python -m pipeline report RUN_DIR"
            return Finding("warn", "tensorboard", f"does not start ({error})", fix)
    return Finding("ok", "tensorboard", "starts and answers")


def slurm_finding() -> Finding:
    """The partitions of the cluster, where Slurm is installed."""
    if not shutil.which("sinfo"):
        return Finding("ok", "slurm", "not installed; start runs with deepspeed, torchrun or python")
    command = ["sinfo", "--noheader", "--format=%P %a %D x %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", f"no answer in {COMMAND_TIMEOUT_S} s")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        return Finding(
            "warn", "slurm", f"sinfo fails: {reason}", "check with `scontrol ping` whether slurmctld can be reached"
        )
    partitions = "; ".join(line.strip() for line in done.stdout.splitlines())
    return Finding("ok", "slurm", f"{partitions or 'no partition'}; check nodes with slurm/node_check.sh")
