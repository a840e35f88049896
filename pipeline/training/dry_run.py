"""`pipeline/train.py --dry-run`: everything that a run does up to its first optimizer step, and a summary of it.

In: a `Run`, its `TrainState`s, and the seconds that the start took. Out: the summary on rank 0's console. The run directory
is as before: a later run begins or resumes as if there had been no dry run.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence

from pipeline.errors import DivergedRunError
from pipeline.runtime import dist
from pipeline.runtime.device_facts import peak_memory_bytes
from pipeline.runtime.preflight import check_run_dir, nearest_directory, without_trace
from pipeline.runtime.run_paths import RunPaths
from pipeline.training.build import Parts, Run
from pipeline.training.resume import TrainState, is_over
from pipeline.training.run_logger import StepReport
from pipeline.training.stepper import Learner, Stepper

# Dynamic fp16 loss scaling overflows while it looks for its scale: from 2**16 down to 1 takes 16 steps.
MAX_SKIPPED_STEPS = 20


def dry_run(run: Run, states: Sequence[TrainState], start_s: float) -> None:
    """Take one step and print the summary. Raises `DivergedRunError` where no step has a finite gradient."""
    run_dir, first, launch = run.paths.directory, states[0].first_step, run.launch
    if is_over(states, run.recipe.steps):
        what = (
            f"already has its {run.recipe.steps} steps"
            if first >= run.recipe.steps
            else "has only students that ended early"
        )
        run.say(f"{run_dir} {what}: a run would do nothing")
        return
    seconds, taken = _first_taken_steps(run, states)
    peaks = dist.gather_json(peak_memory_bytes(launch.device))
    where = f"a new run in {run_dir}" if first == 0 else f"{run_dir} would resume after step {first}"
    for member in run.members:
        for line in member.warnings:
            run.say(f"warning: {line}")
        for line in member.distiller.backend_report:
            run.say(f"{member.name}: {line}" if member.name else line)
    run.say(f"dry run: one optimizer step taken, nothing written; {where}")
    memory = "reserved on its GPU" if launch.device.type == "cuda" else "resident"
    lines = {
        **_describe_members(run.members, taken),
        "time": f"start {start_s:.1f} s, step {seconds:.1f} s (a first step is slower than the later ones)",
        "memory": f"peak {max(peaks) / 2**30:.2f} GiB on a rank ({memory})",
        "disk": describe_disk(run),
    }
    width = max(11, *map(len, lines))
    run.say("\n".join(f"  {name:<{width}} {text}" for name, text in lines.items()))


@contextlib.contextmanager
def writable_without_trace(paths: RunPaths) -> Iterator[None]:
    """A `UserError` where a run could not write. Afterwards the run directory and its logs/ are removed if they are new."""
    with without_trace(paths.logs):
        check_run_dir(paths.directory)
        yield


Taken = dict[str, tuple[int, StepReport]]  # student -> how many steps were skipped before it took one, and that step


def _first_taken_steps(run: Run, states: Sequence[TrainState]) -> tuple[float, Taken]:
    """The seconds of the last step, and the first step that each student has taken or, if it has ended, would not take."""
    learners = [Learner(*of_one) for of_one in zip(run.members, states, strict=True)]
    stepper, first, taken = Stepper(learners), states[0].first_step, Taken()
    open_names = {learner.parts.name for learner in learners if learner.state.ended is None}
    with stepper.batches(first) as batches:
        stream = iter(batches)
        for skipped, step in enumerate(range(first, min(run.recipe.steps, first + MAX_SKIPPED_STEPS))):
            began = time.monotonic()
            launched = stepper.train_step(step, stream)
            reports = {m.name: unread.read() for m, unread in zip(run.members, launched, strict=True) if unread}
            run.watchdog.feed()
            taken |= {n: (skipped, r) for n, r in reports.items() if not r.skipped and n not in taken}
            if taken.keys() == open_names:
                return time.monotonic() - began, taken
    name, report = next((name, report) for name, report in reports.items() if name not in taken)
    raise DivergedRunError(
        f"{f'student {name}: ' if name else ''}{skipped + 1} steps in a row had a gradient that is not finite (loss "
        f"{report.loss}, loss scale {report.loss_scale:g}). Try ds_configs/zero2_bf16.json, or look at the teacher and the text"
    )


def _describe_members(members: Sequence[Parts], taken: Taken) -> dict[str, str]:
    """What all students have in common, and the lines of each that differ."""
    lines: dict[str, str] = {}
    layers = ", ".join(map(str, sorted({layer for member in members for layer, _ in member.student.matched})))
    for member in members:
        for key, text in describe_parts(member, layers).items():
            own = f"{key} {member.name}" if member.name and key in ("student", "relations") else key
            lines.setdefault(own, text)
        loss = f"loss {member.name}" if member.name else "loss"
        lines[loss] = describe_loss(member, *taken[member.name]) if member.name in taken else "has ended earlier"
    return lines


def describe_parts(parts: Parts, layers: str) -> dict[str, str]:
    """Teacher, student, data, batch and relations of a run, one line each. `layers`: those of the teacher that are read."""
    recipe, batch = parts.recipe, parts.batch
    relations, student = recipe.relations, recipe.student
    tokens = recipe.global_batch * recipe.seq_len
    return {
        "teacher": f"{recipe.teacher}, read at layer {layers}, {parts.teacher_precision}, "
        f"{recipe.teacher_options.placement}",
        "student": f"{student.layers} layers x {student.hidden}, {parts.precision}: {parts.num_trained / 1e6:.1f} M "
        f"parameters trained, {parts.num_untrained / 1e6:.1f} M frozen; start: {parts.student.start}",
        "data": f"{len(parts.source.languages)} languages in {recipe.data}, rows of {recipe.seq_len} tokens",
        "batch": f"micro-batch {batch.micro_batch} x accumulation {batch.accumulation} x {parts.launch.world_size} rank(s) = "
        f"{recipe.global_batch} rows, {tokens:,} tokens a step",
        "relations": f"{', '.join(relations.pairs)} with {relations.heads} heads, backend {parts.distiller.backend}",
    }


def describe_loss(parts: Parts, skipped: int, report: StepReport) -> str:
    relations = ", ".join(f"{name} {v:.4f}" for name, v in zip(parts.distiller.part_names, report.parts, strict=True))
    note = f"; {skipped} step(s) before it were skipped while the loss scale was adjusted" if skipped else ""
    return f"{report.loss:.4f} ({relations}), gradient norm {report.gradient_norm:.3g}{note}"


def describe_disk(run: Run) -> str:
    free = shutil.disk_usage(nearest_directory(run.paths.directory)).free
    checkpoint_bytes = sum(member.checkpoint_bytes for member in run.members)
    return f"a checkpoint takes {checkpoint_bytes / 2**30:.2f} GiB, {free / 2**30:.1f} GiB are free"
