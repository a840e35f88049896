"""Compares the devices of all ranks while they meet, before NCCL uses them: NCCL would hang or give another reason.

In: the store in which the ranks meet. Out: nothing, or on every rank the same `UserError`: two ranks on one GPU, or some
ranks without one. And for a run: the name of every rank's device, and a warning where they are of several kinds.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch.distributed import DistError, PrefixStore, Store

from data_prep.command_line import module_command
from pipeline.errors import UserError
from pipeline.runtime import gpus
from pipeline.runtime.device_facts import device_name

FAREWELL_S = 30.0  # rank 0 holds the store: it waits so long for the others to read why all of them end


@dataclass(frozen=True)
class RankDevice:
    """Where one rank computes. `uuid` is empty on a CPU. `num_seen`: GPUs that its process sees."""

    host: str
    name: str
    uuid: str
    num_seen: int


def my_device(device: torch.device) -> RankDevice:
    """This rank's device."""
    uuid = gpus.describe(device).uuid if device.type == "cuda" else ""
    return RankDevice(socket.gethostname(), device_name(device), uuid, gpus.count())


def check_rank_devices(store: Store, rank: int, mine: RankDevice, world_size: int) -> None:
    """Raise the same `UserError` on every rank where two of them share a GPU, or some have one and others have none."""
    store = PrefixStore("rank devices", store)
    store.set(str(rank), json.dumps(asdict(mine)))
    if rank == 0:  # alone: if every rank read all the others, a thousand ranks would read a million values from one
        described = store.multi_get([str(number) for number in range(world_size)])
        store.set("problem", problem_of([RankDevice(**json.loads(text)) for text in described]))
    problem = store.get("problem").decode()
    if problem:
        _wait_until_read(store, rank, world_size)
        raise UserError(problem)


def problem_of(devices: Sequence[RankDevice]) -> str:
    """Why ranks with these devices, in the order of the ranks, cannot work together; empty where they can."""
    first_on: dict[str, int] = {}
    for rank, device in enumerate(devices):
        if bool(device.uuid) != bool(devices[0].uuid):
            none, one = (rank, 0) if devices[0].uuid else (0, rank)
            return (
                f"rank {none} on {devices[none].host} sees no GPU, and rank {one} on {devices[one].host} has one "
                f"({devices[one].name}). `{module_command('pipeline', 'doctor')}` on {devices[none].host} says why. Use nodes of one kind"
            )
        other = first_on.setdefault(device.uuid, rank)
        if device.uuid and other != rank:
            return (
                f"rank {other} and rank {rank} use the same GPU: {device.name} on {device.host}, UUID {device.uuid}; each of them "
                f"sees {device.num_seen}. Start at most one process per GPU (torchrun --nproc_per_node, deepspeed "
                "--num_gpus), or let Slurm give each task its own: srun --gpus-per-task=1"
            )
    return ""


def _wait_until_read(store: Store, rank: int, world_size: int) -> None:
    store.add("read", 1)
    deadline = time.monotonic() + FAREWELL_S
    with contextlib.suppress(DistError):  # a rank that was killed meanwhile
        while rank == 0 and store.add("read", 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.01)


def kinds_warning(names: Sequence[str]) -> str | None:
    """A warning where the ranks, in this order, have devices of several kinds."""
    ranks_of: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        ranks_of.setdefault(name, []).append(rank)
    if len(ranks_of) <= 1:
        return None
    kinds = "; ".join(f"{len(ranks)} x {name} (first: rank {ranks[0]})" for name, ranks in ranks_of.items())
    return (
        f"the ranks have devices of several kinds: {kinds}. In every step all wait for the slowest. Each kind rounds differently: "
        "a restart that orders the ranks differently is not equal bit for bit. Use nodes of one kind (sbatch --constraint)"
    )
