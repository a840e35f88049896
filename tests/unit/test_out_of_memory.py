"""What a run says when memory runs out. That the part is found in real steps: tests/dist/test_ends_of_ranks.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import Recipe, load_recipe
from pipeline.errors import DivergedRunError, UserError
from pipeline.planning.devices import DEVICES, Hardware
from pipeline.planning.family import FamilyPlanner
from pipeline.planning.plan import Planner
from pipeline.runtime import gpus
from pipeline.runtime.dist import Launch
from pipeline.runtime.ds_config import read_ds_json, split_batch
from pipeline.runtime.engine import StudentEngine
from pipeline.training.out_of_memory import (
    OutOfMemoryError,
    explained,
    is_out_of_memory,
    smaller_micro_batch,
)
from tests.conftest import REPO
from tests.unit.printed import settings_in

# As torch 2.8 and later raise it.
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.06 GiB is free. Including "
    "non-PyTorch memory, this process has 78.03 GiB memory in use. Of the allocated memory 74.50 GiB is allocated by PyTorch, "
    "and 2.90 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
ZERO_2 = REPO / "ds_configs" / "zero2.json"
RECIPE = dataclasses.replace(Recipe(), global_batch=256, micro_batch_per_gpu=32)


def on(device: str, world_size: int = 8) -> Launch:
    return Launch(3 % world_size, world_size, 0, torch.device(device))


class FullGpu:
    """DeepSpeed's engine where the GPU's memory is used up."""

    def backward(self, loss: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(CUDA)

    def step(self) -> None:
        raise torch.OutOfMemoryError(CUDA)

    def is_gradient_accumulation_boundary(self) -> bool:
        return False


def test_out_of_gpu_memory_in_backward() -> None:
    engine = SimpleNamespace(_engine=FullGpu(), _deterministic=False)
    with pytest.raises(OutOfMemoryError) as raised, explained(RECIPE, on("cuda"), ZERO_2):
        StudentEngine.backward(engine, torch.zeros(()))
    message = str(raised.value)
    assert message.startswith("GPU memory ran out in backward, with 32 rows in a micro-batch, on rank 3 (")
    assert "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB" in message
    assert "PYTORCH_CUDA_ALLOC_CONF" not in message
    assert "--set micro_batch_per_gpu=16 (" in message
    assert "--set student.checkpointing=true (" in message
    assert "\n" not in message
    for setting in settings_in(message):
        recipe = load_recipe(
            REPO / "recipes" / "quickstart.yaml", ["global_batch=256", "micro_batch_per_gpu=32", setting]
        )
        assert recipe.micro_batch_per_gpu == 16 or recipe.student.checkpointing
        split_batch(recipe.global_batch, recipe.micro_batch_per_gpu, 8)
    (file,) = re.findall(r"--deepspeed (\S+\.json)", message)
    assert read_ds_json(REPO / file)["zero_optimization"]["stage"] == 3


def message_in_backward(recipe: Recipe, world_size: int) -> str:
    engine = SimpleNamespace(_engine=FullGpu(), _deterministic=False)
    with pytest.raises(OutOfMemoryError) as raised, explained(recipe, on("cuda", world_size), ZERO_2):
        StudentEngine.backward(engine, torch.zeros(()))
    return str(raised.value)


@pytest.fixture
def on_a_t4(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    t4 = gpus.Gpu("Tesla T4", (7, 5), "GPU-0", 15 * 2**30)
    monkeypatch.setattr(gpus, "describe", lambda device: t4)
    return Hardware(DEVICES["t4"])


def large_recipe(*settings: str) -> Recipe:
    return load_recipe(REPO / "recipes" / "xlmr_large_l12_h384.yaml", ["global_batch=4096", *settings])


@pytest.mark.parametrize("world_size", [1, 8])
def test_it_names_the_largest_micro_batch_that_fits_by_the_plan(on_a_t4: Hardware, world_size: int) -> None:
    recipe = large_recipe("micro_batch_per_gpu=512")
    message = message_in_backward(recipe, world_size)
    (named,) = re.findall(
        r"--set micro_batch_per_gpu=(\d+) \(the largest that fits on t4 by the plan of this run; the global batch",
        message,
    )
    planner = Planner(recipe, Path("recipe"), ZERO_2, on_a_t4)
    assert planner.fits(planner.plan(1, world_size, micro_batch=int(named)))
    assert not planner.fits(planner.plan(1, world_size, micro_batch=2 * int(named)))
    assert int(named) != 256, "half of 512 would be no evidence"


def test_several_students_are_planned_together(on_a_t4: Hardware) -> None:
    alone = large_recipe("micro_batch_per_gpu=512")
    family = dataclasses.replace(alone, students={f"s{number}": {} for number in range(12)})
    named = [re.findall(r"micro_batch_per_gpu=(\d+) \(the largest", message_in_backward(r, 8)) for r in (alone, family)]
    assert named[1] == [str(FamilyPlanner(family, Path("recipe"), ZERO_2, on_a_t4).largest_micro_batch(1, 8))]
    assert int(named[1][0]) < int(named[0][0])


def test_a_plan_that_this_run_has_disproved_is_not_repeated(on_a_t4: Hardware) -> None:
    largest = Planner(large_recipe(), Path("recipe"), ZERO_2, on_a_t4).largest_micro_batch(1, 8)
    message = message_in_backward(large_recipe(f"micro_batch_per_gpu={largest}"), 8)
    assert f"--set micro_batch_per_gpu={largest // 2} (the global batch stays the same)" in message


@pytest.mark.parametrize("error", [UserError("no such teacher"), MemoryError(), ZeroDivisionError()])
def test_an_error_of_the_planner_is_not_in_the_way(
    on_a_t4: Hardware, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(Planner, "largest_micro_batch", fails)
    message = message_in_backward(large_recipe("micro_batch_per_gpu=512"), 8)
    assert message.startswith("GPU memory ran out in backward, with 512 rows")
    assert "--set micro_batch_per_gpu=256 (the global batch stays the same)" in message


def test_the_optimizer_needs_no_smaller_micro_batch() -> None:
    engine = SimpleNamespace(_engine=FullGpu())
    with pytest.raises(OutOfMemoryError) as raised, explained(RECIPE, on("cuda"), ZERO_2):
        StudentEngine.step(engine, 1e-3)
    assert "ran out in the optimizer step, on rank 3" in str(raised.value)
    assert "micro_batch_per_gpu" not in str(raised.value)
    assert "ds_configs/zero3_offload.json" in str(raised.value)


def test_one_row_and_recomputed_activations_already() -> None:
    student = dataclasses.replace(RECIPE.student, checkpointing=True)
    recipe = dataclasses.replace(RECIPE, global_batch=1, micro_batch_per_gpu=1, student=student)
    engine = SimpleNamespace(_engine=FullGpu(), _deterministic=False)
    with pytest.raises(OutOfMemoryError) as raised, explained(recipe, on("cuda", world_size=1), ZERO_2):
        StudentEngine.backward(engine, torch.zeros(()))
    assert "--set" not in str(raised.value)
    assert "less: a GPU with more memory, or several." in str(raised.value)


def test_the_students_that_do_not_recompute_are_named() -> None:
    recipe = large_recipe("student.checkpointing=true")
    assert "checkpointing" not in message_in_backward(recipe, 8)
    family = dataclasses.replace(recipe, students={"a": {}, "b": {"student": {"checkpointing": False}}})
    assert "--set students.b.student.checkpointing=true (a third more work" in message_in_backward(family, 8)


def test_outside_of_a_step_the_place_is_named() -> None:
    def place_teacher() -> None:
        raise torch.OutOfMemoryError(CUDA)

    with pytest.raises(
        OutOfMemoryError, match=r"ran out in place_teacher, test_out_of_memory\.py:\d+, on rank 3"
    ) as raised:
        with explained(RECIPE, on("cuda"), ZERO_2):
            place_teacher()
    assert "micro_batch_per_gpu" not in str(raised.value)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "expected"),
    [(256, 32, 8, (32, 16)), (256, 32, 16, (16, 8)), (96, 12, 8, (12, 6)), (30, 15, 2, (15, 5)), (8, 1, 8, (1, None))],
)
def test_the_smaller_micro_batch_divides_a_ranks_rows(
    global_batch: int, micro_batch: int, world_size: int, expected: tuple[int, int | None]
) -> None:
    recipe = dataclasses.replace(RECIPE, global_batch=global_batch, micro_batch_per_gpu=micro_batch)
    rows, smaller = smaller_micro_batch(recipe, world_size)
    assert (rows, smaller) == expected
    assert smaller is None or split_batch(global_batch, smaller, world_size).micro_batch == smaller


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 'out of memory'"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (DivergedRunError("the loss is not finite"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with pytest.raises(OutOfMemoryError if expected else type(error)), explained(RECIPE, on("cpu"), ZERO_2):
        raise error
