"""The last checks before the first step, once all parts are built: can this run save, and do all ranks see the same files?

In: a `Run`. Out: nothing, or on every rank the same `UserError`. The checks before them: checks.py.
"""

from __future__ import annotations

import socket
from typing import Any

from data_prep.shards import UnreadableError
from pipeline.runtime import dist, preflight
from pipeline.runtime.checkpoint import committed_steps
from pipeline.runtime.loggers import problem_of
from pipeline.training.build import Run


def check_ready(run: Run) -> None:
    """Disk and run directory, the hash of every shard if `guard.verify_shards` asks for it, one directory for all ranks."""
    found: dict[str, Any] = {"problem": None, "shards": [], "host": socket.gethostname()}
    if run.launch.is_main:
        found["problem"] = _problem_on_disk(run)
    if run.recipe.guard.verify_shards:
        mine = preflight.my_share(run.shared.source.shards.all_shards(), run.launch)
        try:
            found["shards"] = preflight.corrupt_shards(mine, run.watchdog.feed_before_slow_work)
        except UnreadableError as error:
            found["problem"] = str(error)  # on every rank, or the others would wait for this one
    preflight.check_problems(dist.gather_json(found), run.recipe.data)
    preflight.check_shared(run.paths.directory, run.launch)


def _problem_on_disk(run: Run) -> str | None:
    if problem := problem_of(run.recipe.metrics.loggers):
        return problem
    try:
        present, keeping = committed_steps(run.paths.checkpoints), run.recipe.checkpoint
    except UnreadableError as error:
        return str(error)
    every = keeping.keep_every or run.recipe.steps + 1
    milestones = run.recipe.steps // every - sum(step % every == 0 for step in present)
    checkpoint_bytes = sum(member.checkpoint_bytes for member in run.members)
    kept = keeping.num_newest_and_best(len(run.members))
    disk = (checkpoint_bytes, kept, len(present), milestones)
    return preflight.problem_on_disk(run.paths.directory, *disk)
