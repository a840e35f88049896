"""What `pipeline/train.py` does once its options are read: start this rank, build the parts, train or only try.

Used by train.py. Surroundings that a run needs from its first second to its last are set up here: log file, stop
requests, process group, watchdog.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from pipeline.config import load_recipe, unused_sections_warning
from pipeline.errors import EXIT_DONE
from pipeline.runtime import clocks, dist
from pipeline.runtime.allotment import unused_gpu_warning
from pipeline.runtime.directory_lock import check_run_directory, owned_by_rank_0
from pipeline.runtime.launcher_watch import watch_launchers
from pipeline.runtime.rank_log import log_crash, tee_output
from pipeline.runtime.stop import StopRequests
from pipeline.runtime.watchdog import Watchdog, process_identity
from pipeline.training.build import assemble
from pipeline.training.dry_run import dry_run, writable_without_trace
from pipeline.training.trainer import Trainer

COLLECTIVE_TIMEOUT_MARGIN = 1.5  # the watchdog should bite first: it knows where every thread stands


def run_from_files(
    recipe_path: Path,
    recipe_is_default: bool,
    ds_path: Path,
    run_dir: Path,
    overrides: list[str],
    allow_change: bool,
    is_dry_run: bool = False,
) -> int:
    """Everything behind `pipeline/train.py`. Returns the exit code; raises what the user can mend."""
    began = time.monotonic()
    launch = dist.read_launch()
    if launch.is_main:
        note = " (no --recipe given)" if recipe_is_default else ""
        print(f"recipe {recipe_path}{note}, run directory {run_dir}", flush=True)
        for warning in filter(None, (unused_gpu_warning(), unused_sections_warning(recipe_path, overrides))):
            print(f"warning: {warning}", flush=True)
    recipe = load_recipe(recipe_path, overrides)
    reads = {"the teacher": Path(recipe.teacher), "the shards": Path(recipe.data)}
    check_run_directory(run_dir, {"recipe.yaml": recipe_path, "deepspeed.json": ds_path}, reads)
    logs, trace, held = run_dir / "logs", contextlib.ExitStack(), contextlib.ExitStack()
    if is_dry_run and launch.is_main:  # the others make nothing before they have met this rank
        trace.enter_context(writable_without_trace(run_dir))
    stop = StopRequests(run_dir / "STOP", recipe.guard.deadline_margin_s)
    stop.listen()
    stop.end_at_once()
    watch_launchers(stop.launcher_has_gone)
    slowest_s = max(recipe.guard.hang_timeout_s, recipe.guard.slow_timeout_s)
    kind = "dry-run-stacks" if is_dry_run else "stacks"  # a dry run leaves those of earlier lives where they are
    try:
        dist.init_process_group(launch, slowest_s * COLLECTIVE_TIMEOUT_MARGIN)
        stop.listen()
        if not is_dry_run:
            held.enter_context(owned_by_rank_0(run_dir, launch))
        with Watchdog(recipe.guard, logs / f"{kind}-rank{launch.rank}.txt") as watchdog:
            marks = dist.gather_json(process_identity(os.getpid()), launch.device)
            left_s, warnings = clocks.agree(dist.gather_json(clocks.my_clock(), launch.device))
            stop.agree_on_deadline(left_s)
            for warning in warnings if launch.is_main else ():
                print(f"warning: {warning}", flush=True)
            watchdog.register_local_ranks([mark for mark in marks if mark])
            parts = assemble(recipe, recipe_path, ds_path, launch)
            if not is_dry_run:  # not sooner: a run that is refused leaves nothing behind
                tee_output(logs / f"rank{launch.rank}.log")
            trainer = Trainer(recipe, parts, launch, run_dir, stop, watchdog)
            if is_dry_run:
                dry_run(trainer, allow_change, time.monotonic() - began)
            else:
                trainer.run(allow_change)
        if is_dry_run:
            dist.barrier()  # every rank has closed its files
    except Exception as error:
        if not is_dry_run:
            log_crash(logs / f"rank{launch.rank}.log", error)  # at once: leaving the other ranks can hang
        raise
    finally:
        dist.shut_down()
        held.close()
        trace.close()
    return EXIT_DONE
