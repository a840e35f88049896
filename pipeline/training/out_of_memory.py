"""Memory that runs out in a run: the error names the part of the step in which it did, and settings that need less.

In: the exception on its way out of the run. Out: an `OutOfMemoryError` (exit code 2) in its place. The part is read from the
traceback, so a step does nothing for it.
"""

from __future__ import annotations

import contextlib
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data_prep.command_line import module_command, place_of
from pipeline.config import Recipe
from pipeline.data.heldout import heldout_losses
from pipeline.distillation.distiller import DistillModule
from pipeline.distillation.models.teacher import FrozenTeacher
from pipeline.distillation.tap import TappedEncoder
from pipeline.errors import UserError
from pipeline.planning.devices import Hardware, device_of_driver
from pipeline.planning.family import FamilyPlanner
from pipeline.planning.plan import Planner, with_recomputed_activations
from pipeline.runtime import gpus
from pipeline.runtime.dist import Launch
from pipeline.runtime.ds_config import split_batch
from pipeline.runtime.engine import StudentEngine

TEACHER, STUDENT, LOSS = "the teacher's forward", "the student's forward", "the relation loss"
BACKWARD, OPTIMIZER = "backward", "the optimizer step"
# The first that is among the callers names the part: backward may run a forward again, and a loss is around both models.
_PARTS: tuple[tuple[Callable, str], ...] = (
    (StudentEngine.step, OPTIMIZER),
    (StudentEngine.backward, BACKWARD),
    (FrozenTeacher.forward, TEACHER),
    (TappedEncoder.forward, STUDENT),
    (DistillModule.forward, LOSS),
    (DistillModule.losses_by_row, LOSS),
    (StudentEngine.__init__, "the start of the training engine"),
)
# What torch says without an exception of its own: the CPU's allocator, CUDA itself, and its libraries, which allocate too.
_SAID = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", "Cuda failure 'out of memory'")  # fmt: skip
LONGEST_REASON = 500


class OutOfMemoryError(UserError):
    """Memory ran out, and the message says what needs less."""


@contextlib.contextmanager
def explained(recipe: Recipe, launch: Launch, ds_path: Path) -> Iterator[None]:
    """Replace an exception of the block that says that memory ran out. Raises `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(explanation(error, recipe, launch, ds_path)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch or CUDA's libraries says that memory ran out, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _SAID)


def part_of(error: BaseException) -> str:
    """The part of a run in which an exception was raised; empty where it is none of a step's."""
    callers = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    part = next((name for function, name in _PARTS if function.__code__ in callers), "")
    return f"{part} of the held-out evaluation" if part and heldout_losses.__code__ in callers else part


def explanation(error: BaseException, recipe: Recipe, launch: Launch, ds_path: Path) -> str:
    """One paragraph: where memory ran out, what torch says about it, and what to change."""
    part, is_gpu = part_of(error), launch.device.type == "cuda"
    micro_batch, smaller = smaller_micro_batch(recipe, launch.world_size)
    depends_on_rows = part.startswith((TEACHER, STUDENT, LOSS, BACKWARD))
    remedies = []
    if depends_on_rows and smaller:
        planned = planned_micro_batch(recipe, launch, ds_path) if is_gpu else None
        if planned and planned[0] < micro_batch:
            smaller, source = planned[0], f"the largest that fits on {planned[1]} by the plan of this run; "
        else:
            source = ""
        remedies.append(f"--set micro_batch_per_gpu={smaller} ({source}the global batch stays the same)")
    recomputing, _ = with_recomputed_activations(recipe)
    if depends_on_rows and recomputing:
        remedies.append(f"{recomputing} (a third more work; add --allow-change if the run has begun)")
    if is_gpu and launch.world_size > 1:
        remedies.append("--deepspeed ds_configs/zero3.json")
    if is_gpu and not depends_on_rows:
        remedies.append("--deepspeed ds_configs/zero3_offload.json")
    if not is_gpu:
        remedies.append("fewer processes per node, or more memory for the job (Slurm: --mem=0)")
    if not remedies:
        remedies.append("a GPU with more memory, or several")
    memory = "GPU memory" if is_gpu else "host memory"
    rows = f", with {micro_batch} rows in a micro-batch" if depends_on_rows else ""
    reason = " ".join(str(error).partition(" If reserved but")[0].split())[:LONGEST_REASON].rstrip(".")
    return (
        f"{memory} ran out {f'in {part}' if part else place_of(error)}{rows}, on rank {launch.rank} ({socket.gethostname()}): {reason or 'no reason given'}. What "
        f"needs less: {'; or '.join(remedies)}. `{module_command('pipeline', 'plan')}` predicts what fits. Saved checkpoints are complete: the command "
        "with this change resumes from the newest"
    )


def planned_micro_batch(recipe: Recipe, launch: Launch, ds_path: Path) -> tuple[int, str] | None:
    """The largest micro-batch that the planner expects to fit, and the GPU's name there. None where it has no plan.

    The planner knows the GPUs of its table, and teachers whose shape it can read.
    """
    try:
        device = device_of_driver(gpus.describe(launch.device).name)
        if device is None:
            return None
        kind = FamilyPlanner if recipe.students else Planner
        planner = kind(recipe, Path("the recipe"), ds_path, Hardware(device))
        largest = planner.largest_micro_batch(nodes=1, gpus_per_node=launch.world_size)
    except Exception:  # of any kind: the message that memory ran out must not be lost
        return None
    return (largest, device.name) if largest else None


def smaller_micro_batch(recipe: Recipe, world_size: int) -> tuple[int, int | None]:
    """Rows in a micro-batch, and the largest possible number that is at most half as large; None where it is one row.

    Half, because what was in use when memory ran out does not say how much the rest of the step would have needed.
    """
    per_rank = recipe.global_batch // world_size
    rows = split_batch(recipe.global_batch, recipe.micro_batch_per_gpu, world_size).micro_batch
    return rows, max((size for size in range(1, rows // 2 + 1) if per_rank % size == 0), default=None)
