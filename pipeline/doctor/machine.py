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

from data_prep.command_line import module_command, program_command
from data_prep.shards import DataError
from pipeline.errors import UserError
from pipeline.runtime import gpus, preflight
from pipeline.runtime.allotment import check_allotted_gpus, unused_gpu_warning, why_unseen
from pipeline.runtime.dist import free_port
from pipeline.runtime.gpus import Gpu
from pipeline.runtime.rank_devices import kinds_warning

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
    """GPUs or CPU, whether torch can compute on each, and their precisions, in the words of a run that starts here."""
    from pipeline.runtime.engine import device_precisions

    devices = [torch.device("cuda", number) for number in range(gpus.count())]
    try:
        check_allotted_gpus()
        for device in devices:
            gpus.check_usable(device)
    except UserError as error:
        return [Finding("fail", "devices", str(error))]
    found = gpu_findings([gpus.describe(device) for device in devices]) if devices else no_gpu_findings()
    can = device_precisions(devices[0] if devices else torch.device("cpu"))
    has = [name for name, there in (("fp16", can.fp16), ("bf16", can.bf16_fast)) if there]
    what = f"{can.device} computes in fp32{''.join(', ' + name for name in has)}"
    return [*found, Finding("ok", "precision", what + ("" if has else "; half precision would be slower here"))]


def gpu_findings(here: list[Gpu]) -> list[Finding]:
    """The GPUs of this machine, and a warning where they are of several kinds."""
    names, memory = [gpu.name for gpu in here], min(gpu.memory_bytes for gpu in here)
    what = f"{len(here)} x {', '.join(sorted(set(names)))}, {memory / 2**30:.0f} GiB or more each"
    warning = kinds_warning(names)
    return [Finding("ok", "devices", what), *([Finding("warn", "devices", warning)] if warning else [])]


def no_gpu_findings() -> list[Finding]:
    """The CPU, and a warning where there may be a GPU that torch does not see."""
    found = [Finding("ok", "devices", f"no GPU; {os.cpu_count()} CPU cores, ranks communicate over gloo")]
    if warning := unused_gpu_warning():
        found.append(Finding("warn", "devices", warning))
    elif shutil.which("nvidia-smi"):
        what = f"nvidia-smi is installed, and torch {torch.__version__} sees no GPU: {why_unseen()}"
        found.append(Finding("warn", "devices", what))
    return found


def compiler_finding() -> Finding:
    """A C++ compiler. Only `teacher_options.compile` and `student.compile` require one."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler and shutil.which(compiler):
        return Finding("ok", "compiler", compiler)
    fix = "required only for teacher_options.compile and student.compile: install g++ or set CXX"
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
            other = free_port()
            fix = f"{program_command('deepspeed')} --master_port {other} pipeline/train.py ..., or torchrun --master_port {other} ..."
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
            fix = f"{module_command('pip', 'install', '-r', 'requirements.txt')}; until then: {module_command('pipeline', 'report', 'RUN_DIR')}"
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
