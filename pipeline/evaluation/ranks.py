"""The ranks of an evaluation: one process, or several that share its work.

In: the launcher's environment. Out: `Ranks`. With one rank its collectives do nothing, so a plain
`python -m pipeline evaluate` needs no process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.runtime import dist
from pipeline.runtime.allotment import check_allotted_gpus

# Ranks wait for rank 0 while it runs the tasks that are not shared (retrieval, speed). If a rank dies, its launcher ends the job.
COLLECTIVE_TIMEOUT_S = 4 * 3600.0


@dataclass(frozen=True)
class Ranks:
    """This process among those that evaluate together. `device`: where its models are."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks, in place."""
        return dist.sum_over_ranks(values) if self.world_size > 1 else values

    def from_main(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        return dist.broadcast_json(value, self.device) if self.world_size > 1 else value

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def alone() -> Ranks:
    """One process, on the GPU if there is one. Raises `UserError` where Slurm has allotted GPUs and torch sees none."""
    check_allotted_gpus()
    return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that a launcher started together, or one rank without a launcher."""
    started = max(dist.number_in(os.environ, name, 1) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if started == 1:
        yield alone()
        return
    launch = dist.read_launch()
    dist.init_process_group(launch, COLLECTIVE_TIMEOUT_S)
    try:
        yield Ranks(launch.rank, launch.world_size, launch.device)
    finally:
        dist.shut_down()
