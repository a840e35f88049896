"""The devices of several ranks, compared in a real store while they meet. The ranks are threads; the GPUs are stated."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.errors import UserError
from pipeline.runtime.rank_devices import RankDevice, check_rank_devices, kinds_warning, my_device
from tests.dist.ports import free_port

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
NO_GPU = RankDevice("n2", "CPU", "", 0)


def gpu(uuid: str, host: str = "n1", name: str = H100, num_seen: int = 1) -> RankDevice:
    return RankDevice(host, name, uuid, num_seen)


def meet(devices: list[RankDevice]) -> list[str]:
    """What every rank is told; empty where it may continue."""
    port, size = free_port(), len(devices)
    kept = []  # rank 0 holds the store, here until the other threads have read it

    def rank(number: int) -> str:
        store = torch.distributed.TCPStore("127.0.0.1", port, size, is_master=number == 0)
        kept.append(store)
        try:
            check_rank_devices(store, number, devices[number], size)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_a_gpu_for_each_rank() -> None:
    assert meet([gpu("a"), gpu("b"), gpu("c", "n2"), gpu("d", "n2")]) == [""] * 4


def test_cpus_are_shared_by_ranks() -> None:
    mine = my_device(torch.device("cpu"))
    assert mine.uuid == ""
    assert meet([mine, mine]) == ["", ""]


@pytest.mark.parametrize("num_seen", [1, 8])
def test_two_ranks_on_one_gpu_end_with_the_same_message(num_seen: int) -> None:
    """Each sees one GPU and takes it for its own, or a wrapper gave two ranks the same LOCAL_RANK."""
    began = time.monotonic()
    told = meet([gpu("a", num_seen=num_seen), gpu("b", num_seen=num_seen), gpu("a", num_seen=num_seen)])
    assert time.monotonic() - began < 10
    assert len(set(told)) == 1
    assert f"rank 0 and rank 2 use the same GPU: {H100} on n1, UUID a; each of them sees {num_seen}" in told[0]
    assert "srun --gpus-per-task=1" in told[0]


@pytest.mark.parametrize("devices", [[gpu("a"), NO_GPU], [NO_GPU, gpu("a")]])
def test_a_rank_without_gpu_is_named(devices: list[RankDevice]) -> None:
    """It would wait with gloo for ranks that wait with NCCL."""
    number = devices.index(NO_GPU)
    told = meet(devices)
    assert len(set(told)) == 1
    assert f"rank {number} on n2 sees no GPU, and rank {1 - number} on n1 has one ({H100})" in told[0]


def test_gpus_of_several_kinds_are_a_warning() -> None:
    assert kinds_warning([H100] * 8) is None
    warning = kinds_warning([A100] * 8 + [H100] * 4)
    assert warning is not None
    assert f"8 x {A100} (first: rank 0); 4 x {H100} (first: rank 8)" in warning
    assert "not equal bit for bit" in warning
