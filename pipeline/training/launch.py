"""What `pipeline/train.py` does after it has parsed its options: join the other ranks, build the parts, train or dry-run.

In: `RunOptions`. Out: a trained run directory, or what the dry run prints. What a run needs from its first second to its
last is set up here: log file, stop requests, process group, watchdog.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import DataError
from pipeline.config import Recipe, load_recipe, unused_sections_warning
from pipeline.errors import UserError
from pipeline.runtime import clocks, dist
from pipeline.runtime.allotment import unused_gpu_warning
from pipeline.runtime.directory_lock import check_run_directory, owned_by_rank_0
from pipeline.runtime.dist import Launch
from pipeline.runtime.launcher_watch import watch_launchers
from pipeline.runtime.rank_log import log_crash, tee_output
from pipeline.runtime.restarts import Restarts
from pipeline.runtime.run_paths import RunPaths
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.watchdog import Watchdog, process_identity
from pipeline.training import out_of_memory
from pipeline.training.build import Run, build
from pipeline.training.dry_run import dry_run, writable_without_trace
from pipeline.training.groups import Group, choose_group
from pipeline.training.out_of_memory import OutOfMemoryError
from pipeline.training.ready import check_ready
from pipeline.training.resume import TrainState, is_over, resume
from pipeline.training.trainer import Trainer

COLLECTIVE_TIMEOUT_MARGIN = 1.5  # the watchdog ends a run first: it knows where every thread is


@dataclass(frozen=True)
class RunOptions:
    """The command line of pipeline/train.py."""

    recipe_path: Path
    recipe_is_default: bool
    ds_path: Path
    run_dir: Path
    overrides: list[str]
    allow_change: bool
    is_dry_run: bool = False


def run_from_files(options: RunOptions) -> None:
    """Everything behind `pipeline/train.py`. Raises what the user can fix."""
    began = time.monotonic()
    launch = dist.read_launch()
    _print_first_lines(options, launch)
    recipe, paths = load_recipe(options.recipe_path, options.overrides), RunPaths(options.run_dir)
    reads = {"the teacher": Path(recipe.teacher), "the shards": Path(recipe.data)}
    reads |= {
        f"the encoder of `student.init`{f' of {name}' * bool(name)}": Path(os.path.expanduser(encoder))  # noqa: PTH111 (Path's raises where ~USER does not exist)
        for name, member in recipe.members().items()
        if (encoder := member.student.start_encoder) is not None
    }
    writes = {paths.recipe.name: options.recipe_path, paths.deepspeed.name: options.ds_path}
    check_run_directory(paths.directory, writes, reads)
    stop = StopRequests(paths.stop, recipe.guard.deadline_margin_s)
    with contextlib.ExitStack() as stack:
        if options.is_dry_run and launch.is_main:  # the others write nothing before they have met this rank
            stack.enter_context(writable_without_trace(paths))
        held = stack.enter_context(contextlib.ExitStack())  # the lock; released after the ranks have parted
        try:
            _join(recipe, stop, launch)
            if not options.is_dry_run:
                held.enter_context(owned_by_rank_0(paths.directory, launch))
            with (
                Watchdog(recipe.guard, paths.stacks(launch.rank, options.is_dry_run)) as watchdog,
                out_of_memory.explained(recipe, launch, options.ds_path),
            ):
                _agree_with_other_ranks(stop, watchdog, launch)
                group = _choose_group(recipe, paths.directory, options.allow_change, launch)
                members = build(recipe, options.recipe_path, options.ds_path, launch, group.students)
                paths = RunPaths(paths.directory, group=group.number)
                if not options.is_dry_run:  # not before: a rejected run leaves no files
                    tee_output(paths.log(launch.rank))
                restarts = Restarts(paths.directory, writes=launch.is_main)
                run = Run(recipe, members, paths, stop, watchdog, restarts)
                check_ready(run)
                states = resume(run, group, options.allow_change, counts_as_start=not options.is_dry_run)
                if options.is_dry_run:
                    dry_run(run, states, time.monotonic() - began)
                else:
                    _train(run, states, options.ds_path)
            if options.is_dry_run:
                dist.barrier()  # every rank has closed its files
            dist.shut_down()  # not after an error: leaving the others could take as long as they wait for this rank
        except Exception as error:
            if not options.is_dry_run:
                log_crash(paths.log(launch.rank), error)
            raise


def _choose_group(recipe: Recipe, run_dir: Path, allow_change: bool, launch: Launch) -> Group:
    """Rank 0's choice, or on every rank its error."""
    found: dict[str, Any] = {"error": None, "group": None}
    if launch.is_main:
        try:
            found["group"] = dataclasses.asdict(choose_group(run_dir, recipe, allow_change))
        except (UserError, DataError, OSError) as error:
            found["error"] = str(error)
    found = dist.broadcast_json(found)
    if found["error"]:
        raise UserError(found["error"])
    return Group(**found["group"])


def _train(run: Run, states: Sequence[TrainState], ds_path: Path) -> None:
    """Train. An attempt that memory was too small for is not a crash: a smaller setting resumes from the newest checkpoint."""
    try:
        with out_of_memory.explained(run.recipe, run.launch, ds_path):
            Trainer(run, states).train()
    except OutOfMemoryError:
        if run.launch.is_main and not is_over(states, run.recipe.steps):
            run.restarts.end("OUT_OF_MEMORY")
        raise


def _print_first_lines(options: RunOptions, launch: Launch) -> None:
    if launch.is_main:
        note = " (no --recipe given)" if options.recipe_is_default else ""
        print(f"recipe {options.recipe_path}{note}, run directory {options.run_dir}", flush=True)
        for warning in filter(
            None, (unused_gpu_warning(), unused_sections_warning(options.recipe_path, options.overrides))
        ):
            print(f"warning: {warning}", flush=True)


def _join(recipe: Recipe, stop: StopRequests, launch: Launch) -> None:
    """Meet the other ranks. Until then a signal ends this process: it has nothing to save."""
    stop.listen()
    stop.end_immediately()
    watch_launchers(stop.launcher_ended)
    slowest_s = max(recipe.guard.hang_timeout_s, recipe.guard.slow_timeout_s)
    dist.init_process_group(launch, slowest_s * COLLECTIVE_TIMEOUT_MARGIN)
    stop.listen()


def _agree_with_other_ranks(stop: StopRequests, watchdog: Watchdog, launch: Launch) -> None:
    """On the deadline, and on which processes of this host are ranks of this run."""
    marks = dist.gather_json(process_identity(os.getpid()))
    left_s, warnings = clocks.agree(dist.gather_json(clocks.my_clock()))
    stop.agree_on_deadline(left_s)
    for warning in warnings if launch.is_main else ():
        print(f"warning: {warning}", flush=True)
    watchdog.register_local_ranks([mark for mark in marks if mark])
