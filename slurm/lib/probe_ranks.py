"""Join a process group as a run does, all-reduce a tensor, and print each step that succeeded.

srun ... python slurm/lib/probe_ranks.py          (node_check.sh: one task per GPU)
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from pipeline.errors import run_to_exit  # noqa: E402
from pipeline.runtime import dist  # noqa: E402
from pipeline.runtime.rank_devices import check_rank_devices, my_device  # noqa: E402

TIMEOUT_S = 180
NUM_ELEMENTS = 1 << 24  # 64 MiB in fp32
NUM_ROUNDS = 5


def main() -> None:
    launch = dist.read_launch()
    where = f"rank {launch.rank} on {socket.gethostname()} ({launch.device})"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Rank 0 holds the store. A rank that can set a key in it can reach rank 0.
    store = torch.distributed.TCPStore(
        address, port, launch.world_size, launch.is_main, timedelta(seconds=TIMEOUT_S), wait_for_workers=False
    )
    store.set(f"rank {launch.rank}", "here")
    print(f"{where} reached the first rank at {address}:{port}", flush=True)
    check_rank_devices(store, launch.rank, my_device(launch.device), launch.world_size)
    backend = "nccl" if launch.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
        device_id=launch.device if backend == "nccl" else None,
    )
    values = torch.ones(NUM_ELEMENTS, device=launch.device)
    dist.sum_over_ranks(values)
    began = time.monotonic()
    for _ in range(NUM_ROUNDS):
        dist.sum_over_ranks(values.fill_(1.0))
    total = int(values[-1].item())
    gigabytes_s = NUM_ROUNDS * NUM_ELEMENTS * 4 / 1e9 / (time.monotonic() - began)
    assert total == launch.world_size, f"{where}: the sum of ones is {total}, not {launch.world_size}"
    print(f"{where}: all-reduce works, {gigabytes_s:.2f} GB/s over {launch.world_size} ranks", flush=True)
    dist.barrier()  # rank 0 holds the store until all ranks have finished
    dist.shut_down()


if __name__ == "__main__":
    run_to_exit(main)
