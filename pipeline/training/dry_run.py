"""`pipeline/train.py --dry-run`: everything a run does up to its first optimizer step, then what was found.

In: a `Trainer` and the seconds its start took. Out: a summary on rank 0's console. The run directory is as before: a
later real run begins, or goes on, as if there had been no dry run. Used by run.py.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config import Recipe
from pipeline.errors import DivergedRunError
from pipeline.runtime import dist, preflight
from pipeline.runtime.dist import Launch
from pipeline.training.build import Parts

if TYPE_CHECKING:
    from pipeline.training.run_logger import StepReport
    from pipeline.training.trainer import Trainer

MAX_SKIPPED_STEPS = (
    20  # dynamic fp16 loss scaling overflows while it looks for its scale: from 2**16 down to 1 and some
)


def dry_run(trainer: Trainer, allow_change: bool, start_s: float) -> None:
    """Check, resume where there is something to resume, take one step, and print the summary."""
    first = trainer.prepare(allow_change)
    if first >= trainer.recipe.steps:
        if trainer.launch.is_main:
            print(f"{trainer.run_dir} already has its {trainer.recipe.steps} steps: a run would do nothing", flush=True)
        return
    skipped, seconds, report = _first_taken_step(trainer, first)
    launch = trainer.launch
    peaks = dist.gather_json(peak_memory_bytes(launch.device), launch.device)
    if launch.is_main:
        where = f"a new run in {trainer.run_dir}" if first == 0 else f"{trainer.run_dir} would go on after step {first}"
        for line in [*(f"warning: {text}" for text in trainer.parts.warnings), *trainer.parts.distiller.backend_report]:
            print(line)
        print(f"dry run: one optimizer step taken, nothing written; {where}")
        lines = {
            **describe_parts(trainer.recipe, trainer.parts, launch),
            "loss": describe_loss(trainer.parts, report, skipped),
            "time": f"start {start_s:.1f} s, step {seconds:.1f} s (a first step is slower than the later ones)",
            "memory": f"peak {max(peaks) / 2**30:.2f} GiB on a rank ({_kind_of_memory(launch.device)})",
            "disk": describe_disk(trainer.run_dir, trainer.checkpoint_bytes),
        }
        print("\n".join(f"  {name:<11} {text}" for name, text in lines.items()), flush=True)


@contextlib.contextmanager
def writable_without_trace(run_dir: Path) -> Iterator[None]:
    """A `UserError` where a run could not write; afterwards the run directory and its logs/ are gone if they were not there."""
    with preflight.without_trace(run_dir / "logs"):
        preflight.check_run_dir(run_dir)
        yield


def _first_taken_step(trainer: Trainer, first: int) -> tuple[int, float, StepReport]:
    """How many steps were skipped before one was taken, the seconds of that one, and its report."""
    for skipped, (seconds, report) in enumerate(_timed(trainer.steps_from(first))):
        if not report.skipped:
            return skipped, seconds, report
        if skipped + 1 == MAX_SKIPPED_STEPS:
            break
    raise DivergedRunError(
        f"{skipped + 1} steps in a row had a gradient that is not finite (loss {report.loss}, loss scale "
        f"{report.loss_scale:g}). Try ds_configs/zero2_bf16.json, or look at the teacher and the text"
    )


def _timed(reports: Iterator[StepReport]) -> Iterator[tuple[float, StepReport]]:
    with contextlib.closing(reports):  # type: ignore[type-var]
        began = time.monotonic()
        for report in reports:
            yield time.monotonic() - began, report
            began = time.monotonic()


def describe_parts(recipe: Recipe, parts: Parts, launch: Launch) -> dict[str, str]:
    """Teacher, student, data, batch and relations of a run, one line each."""
    batch, relations, student = parts.batch, recipe.relations, recipe.student
    tokens = recipe.global_batch * recipe.seq_len
    matched = relations.teacher_taps or "last"
    return {
        "teacher": f"{recipe.teacher}, read at layer {matched}, {parts.teacher_precision}, "
        f"{recipe.teacher_options.placement}",
        "student": f"{student.layers} layers x {student.hidden}, {parts.precision}: {parts.num_trained / 1e6:.1f} M "
        f"parameters trained, {parts.num_untrained / 1e6:.1f} M carried along; start: {parts.student.start}",
        "data": f"{len(parts.source.languages)} languages in {recipe.data}, rows of {recipe.seq_len} tokens",
        "batch": f"micro-batch {batch.micro_batch} x accumulation {batch.accumulation} x {launch.world_size} rank(s) = "
        f"{recipe.global_batch} rows, {tokens:,} tokens a step",
        "relations": f"{', '.join(relations.pairs)} with {relations.heads} heads, backend {parts.distiller.backend}",
    }


def describe_loss(parts: Parts, report: StepReport, skipped: int) -> str:
    relations = ", ".join(f"{name} {v:.4f}" for name, v in zip(parts.distiller.part_names, report.parts, strict=True))
    note = f"; {skipped} step(s) before it skipped while the loss scale settled" if skipped else ""
    return f"{report.loss:.4f} ({relations}), gradient norm {report.gradient_norm:.3g}{note}"


def describe_disk(run_dir: Path, checkpoint_bytes: int) -> str:
    free = shutil.disk_usage(preflight.nearest_directory(run_dir)).free
    return f"a checkpoint takes {checkpoint_bytes / 2**30:.2f} GiB, {free / 2**30:.1f} GiB are free"


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: allocated on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _kind_of_memory(device: torch.device) -> str:
    return "reserved on its GPU" if device.type == "cuda" else "resident"
