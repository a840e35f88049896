"""The ranks of an evaluation: one process, or several that share its work.

In: the launcher's environment. Out: a `Launch`. With one rank its collectives do nothing, so a plain
`python -m pipeline evaluate` needs no process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.runtime import dist, gpus
from pipeline.runtime.allotment import check_allotted_gpus
from pipeline.runtime.dist import Launch

# Ranks wait for rank 0 while it runs the tasks that are not shared (retrieval, speed). If a rank dies, its launcher ends the job.
COLLECTIVE_TIMEOUT_S = 4 * 3600.0


def alone() -> Launch:
    """One process, on the first GPU if there is one. Raises `UserError` where a GPU cannot be used."""
    check_allotted_gpus()
    device = torch.device("cpu")
    if gpus.available():
        device = torch.device("cuda", 0)
        gpus.check_usable(device)
    return Launch(0, 1, 0, device)


@contextmanager
def joined() -> Iterator[Launch]:
    """The ranks that a launcher started together, or one rank without a launcher."""
    started = max(dist.number_in(os.environ, name, 1) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if started == 1:
        yield alone()
        return
    launch = dist.read_launch()
    dist.init_process_group(launch, COLLECTIVE_TIMEOUT_S)
    yield launch
    dist.shut_down()  # not after an error: leaving the others could take as long as they wait for this rank
