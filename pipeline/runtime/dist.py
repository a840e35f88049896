"""Rank and device of this process, for any launcher, and the collectives that a run needs.

In: the environment of `deepspeed`, `torchrun`, `srun` or plain `python`. Out: `Launch`, and functions that pass numbers,
tensors and JSON between ranks. Nothing here pickles, so a rank never executes what another rank sent.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from data_prep.command_line import program_command
from pipeline.errors import UserError
from pipeline.runtime import gpus
from pipeline.runtime.allotment import check_allotted_gpus
from pipeline.runtime.rank_devices import check_rank_devices, my_device

_SLURM_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST")


@dataclass(frozen=True)
class Launch:
    """Rank and device of this process. The collectives do nothing with one rank, so that they need no process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks, in place."""
        return sum_over_ranks(values) if self.world_size > 1 else values

    def from_main(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        return broadcast_json(value) if self.world_size > 1 else value

    def barrier(self) -> None:
        if self.world_size > 1:
            barrier()


def read_launch() -> Launch:
    """Read the launcher's variables, after setting those that it left out (`python` sets none, `srun` sets SLURM_*).

    Raises:
        UserError: a variable is missing, not a number or out of range; or this rank has no GPU of its own that works
    """
    environment = os.environ
    # only srun sets SLURM_STEP_NUM_TASKS; SLURM_NTASKS and SLURM_PROCID are in a batch script's environment as well
    if "RANK" not in environment and number_in(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        _map_slurm(environment)
    environment.setdefault("RANK", "0")
    environment.setdefault("WORLD_SIZE", "1")
    environment.setdefault("LOCAL_RANK", "0")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in environment and environment["WORLD_SIZE"] != "1":
        raise UserError("WORLD_SIZE is set but MASTER_PORT is not: start with deepspeed, torchrun or srun")
    rank, world_size, local_rank = (number_in(environment, name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not rank < world_size or not local_rank < world_size:
        raise UserError(
            f"RANK is {rank} and LOCAL_RANK {local_rank}; both must be below WORLD_SIZE, which is {world_size}. Start with "
            "deepspeed, torchrun or srun, or `unset RANK LOCAL_RANK WORLD_SIZE` for one process"
        )
    if number_in(environment, "MASTER_PORT", 1) >= 2**16:
        raise UserError(f"MASTER_PORT is {environment['MASTER_PORT']}; a port is between 0 and 65535")
    check_allotted_gpus()
    device = torch.device("cpu")
    if num_seen := gpus.count():
        if num_seen == 1 and local_rank > 0:
            # srun --gpus-per-task=1 or --gpu-bind: each task sees only its own GPU, as cuda:0. That it is not one GPU for all
            # is checked when the ranks meet. DeepSpeed reads LOCAL_RANK too.
            local_rank, environment["LOCAL_RANK"] = 0, "0"
        if local_rank >= num_seen:
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: its process sees {num_seen} on {socket.gethostname()}. Start at "
                "most one process per GPU, or let each see its own alone (srun --gpus-per-task=1)"
            )
        device = torch.device("cuda", local_rank)
        gpus.check_usable(device)
    return Launch(rank, world_size, local_rank, device)


def number_in(environment: Mapping[str, str], name: str, default: int) -> int:
    """A launcher's variable as a number. Raises `UserError` where it is not one, or has more than ten digits."""
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 10):
        raise UserError(f"{name} is {text[:40]!r}, not a number: start with deepspeed, torchrun or srun")
    return int(text)


def _map_slurm(environment: Any) -> None:
    """One srun task per rank: set the variables of torch.distributed from Slurm's."""
    if missing := [name for name in _SLURM_STEP if name not in environment]:
        raise UserError(
            f"srun set SLURM_STEP_NUM_TASKS but not {', '.join(missing)}: start with deepspeed, torchrun or srun"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    if "MASTER_ADDR" not in environment:
        is_one_node = environment["SLURM_STEP_NUM_NODES"] == "1"
        environment["MASTER_ADDR"] = "127.0.0.1" if is_one_node else _first_address(environment["SLURM_STEP_NODELIST"])
    # Every task computes the same port: from job, attempt and step, below the kernel's own range (32768).
    job, attempt, step = (number_in(environment, f"SLURM_{name}", 0) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    environment.setdefault("MASTER_PORT", str(15000 + (job * 7 + attempt * 13 + step) % 15000))


def _first_address(node_list: str) -> str:
    """The first node of a list like `n[1-4]`: its name where that resolves, else the address that Slurm knows."""
    try:
        first = _scontrol("hostnames", node_list).split()[0]
        try:
            socket.getaddrinfo(first, None)
        except OSError:
            facts = dict(word.split("=", 1) for word in _scontrol("node", first).split() if "=" in word)
            return facts["NodeAddr"]
        return first
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"srun started several ranks, but `scontrol` does not name the first node ({error}). Set MASTER_ADDR "
            "to the first node's name before srun"
        ) from None


def _scontrol(kind: str, name: str) -> str:
    command = ["scontrol", "--oneliner", "show", kind, name]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def init_process_group(launch: Launch, timeout_s: float) -> None:
    """Join the other ranks: NCCL for tensors on GPUs, gloo for those in host memory.

    Flags and JSON travel through gloo, so that no rank waits for its GPU to exchange them. `timeout_s` limits every later
    collective.
    """
    if torch_dist.is_initialized():
        return
    has_gpu = launch.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    timeout = timedelta(seconds=timeout_s)
    gpu = launch.device if has_gpu else None  # else NCCL guesses at the first barrier, and warns
    rank, size = launch.rank, launch.world_size
    try:
        store = _meet(launch, timeout)
        check_rank_devices(store, rank, my_device(launch.device), size)
        torch_dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store, device_id=gpu)
    except (torch_dist.DistNetworkError, torch_dist.DistStoreError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"another program listens on {address}, where the ranks would meet (another run on this machine?). "
                f"Use another port: {program_command('deepspeed')} --master_port {free_port()} pipeline/train.py ..., or the same option of torchrun"
            ) from None
        raise UserError(f"the ranks could not meet at {address}: {str(error).splitlines()[0]}") from None


def _meet(launch: Launch, timeout: timedelta) -> torch_dist.Store:
    """The store that all ranks share. Returns when every rank has reached it."""
    if launch.world_size == 1:  # the kernel chooses the port and keeps it, so no other program can take it
        return torch_dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    store, *_ = next(torch_dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    store.set_timeout(timeout)
    return torch_dist.PrefixStore("ranks", store)


def free_port() -> int:
    """A port that no program listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks, in place. Shape and dtype must be the same on all ranks."""
    torch_dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank when `flag` is true on one of them."""
    tensor = torch.tensor([flag], dtype=torch.uint8)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return bool(tensor.numpy().any())


def barrier() -> None:
    torch_dist.barrier()


def gather_json(value: Any) -> list[Any]:
    """Every rank's JSON value, in rank order, on every rank."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world_size = torch_dist.get_world_size()
    size = torch.tensor([payload.numel()])
    sizes = [torch.zeros_like(size) for _ in range(world_size)]
    torch_dist.all_gather(sizes, size)
    lengths = [int(s.item()) for s in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: payload.numel()] = payload
    parts = [torch.zeros_like(padded) for _ in range(world_size)]
    torch_dist.all_gather(parts, padded)
    return [json.loads(bytes(p[:n].numpy())) for p, n in zip(parts, lengths, strict=True)]


def gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's rows [n, ...], in rank order; n may differ. This rank's are `rows` itself, with its graph."""
    world_size = torch_dist.get_world_size()
    if world_size == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    torch_dist.all_gather(counts, torch.tensor([len(rows)]))  # on the host: nothing waits for a GPU
    sizes = [int(count.numpy()[0]) for count in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    torch_dist.all_gather(parts, padded)
    mine = torch_dist.get_rank()
    return [rows if r == mine else part[:size] for r, (part, size) in enumerate(zip(parts, sizes, strict=True))]


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank."""
    return gather_json(value if torch_dist.get_rank() == 0 else None)[0]


def take_from_main(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Give every rank the values of rank 0, in place: other machines may compute other last bits."""
    for tensor in tensors:
        moved = tensor.detach().to(device)
        torch_dist.broadcast(moved, 0)
        tensor.detach().copy_(moved)


def shut_down() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
